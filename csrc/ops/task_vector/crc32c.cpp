#include <array>

#include "ops/task_vector/packed.h"

namespace moe {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78;  // of Castagnoli, Bräuer and Herrmann (1993), lowest bit first

constexpr std::array<uint32_t, 256> table() {
  std::array<uint32_t, 256> entries{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? kPolynomial : 0);
    entries[i] = crc;
  }
  return entries;
}

uint32_t update(uint32_t crc, const uint8_t* bytes, int64_t count) {
  static constexpr std::array<uint32_t, 256> kTable = table();
  for (int64_t i = 0; i < count; ++i) crc = crc >> 8 ^ kTable[(crc ^ bytes[i]) & 0xff];
  return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t update_sse42(uint32_t crc, const uint8_t* bytes, int64_t count) {
  uint64_t wide = crc;
  for (; count >= 8; bytes += 8, count -= 8) {
    uint64_t word;
    std::memcpy(&word, bytes, sizeof word);
    wide = __builtin_ia32_crc32di(wide, word);
  }
  return update(static_cast<uint32_t>(wide), bytes, count);
}
#endif

}  // namespace

uint32_t crc32c(uint32_t crc, const uint8_t* bytes, int64_t count) {
#if defined(__x86_64__)
  static const bool has_instruction = __builtin_cpu_supports("sse4.2");
  if (has_instruction) return ~update_sse42(~crc, bytes, count);
#endif
  return ~update(~crc, bytes, count);
}

uint32_t packed_crc(const uint8_t* bytes, int64_t count) {
  const uint8_t zero[4] = {};
  const uint32_t before = crc32c(crc32c(0, bytes, kCrcOffset), zero, sizeof zero);
  return crc32c(before, bytes + kCrcOffset + 4, count - kCrcOffset - 4);
}

}  // namespace moe
