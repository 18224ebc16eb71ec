// Quantised expert weights as they lie in memory: the one layout that every instruction set reads.
//
// Of an expert [out, in], kQuantizedPanel rows (columns of the product) make a panel, read from its first byte to its
// last: for each group of steps along `in`, the rows' scales, then words of 32 bits, the rows side by side. A word holds
// the next 4 or 8 codes of one row: in its low half the even steps', in its high half the odd steps', each from the lowest
// bits up. So what a multiply-add of 16-bit pairs takes are two steps that follow each other. What a matrix does not fill
// is zero.
// python/moe_kernels/ops/quantize/quantized.py writes it and defines the header.
#pragma once

#include <cstdint>

namespace moe {

// Same order as FORMATS in python/moe_kernels/ops/quantize/quantized.py.
enum class QuantizedFormat : int64_t { int8, int4, fp8, mxfp4 };

constexpr int64_t kQuantizedPanel = 32;

// always_inline: read by code of every instruction set
__attribute__((always_inline)) inline int64_t code_bits(QuantizedFormat format) {
  return format == QuantizedFormat::int8 || format == QuantizedFormat::fp8 ? 8 : 4;
}
// float32 beside codes of 8 bits, bfloat16 beside those of 4
__attribute__((always_inline)) inline int64_t scale_bytes(QuantizedFormat format) { return code_bits(format) / 2; }

// The panels of one expert, or of its gate or its up rows.
struct QuantizedMatrix {
  const uint8_t* panels;
  int64_t panel_bytes;
  int64_t in, group_size;  // a multiple of 8, or at least `in`; the last group may be shorter
  QuantizedFormat format;

  __attribute__((always_inline)) const uint8_t* panel(int64_t column) const {
    return reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(panels) +
                                            static_cast<uintptr_t>(column / kQuantizedPanel * panel_bytes));
  }
};

// n columns of the result, from one that begins a panel: c[m, j] = sum_k a[m][k] * weight(column + j, k)
struct QuantizedBlock {
  QuantizedMatrix weights;
  int64_t column, n;
  float* c;
};

}  // namespace moe
