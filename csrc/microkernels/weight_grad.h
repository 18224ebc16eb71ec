// A block of a weight gradient: out[i, j] = sum over rows of a[row][i] * b[row][j], both operands contiguous along the
// result, so both are packed step by step.
//
// With up to kChunk rows an expert the results go from registers straight to the gradient. It is written once and usually
// larger than the caches: whole cache lines are then stored past them, which spares reading each line first.
#pragma once

#include "microkernels/panels.h"

namespace moe::MOE_ISA {

// See Microkernels::weight_grad.
template <class T>
static void weight_grad(const T* const* a, int64_t a_column, int64_t an, const T* const* b, int64_t b_column, int64_t bn,
                        int64_t m, T* out, int64_t out_row_stride, bool stream, void* scratch) {
  using Packed = typename OuterOperand<T>::Packed;
  constexpr int64_t kSteps = kChunk / OuterOperand<T>::kDepth;
  if (m == 0) {
    for (int64_t row = 0; row < an; ++row)
      std::memset(static_cast<void*>(out + row * out_row_stride), 0, static_cast<size_t>(bn) * sizeof(T));
    return;
  }
  const auto aligned = [](int64_t bytes) { return bytes % kCacheLine == 0; };
  stream = stream && kCanStream<T> && aligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kCacheLine)) &&
           aligned(out_row_stride * static_cast<int64_t>(sizeof(T)));
  Packed* packed_a = static_cast<Packed*>(scratch);
  Packed* packed_b = packed_a + kSteps * kPackedStride;
  acc_t<T>* sums = reinterpret_cast<acc_t<T>*>(packed_b + kSteps * kPackedStride);
  for (int64_t m0 = 0; m0 < m; m0 += kChunk) {
    const int64_t depth = m - m0 < kChunk ? m - m0 : kChunk, steps = ceil_div(depth, OuterOperand<T>::kDepth);
    pack_columns<T>([&](int64_t row) { return a[m0 + row] + a_column; }, depth, an, an, kPackedStride, packed_a);
    for (int64_t j = 0; j < bn; j += kPanel<T>) {
      const int64_t width = bn - j < kPanel<T> ? bn - j : kPanel<T>;
      pack_columns<T>([&](int64_t row) { return b[m0 + row] + b_column + j; }, depth, width, kPanel<T>, kPanel<T>, packed_b);
      TileResult<T> result{.sums = sums + j, .sums_stride = kMaxOuterBlock, .width = width, .first = m0 == 0};
      if (m0 + kChunk >= m) {
        result.out = out + j;
        result.out_stride = out_row_stride;
        result.stream = stream;
      }
      outer_rows<T>(packed_a, 1, kPackedStride, an, packed_b, steps, result, {});
    }
  }
  if (stream) stream_fence();
}

}  // namespace moe::MOE_ISA
