// Blocks of a ternary vector as they lie in a file: docs/task_vector_format.md has the layout.
//
// Positions are Rice codes split in two: the low k bits of every gap in one array, its high part in unary in another. The
// n-th one of the unary stream has as many zeros before it as all high parts up to there, so position n is
//   (zeros << k) + sum of the low parts + n
// without a chain through the variable lengths. Source of the split: Elias-Fano coding (Elias, 1974; Fano, 1971); of the
// rest: Golomb (1966), Rice (1979). Bits are numbered from the lowest of the first byte.
#pragma once

#include "microkernels/apply_ternary.h"

namespace moe::MOE_ISA {

MOE_INLINE uint64_t load_word(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

// 64 bits from any bit on; reads nine bytes
MOE_INLINE uint64_t bits_at(const uint8_t* bytes, int64_t bit) {
  const uint8_t* p = bytes + bit / 8;
  const int shift = static_cast<int>(bit % 8);
  const uint64_t word = load_word(p) >> shift;
  return shift == 0 ? word : word | static_cast<uint64_t>(p[8]) << (64 - shift);
}

MOE_INLINE int64_t num_groups(int64_t size) { return (size + kTernaryGroup - 1) / kTernaryGroup; }

// Calls each(position, sign bit) for `count` split-Rice codes whose fields have `width` bits, of which the lowest is the
// sign if kSigned. Returns the bit after the last one, -1 where the codes leave the block or the stream.
template <bool kSigned, class F>
MOE_INLINE int64_t decode_codes(const PackedBlock& block, int64_t count, const F& each) {
  const int width = block.k + kSigned;
  const int64_t unary = count * width;
  if (unary >= block.num_bits) return -1;
  const uint64_t mask = (uint64_t{1} << width) - 1;
  const uint8_t* bytes = block.bytes;
  int64_t base = unary / 8 * 8, low = 0, field = 0, end = unary;
  uint64_t word = load_word(bytes + base / 8) & (~uint64_t{0} << (unary - base));
  for (int64_t i = 0; i < count; ++i, field += width) {
    while (word == 0) {
      base += 64;
      if (base >= block.num_bits) return -1;
      word = load_word(bytes + base / 8);
    }
    const int64_t one = base + __builtin_ctzll(word);
    word &= word - 1;
    const uint64_t bits = (load_word(bytes + field / 8) >> (field % 8)) & mask;
    low += static_cast<int64_t>(bits >> kSigned);
    const int64_t position = ((one - unary - i) << block.k) + low + i;
    if (position >= block.size) return -1;
    each(position, kSigned ? bits & 1 : 0);
    end = one + 1;
  }
  return end > block.num_bits ? -1 : end;
}

// The signs of the elements that are not zero, one bit each from `bit` on. The bit after them, -1 where the stream is too
// short.
MOE_INLINE int64_t decode_signs(const PackedBlock& block, int64_t bit, uint64_t* planes) {
  if (bit + block.count > block.num_bits) return -1;
  for (int64_t g = 0; g < num_groups(block.size); ++g) {
    planes[2 * g + 1] = spread_bits(bits_at(block.bytes, bit), planes[2 * g]);
    bit += __builtin_popcountll(planes[2 * g]);
  }
  return bit;
}

// All words of the block's planes. Returns the bit after the last one, -1 where the block is not one: whatever its bytes
// are, nothing else is read.
static int64_t decode_block(const PackedBlock& block, uint64_t* planes) {
  const int64_t groups = num_groups(block.size);
  std::memset(planes, 0, static_cast<size_t>(groups) * 2 * sizeof(uint64_t));
  if (block.count < 0 || block.count > block.size || block.k < 0 || block.k > kLargestRice) return -1;
  switch (block.mode) {
    case PackedMode::empty: return block.count == 0 ? 0 : -1;
    case PackedMode::rice:
      if (block.count == 0) return -1;
      return decode_codes<true>(block, block.count, [&](int64_t position, uint64_t sign) {
        planes[position / 64 * 2] |= uint64_t{1} << (position % 64);
        planes[position / 64 * 2 + 1] |= sign << (position % 64);
      });
    case PackedMode::bitmap: {
      if (block.size + block.count > block.num_bits) return -1;
      int64_t count = 0;
      for (int64_t g = 0; g < groups; ++g) {
        planes[2 * g] = bits_at(block.bytes, g * 64) & first_bits(block.size - g * 64);
        count += __builtin_popcountll(planes[2 * g]);
      }
      return count == block.count ? decode_signs(block, block.size, planes) : -1;
    }
    case PackedMode::all:
      for (int64_t g = 0; g < groups; ++g) planes[2 * g] = first_bits(block.size - g * 64);
      return block.count == block.size ? decode_signs(block, 0, planes) : -1;
    case PackedMode::rice_of_zeros: {
      const int64_t zeros = block.size - block.count;
      if (zeros == 0) return -1;
      for (int64_t g = 0; g < groups; ++g) planes[2 * g] = first_bits(block.size - g * 64);
      const int64_t end = decode_codes<false>(block, zeros, [&](int64_t position, uint64_t) {
        planes[position / 64 * 2] &= ~(uint64_t{1} << (position % 64));
      });
      return end < 0 ? -1 : decode_signs(block, end, planes);
    }
  }
  return -1;
}

// Gaps between the elements of a plane, each with its sign: gap << 1 | sign. Returns how many there are. flip: all ones
// for the elements that are not in it.
MOE_INLINE int64_t gaps_of(const uint64_t* planes, int64_t size, uint64_t flip, uint16_t* gaps) {
  int64_t count = 0, next = 0;
  for (int64_t g = 0; g < num_groups(size); ++g)
    for (uint64_t word = (planes[2 * g] ^ flip) & first_bits(size - g * 64); word != 0; word &= word - 1) {
      const int bit = __builtin_ctzll(word);
      const int64_t position = g * 64 + bit;
      gaps[count++] = static_cast<uint16_t>((position - next) << 1 | ((planes[2 * g + 1] >> bit) & 1));
      next = position + 1;
    }
  return count;
}

// The k of fewest bits and those bits: of fields of k bits and of the unary stream. One bit more a field saves fewer unary
// bits each time, so the first k that saves none is past the best.
MOE_INLINE int64_t best_rice(const uint16_t* gaps, int64_t count, int* best_k) {
  int64_t best = INT64_MAX;
  for (int k = 0; k <= kLargestRice; ++k) {
    uint32_t high = 0;  // all gaps of a block sum to less than 4096
    for (int64_t i = 0; i < count; ++i) high += gaps[i] >> (k + 1);
    const int64_t bits = count * (k + 1) + high;
    if (bits >= best) break;
    best = bits;
    *best_k = k;
  }
  return best;
}

static PackedChoice choose_block(const uint64_t* planes, int64_t size) {
  int64_t count = 0;
  for (int64_t g = 0; g < num_groups(size); ++g) count += __builtin_popcountll(planes[2 * g]);
  if (count == 0) return {PackedMode::empty, 0, 0, 0};
  if (count == size) return {PackedMode::all, 0, count, size};
  uint16_t gaps[kTernaryBlock];
  PackedChoice choice{PackedMode::bitmap, 0, count, size + count};
  const bool zeros = 2 * count > size;  // of the sparser kind the gaps cost less
  gaps_of(planes, size, zeros ? ~uint64_t{0} : 0, gaps);
  int k = 0;
  const int64_t bits = best_rice(gaps, zeros ? size - count : count, &k) + count;
  if (bits < choice.num_bits) choice = {zeros ? PackedMode::rice_of_zeros : PackedMode::rice, k, count, bits};
  return choice;
}

struct BitWriter {
  uint8_t* out;
  uint64_t bits = 0;
  int held = 0;
};

// count <= 32 bits, none set above them
MOE_INLINE void put_bits(BitWriter& writer, uint64_t value, int count) {
  writer.bits |= value << writer.held;
  writer.held += count;
  if (writer.held < 32) return;
  const uint32_t word = static_cast<uint32_t>(writer.bits);
  std::memcpy(writer.out, &word, sizeof word);
  writer.out += sizeof word;
  writer.bits >>= 32;
  writer.held -= 32;
}

// Writes the chosen bits, whole words of 32.
static void encode_block(const uint64_t* planes, int64_t size, const PackedChoice& choice, uint8_t* out) {
  BitWriter writer{out};
  const auto put_word = [&](uint64_t word, int64_t count) {
    put_bits(writer, word & 0xffffffff & first_bits(count), static_cast<int>(count < 32 ? count : 32));
    if (count > 32) put_bits(writer, (word >> 32) & first_bits(count - 32), static_cast<int>(count - 32));
  };
  const auto put_signs = [&] {
    for (int64_t g = 0; g < num_groups(size); ++g)
      put_word(gather_bits(planes[2 * g + 1], planes[2 * g]), __builtin_popcountll(planes[2 * g]));
  };
  uint16_t gaps[kTernaryBlock];
  const auto put_unary = [&](int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      int zeros = gaps[i] >> (choice.k + 1);
      for (; zeros >= 32; zeros -= 32) put_bits(writer, 0, 32);
      if (zeros == 31) put_bits(writer, 0, 31), zeros = 0;
      put_bits(writer, uint64_t{1} << zeros, zeros + 1);
    }
  };
  const uint64_t mask = (uint64_t{1} << choice.k) - 1;
  switch (choice.mode) {
    case PackedMode::empty: break;
    case PackedMode::rice: {
      const int64_t count = gaps_of(planes, size, 0, gaps);
      for (int64_t i = 0; i < count; ++i) put_bits(writer, gaps[i] & (2 * mask + 1), choice.k + 1);
      put_unary(count);
      break;
    }
    case PackedMode::bitmap:
      for (int64_t g = 0; g < num_groups(size); ++g) {
        const int64_t rest = size - g * 64;
        put_word(planes[2 * g], rest < 64 ? rest : 64);
      }
      put_signs();
      break;
    case PackedMode::all: put_signs(); break;
    case PackedMode::rice_of_zeros: {
      const int64_t zeros = gaps_of(planes, size, ~uint64_t{0}, gaps);
      for (int64_t i = 0; i < zeros; ++i) put_bits(writer, (gaps[i] >> 1) & mask, choice.k);
      put_unary(zeros);
      put_signs();
      break;
    }
  }
  if (writer.held > 0) put_bits(writer, 0, 32 - writer.held);
}

}  // namespace moe::MOE_ISA
