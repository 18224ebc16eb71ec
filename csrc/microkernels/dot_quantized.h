// dot for quantised weights (quantized.h): which of the two kinds of kernel reads a format.
#pragma once

#include "microkernels/dot_quantized_float.h"
#include "microkernels/dot_quantized_integer.h"

namespace moe::MOE_ISA {

// See Microkernels::dot_quantized.
template <class T>
static void dot_quantized(const T* const* a, int64_t m, const QuantizedBlock* blocks, int64_t num_blocks, int64_t ldc,
                          void* scratch) {
  if (blocks[0].weights.in == 0) {
    for (int64_t i = 0; i < num_blocks; ++i) fill_zero_rows<float>(blocks[i].c, m, blocks[i].n, ldc);
    return;
  }
  switch (blocks[0].weights.format) {
    case QuantizedFormat::int8:
      return dot_quantized_integer<T, Codec<QuantizedFormat::int8>>(a, m, blocks, num_blocks, ldc, scratch);
    case QuantizedFormat::int4:
      return dot_quantized_integer<T, Codec<QuantizedFormat::int4>>(a, m, blocks, num_blocks, ldc, scratch);
    case QuantizedFormat::fp8:
      return dot_quantized_float<T, Codec<QuantizedFormat::fp8>>(a, m, blocks, num_blocks, ldc, scratch);
    case QuantizedFormat::mxfp4:
      return dot_quantized_integer<T, Codec<QuantizedFormat::mxfp4>>(a, m, blocks, num_blocks, ldc, scratch);
  }
}

}  // namespace moe::MOE_ISA
