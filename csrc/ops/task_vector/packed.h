// The packed format of a ternary vector; docs/task_vector_format.md describes it for other readers and writers.
#pragma once

#include <atomic>
#include <cmath>
#include <cstring>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "microkernels/task_vector_table.h"

namespace moe {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is little-endian");

struct PackedHeader {
  char magic[8];
  uint64_t numel;
  uint32_t log2_block, num_blocks;
  float scale, sigma;
  uint32_t kind, crc;
  uint64_t payload_offset, nnz, base_hash;
  uint32_t ndim, dtype;
  uint64_t shape[7];
};
static_assert(sizeof(PackedHeader) == 128);

constexpr char kPackedMagic[8] = {'S', 'T', 'V', 'E', 'C', 0, 1, 0};
// What the blocks hold beside positions and signs: nothing, magnitudes, sizes of steps.
enum class PackedKind : uint32_t { ternary, values, patch };
constexpr int64_t kCrcOffset = 36;
constexpr int64_t kSpareBytes = 16;  // after the payload: readers load whole words
constexpr int64_t kPlaneWords = kTernaryBlock / kTernaryGroup * 2;  // of a block
constexpr int64_t kPackedBlocksPerTask = 16;

// CRC-32C (Castagnoli) of what follows bytes of that sum; 0 to begin with.
uint32_t crc32c(uint32_t crc, const uint8_t* bytes, int64_t count);
// Of a whole packed vector, its own field taken as zero.
uint32_t packed_crc(const uint8_t* bytes, int64_t count);

constexpr int64_t round_up_64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

constexpr int64_t packed_itemsize(PackedDtype dtype) {
  constexpr int64_t sizes[] = {0, 4, 2, 2, 8};
  return sizes[static_cast<int>(dtype)];
}

// A packed vector whose header and sizes hold; blocks are checked as they are decoded.
class PackedView {
 public:
  PackedView(const char* op, const Tensor& tensor) : bytes_(data<uint8_t>(tensor)), size_(tensor.numel()) {
    MOE_CHECK(tensor.scalar_type() == ScalarType::Byte && tensor.dim() == 1 && tensor.is_contiguous() &&
                  size_ >= static_cast<int64_t>(sizeof header_),
              op, ": a packed task vector must be a contiguous uint8 tensor of at least 128 bytes");
    std::memcpy(&header_, bytes_, sizeof header_);
    MOE_CHECK(std::memcmp(header_.magic, kPackedMagic, sizeof kPackedMagic) == 0, op,
              ": the bytes are no packed task vector of version 1");
    MOE_CHECK(header_.kind <= 2, op, ": a packed task vector must be of kind 0 (ternary), 1 (values) or 2 (patch), got ",
              header_.kind);
    MOE_CHECK(kind() == PackedKind::ternary  ? header_.dtype == 0
              : kind() == PackedKind::values ? header_.dtype >= 1 && header_.dtype <= 3
                                             : header_.dtype >= 1 && header_.dtype <= 4,
              op, ": a packed task vector of kind ", header_.kind, " cannot be of dtype ", header_.dtype);
    MOE_CHECK(header_.log2_block == 12 && header_.numel < (uint64_t{1} << 43) && header_.ndim <= 7 && std::isfinite(header_.scale) &&
                  header_.num_blocks == (header_.numel + kTernaryBlock - 1) / kTernaryBlock,
              op, ": the header of the packed task vector is damaged");
    unsigned __int128 numel = 1;
    for (uint32_t i = 0; i < header_.ndim; ++i) {
      numel *= header_.shape[i];
      MOE_CHECK(header_.shape[i] < (uint64_t{1} << 43) && numel < (uint64_t{1} << 43), op,
                ": the shape of the packed task vector is damaged");
    }
    const int64_t payload = round_up_64(static_cast<int64_t>(sizeof header_) + 8 * num_blocks());
    MOE_CHECK(numel == header_.numel && header_.payload_offset == static_cast<uint64_t>(payload) &&
                  size_ >= payload + kSpareBytes && size_ % 64 == 0,
              op, ": the packed task vector is cut short or its header is damaged");
    payload_bytes_ = size_ - payload - kSpareBytes;
  }

  const PackedHeader& header() const { return header_; }
  PackedKind kind() const { return static_cast<PackedKind>(header_.kind); }
  PackedDtype dtype() const { return static_cast<PackedDtype>(header_.dtype); }
  int64_t numel() const { return static_cast<int64_t>(header_.numel); }
  int64_t num_blocks() const { return header_.num_blocks; }

  int64_t count(int64_t block) const { return static_cast<int64_t>((descriptor(block) >> 34) & 0x7fff); }

  // Its bits, whatever they are; none, of a mode that there is not, where the descriptor is damaged.
  PackedBlock block(int64_t block) const {
    const uint64_t fields = descriptor(block);
    const int64_t offset = static_cast<int64_t>(fields & ((uint64_t{1} << 34) - 1)) * 4;
    const int64_t left = numel() - block * kTernaryBlock;
    const bool damaged = offset > payload_bytes_ || fields >> 56 != 0;
    return {.bytes = bytes_ + header_.payload_offset + (damaged ? 0 : offset),
            .num_bits = (payload_bytes_ - (damaged ? payload_bytes_ : offset)) * 8,
            .size = left < kTernaryBlock ? left : kTernaryBlock,
            .count = count(block),
            .mode = static_cast<PackedMode>(damaged ? 7 : (fields >> 49) & 7),
            .k = static_cast<int>((fields >> 52) & 15)};
  }

  // Calls decode(block), which returns whether it is whole, for all blocks. Throws where one is not, and before that where
  // the checksum is not that of the bytes.
  template <class F>
  void decode_all(const F& decode) const {
    MOE_CHECK(packed_crc(bytes_, size_) == header_.crc,
              "decompress: the packed task vector is damaged: its checksum does not match");
    std::atomic<int64_t> damaged{-1}, nnz{0};
    parallel_ranges(num_blocks(), kPackedBlocksPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        if (!decode(b)) damaged = b;
        nnz += count(b);
      }
    });
    MOE_CHECK(damaged < 0 && nnz == static_cast<int64_t>(header_.nnz), "decompress: block ", damaged.load(),
              " of the packed task vector is damaged");
  }

  // Planes of a block, and of kind 1 `value t` of what they have. False where its bytes are damaged; nothing is then of use.
  template <class T>
  bool decode(int64_t index, acc_t<T> value, uint64_t* planes, acc_t<T>* terms) const {
    const PackedBlock bits = block(index);
    const int64_t end = task_vector_kernel_table().codec.decode_block(bits, planes);
    if (end < 0 || kind() == PackedKind::ternary) return end >= 0;
    const int64_t begin = (end + 31) / 32 * 4;
    return begin + bits.count * packed_itemsize(dtype()) <= bits.num_bits / 8 &&
           task_vector_kernels<T>().decode_magnitudes(bits.bytes + begin, dtype(), bits.size, planes, value, terms);
  }

 private:
  uint64_t descriptor(int64_t block) const {
    uint64_t fields;
    std::memcpy(&fields, bytes_ + sizeof header_ + 8 * block, sizeof fields);
    return fields;
  }

  const uint8_t* bytes_;
  int64_t size_, payload_bytes_;
  PackedHeader header_;
};

}  // namespace moe
