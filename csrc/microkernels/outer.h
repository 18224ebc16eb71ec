// c[m, n] = sum_k a[m][k] * b[k][n]: the right operand contiguous along n, as weights are when the sum runs over their
// outer dimension (transposed layouts, and the gradient of the rows).
//
// Up to kFewSteppedRows rows of a (decode) do not repay packing: outer_few streams b as it lies and keeps sums in L1. Same
// chains, same bits.
#pragma once

#include "microkernels/panels.h"

namespace moe::MOE_ISA {

constexpr int64_t kFewSteppedRows = 4;

// outer for kM rows that are not packed; `chunk_sums` holds kM rows of whole strips.
template <class T, int kM>
static void outer_few(const T* const* a, const T* b, int64_t b_step_stride, int64_t n, int64_t k, acc_t<T>* c,
                      int64_t ldc, acc_t<T>* chunk_sums) {
  using Operand = OuterOperand<T>;
  constexpr int kDepth = Operand::kDepth, kVectors = Operand::kStripVectors, kN = kLanes<acc_t<T>>;
  constexpr int64_t kStrip = kVectors * kN, kStride = kMaxOuterBlock + kStrip;
  constexpr int kGroup = 4;  // packed steps between a load and a store of chunk_sums
  static_assert(kChunk % (kGroup * kDepth) == 0);
  for (int64_t k0 = 0; k0 < k; k0 += kGroup * kDepth) {
    const bool chunk_begins = k0 % kChunk == 0;
    const int64_t depth = k - k0 < kGroup * kDepth ? k - k0 : kGroup * kDepth;
    const bool chunk_ends = k0 + depth == k || (k0 + depth) % kChunk == 0;
    typename Operand::Packed packed_a[kM][kGroup];
    for (int m = 0; m < kM; ++m) Operand::pack_along(a[m] + k0, depth, packed_a[m]);
    for (int64_t column = 0; column < n; column += kStrip) {
      Vec<acc_t<T>> sum[kM][kVectors];
      for (int m = 0; m < kM; ++m)
        for (int v = 0; v < kVectors; ++v)
          sum[m][v] = chunk_begins ? Vec<acc_t<T>>{} : load(chunk_sums + m * kStride + column + v * kN);
      const int64_t width = n - column < kStrip ? n - column : kStrip;
      for (int64_t step = 0; step * kDepth < depth; ++step) {
        const T* row = b + (k0 + step * kDepth) * b_step_stride + column;
        const T* next = kDepth == 2 && step * kDepth + 1 < depth ? row + b_step_stride : nullptr;
        // the rows of the next group: a strip is one cache line of each, too short for the hardware to see a stream
        for (int d = 0; d < kDepth; ++d)
          __builtin_prefetch(reinterpret_cast<const void*>(
              reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>((kGroup * kDepth + d) * b_step_stride) * sizeof(T)));
        typename Operand::Reg w[kVectors];
        if (width == kStrip) {
          Operand::load_strip(row, next, w);
        } else {
          T padded[2][kStrip] = {};
          std::memcpy(static_cast<void*>(padded[0]), row, static_cast<size_t>(width) * sizeof(T));
          if (next != nullptr) std::memcpy(static_cast<void*>(padded[1]), next, static_cast<size_t>(width) * sizeof(T));
          Operand::load_strip(padded[0], padded[1], w);
        }
        for (int m = 0; m < kM; ++m) {
          const typename Operand::Reg x = Operand::broadcast_packed(&packed_a[m][step]);
          for (int v = 0; v < kVectors; ++v) sum[m][v] = Operand::multiply_add(sum[m][v], x, w[v]);
        }
      }
      if (chunk_ends)
        for (int m = 0; m < kM; ++m) Operand::restore_order(sum[m]);
      for (int m = 0; m < kM; ++m)
        for (int v = 0; v < kVectors; ++v) store(chunk_sums + m * kStride + column + v * kN, sum[m][v]);
    }
    for (int m = 0; m < kM && chunk_ends; ++m)
      for (int64_t i = 0; i < n; ++i)
        c[m * ldc + i] = k0 < kChunk ? chunk_sums[m * kStride + i] : c[m * ldc + i] + chunk_sums[m * kStride + i];
  }
}

// See Microkernels::outer.
template <class T>
static void outer(const T* const* a, int64_t m, const T* b, int64_t b_step_stride, int64_t n, int64_t k, acc_t<T>* c,
                  int64_t ldc, void* scratch) {
  if (k == 0) return fill_zero_rows<T>(c, m, n, ldc);
  static_assert(kFewSteppedRows == 4);
  if (m > kFewSteppedRows) {
    const PanelBlock<T, StepMajor<T>> block{{b, b_step_stride}, 0, n, c};
    return multiply_panels<T>(a, m, &block, 1, k, ldc, {}, scratch);
  }
  acc_t<T>* chunk_sums = static_cast<acc_t<T>*>(scratch);
  for (int64_t j = 0; j < n; j += kMaxOuterBlock) {
    const int64_t width = n - j < kMaxOuterBlock ? n - j : kMaxOuterBlock;
    switch (m) {
      case 1: outer_few<T, 1>(a, b + j, b_step_stride, width, k, c + j, ldc, chunk_sums); break;
      case 2: outer_few<T, 2>(a, b + j, b_step_stride, width, k, c + j, ldc, chunk_sums); break;
      case 3: outer_few<T, 3>(a, b + j, b_step_stride, width, k, c + j, ldc, chunk_sums); break;
      case 4: outer_few<T, 4>(a, b + j, b_step_stride, width, k, c + j, ldc, chunk_sums); break;
    }
  }
}

}  // namespace moe::MOE_ISA
