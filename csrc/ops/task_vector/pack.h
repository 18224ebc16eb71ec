// The packed format written from bit planes; docs/task_vector_format.md.
#pragma once

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/workspace.h"
#include "ops/task_vector/packed.h"

namespace moe {

inline int64_t num_elements(const std::vector<int64_t>& shape) {
  MOE_CHECK(shape.size() <= 7, "compress: a tensor must have at most 7 dimensions");
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  return numel;
}

// What a header says beside what the planes do.
struct PackedFields {
  std::vector<int64_t> shape;
  PackedKind kind = PackedKind::ternary;
  PackedDtype dtype = PackedDtype::none;
  double scale = 1, sigma = 0;
  int64_t base_hash = 0;
};

// extra_bytes(block, count): how many there are beside the positions and signs, which write_extra(block, count, out)
// writes; a multiple of 4. `like` says where the result is made.
template <class Bytes, class Write>
Tensor pack_blocks(const Tensor& like, const uint64_t* planes, const PackedFields& fields, const Bytes& extra_bytes,
                   const Write& write_extra) {
  const int64_t numel = num_elements(fields.shape), num_blocks = (numel + kTernaryBlock - 1) / kTernaryBlock;
  const TernaryCodecKernels& codec = task_vector_kernel_table().codec;
  const auto size = [&](int64_t b) { return std::min(kTernaryBlock, numel - b * kTernaryBlock); };
  std::vector<PackedChoice> choices(static_cast<size_t>(num_blocks));
  parallel_ranges(num_blocks, kPackedBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      choices[static_cast<size_t>(b)] = codec.choose_block(planes + b * kPlaneWords, size(b));
  });
  PackedHeader header{};
  std::memcpy(header.magic, kPackedMagic, sizeof kPackedMagic);
  header.numel = static_cast<uint64_t>(numel);
  header.log2_block = 12;
  header.num_blocks = static_cast<uint32_t>(num_blocks);
  header.scale = static_cast<float>(fields.scale);
  header.sigma = static_cast<float>(fields.sigma);
  header.kind = static_cast<uint32_t>(fields.kind);
  header.dtype = static_cast<uint32_t>(fields.dtype);
  const int64_t payload = round_up_64(static_cast<int64_t>(sizeof header) + 8 * num_blocks);
  header.payload_offset = static_cast<uint64_t>(payload);
  header.base_hash = static_cast<uint64_t>(fields.base_hash);
  header.ndim = static_cast<uint32_t>(fields.shape.size());
  for (size_t i = 0; i < fields.shape.size(); ++i) header.shape[i] = static_cast<uint64_t>(fields.shape[i]);
  const auto position_bytes = [](const PackedChoice& choice) { return (choice.num_bits + 31) / 32 * 4; };
  std::vector<int64_t> offsets(static_cast<size_t>(num_blocks) + 1);
  for (size_t b = 0; b < choices.size(); ++b) {
    offsets[b + 1] = offsets[b] + position_bytes(choices[b]) + extra_bytes(static_cast<int64_t>(b), choices[b].count);
    header.nnz += static_cast<uint64_t>(choices[b].count);
  }
  const int64_t total = round_up_64(payload + offsets.back() + kSpareBytes);
  Tensor packed = torch::stable::new_empty(like, {total}, ScalarType::Byte);
  uint8_t* bytes = mutable_data<uint8_t>(packed);
  std::memcpy(bytes, &header, sizeof header);
  fill_zero(bytes + sizeof header, payload - static_cast<int64_t>(sizeof header));
  fill_zero(bytes + payload + offsets.back(), total - payload - offsets.back());
  parallel_ranges(num_blocks, kPackedBlocksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const PackedChoice& choice = choices[static_cast<size_t>(b)];
      const int64_t offset = offsets[static_cast<size_t>(b)];
      const uint64_t descriptor = static_cast<uint64_t>(offset / 4) | static_cast<uint64_t>(choice.count) << 34 |
                                  static_cast<uint64_t>(choice.mode) << 49 | static_cast<uint64_t>(choice.k) << 52;
      std::memcpy(bytes + sizeof header + 8 * b, &descriptor, sizeof descriptor);
      codec.encode_block(planes + b * kPlaneWords, size(b), choice, bytes + payload + offset);
      if (choice.count > 0) write_extra(b, choice.count, bytes + payload + offset + position_bytes(choice));
    }
  });
  const uint32_t crc = packed_crc(bytes, total);
  std::memcpy(bytes + kCrcOffset, &crc, sizeof crc);
  return packed;
}

}  // namespace moe
