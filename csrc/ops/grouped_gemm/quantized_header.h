// Reads and checks what python/moe_kernels/ops/quantize/quantized.py writes: a row of bytes for each expert, a header first.
#pragma once

#include <cstring>

#include "common/dispatch.h"
#include "microkernels/quantized.h"

namespace moe {

// [num_experts, expert_bytes] bytes. Every size is computed from the header and compared with the tensor's before a code
// or a scale is read.
struct QuantizedHeader {
  static constexpr int64_t kMagic = 0x4d4f45515741;  // "MOEQWA"
  static constexpr int64_t kVersion = 1;

  int64_t magic, version, format, group_size, num_splits, interleaved, out, in;

  int64_t words(int64_t steps) const {
    const int64_t codes = 32 / code_bits(static_cast<QuantizedFormat>(format));
    return (steps + codes - 1) / codes;
  }
  int64_t panels() const { return (out / num_splits + kQuantizedPanel - 1) / kQuantizedPanel; }  // of a split
  int64_t panel_bytes() const {
    const int64_t groups = (in + group_size - 1) / group_size;
    return kQuantizedPanel * (groups * scale_bytes(static_cast<QuantizedFormat>(format)) + 4 * words(in));
  }
  int64_t expert_bytes() const { return static_cast<int64_t>(sizeof *this) + num_splits * panels() * panel_bytes(); }

  static QuantizedHeader read(const char* op, const Tensor& weights) {
    constexpr int64_t kBytes = sizeof(QuantizedHeader);
    MOE_CHECK(weights.dim() == 2 && weights.size(1) >= kBytes && weights.stride(1) == 1, op,
              ": quantised weights must be the bytes that quantize made, [num_experts, expert_bytes]");
    QuantizedHeader header{kMagic, kVersion, 0, 1, 1, 0, 0, 0};
    const auto bytes = [&](int64_t expert) { return data<uint8_t>(weights) + expert * weights.stride(0); };
    if (weights.size(0) > 0) std::memcpy(&header, bytes(0), sizeof header);
    MOE_CHECK(header.magic == kMagic, op, ": quantised weights must begin with their header; call quantize again");
    MOE_CHECK(header.version == kVersion, op, ": quantised weights must be of layout version ", kVersion, ", got ",
              header.version, "; call quantize again");
    constexpr int64_t kMost = int64_t{1} << 31;
    const auto is_size = [](int64_t size) { return 0 <= size && size < kMost; };
    MOE_CHECK(0 <= header.format && header.format <= static_cast<int64_t>(QuantizedFormat::mxfp4) && is_size(header.out) &&
                  is_size(header.in) && is_size(header.group_size) && header.group_size > 0 &&
                  (header.group_size % 8 == 0 || header.group_size >= header.in) &&
                  (header.num_splits == 1 || header.num_splits == 2) && header.out % header.num_splits == 0,
              op, ": quantised weights must have a header with sizes that fit each other; call quantize again");
    for (int64_t expert = 1; expert < weights.size(0); ++expert)
      MOE_CHECK(std::memcmp(&header, bytes(expert), sizeof header) == 0, op,
                ": quantised weights must have one shape and format for all experts, but expert ", expert,
                " differs from expert 0");
    MOE_CHECK(weights.size(0) == 0 || header.expert_bytes() == weights.size(1), op, ": quantised weights [out=", header.out,
              ", in=", header.in, "] must have ", header.expert_bytes(), " bytes an expert, got ", weights.size(1));
    return header;
  }

  QuantizedMatrix matrix(const uint8_t* expert, int64_t split) const {
    return {.panels = expert + sizeof *this + split * panels() * panel_bytes(),
            .panel_bytes = panel_bytes(),
            .in = in,
            .group_size = group_size,
            .format = static_cast<QuantizedFormat>(format)};
  }
};
static_assert(sizeof(QuantizedHeader) == 64);

inline bool is_quantized(const Tensor& weights) { return weights.scalar_type() == ScalarType::Byte; }

}  // namespace moe
