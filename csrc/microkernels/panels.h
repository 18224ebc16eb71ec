// Rows of x times panels of weights, whatever the weights' layout: each source turns its memory into panels of kPanel
// columns, a chunk of kChunk steps at a time, just before the panel's tiles run, so that the panel is still in L1.
//
// Turning costs about 0.3 cycles a weight and each row of x brings kPanel / 16 multiply-adds of 16 lanes to it, so a few
// rows repay it. Rows of x are packed beside each other: where they lie a multiple of 4 KiB apart they would meet in the
// same sets of L1.
#pragma once

#include "microkernels/tile.h"

namespace moe::MOE_ISA {

// Rows [0, num_rows) of a packed beside each other, `a_stride` apart.
template <class T>
static void pack_rows(const T* const* a, int64_t num_rows, int64_t k0, int64_t depth,
                      typename OuterOperand<T>::Packed* packed, int64_t a_stride) {
  for (int64_t row = 0; row < num_rows; ++row) OuterOperand<T>::pack_along(a[row] + k0, depth, packed + row * a_stride);
}

// `width` columns of rows row_at(0 … num_rows), each packed step `stride` behind the one before it; columns from width to
// padded_width are zero.
template <class T, class RowAt>
static void pack_columns(const RowAt& row_at, int64_t num_rows, int64_t width, int64_t padded_width, int64_t stride,
                         typename OuterOperand<T>::Packed* out) {
  constexpr int kDepth = OuterOperand<T>::kDepth;
  for (int64_t row = 0; row < num_rows; row += kDepth, out += stride) {
    const T* pair[2] = {row_at(row), nullptr};
    const bool both = kDepth == 2 && row + 1 < num_rows;
    if (both) pair[1] = row_at(row + 1);
    OuterOperand<T>::pack(pair, both ? 2 : 1, out, width);
    if (width < padded_width)
      std::memset(static_cast<void*>(out + width), 0, static_cast<size_t>(padded_width - width) * sizeof *out);
  }
}

// Weights whose steps are rows in memory: transposed layouts, and every matrix as the gradient of its input sees it.
template <class T>
struct StepMajor {
  using Panel = typename OuterOperand<T>::Packed;
  const T* b;
  int64_t step_stride;

  const Panel* panel(int64_t column, int64_t width, int64_t k0, int64_t depth, Panel* scratch) const {
    pack_columns<T>([&](int64_t step) { return b + (k0 + step) * step_stride + column; }, depth, width, kPanel<T>,
                    kPanel<T>, scratch);
    return scratch;
  }
  Fetch fetch(int64_t column, int64_t k0) const {
    constexpr int64_t kSteps = kFetchSteps<T> * OuterOperand<T>::kDepth;
    const int64_t bytes = step_stride * static_cast<int64_t>(sizeof(T));
    return {reinterpret_cast<uintptr_t>(b + column) + static_cast<uintptr_t>(k0 * bytes), bytes, kSteps, kSteps * bytes};
  }
};

// `n` columns of the result.
template <class T, class Source>
struct PanelBlock {
  Source source;
  int64_t column, n;  // the first of them in the source, and how many
  acc_t<T>* c;
};

// c[m, j] = sum_k a[m][k] * b[k][column + j] for all blocks. `after` is fetched during the last panel.
template <class T, class Source>
static void multiply_panels(const T* const* a, int64_t m, const PanelBlock<T, Source>* blocks, int64_t num_blocks, int64_t k,
                            int64_t ldc, const Fetch& after, void* scratch) {
  using Packed = typename OuterOperand<T>::Packed;
  constexpr int64_t kSteps = kChunk / OuterOperand<T>::kDepth;
  Packed* packed_a = static_cast<Packed*>(scratch);
  Packed* panel_scratch = packed_a + kSteps * kMaxOuterBlock;
  for (int64_t k0 = 0; k0 < k; k0 += kChunk) {
    const int64_t depth = k - k0 < kChunk ? k - k0 : kChunk, steps = ceil_div(depth, OuterOperand<T>::kDepth);
    pack_rows<T>(a, m, k0, depth, packed_a, kSteps);
    for (int64_t i = 0; i < num_blocks; ++i) {
      const PanelBlock<T, Source>& block = blocks[i];
      for (int64_t j = 0; j < block.n; j += kPanel<T>) {
        Fetch fetch = after;
        if (j + kPanel<T> < block.n)
          fetch = block.source.fetch(block.column + j + kPanel<T>, k0);
        else if (i + 1 < num_blocks)
          fetch = blocks[i + 1].source.fetch(blocks[i + 1].column, k0);
        else if (k0 + kChunk < k)
          fetch = blocks[0].source.fetch(blocks[0].column, k0 + kChunk);
        const int64_t width = block.n - j < kPanel<T> ? block.n - j : kPanel<T>;
        const auto* panel = block.source.panel(block.column + j, width, k0, depth, panel_scratch);
        const TileResult<T> result{.sums = block.c + j, .sums_stride = ldc, .width = width, .first = k0 == 0};
        outer_rows<T>(packed_a, kSteps, 1, m, panel, steps, result, fetch);
      }
    }
  }
}

template <class T>
static void fill_zero_rows(acc_t<T>* c, int64_t m, int64_t n, int64_t ldc) {
  for (int64_t row = 0; row < m; ++row)
    std::memset(static_cast<void*>(c + row * ldc), 0, static_cast<size_t>(n) * sizeof *c);
}

// One chunk of packed rows, one panel (or, for a weight gradient, a chunk of panels), and a block of sums.
template <class T>
constexpr int64_t kScratchBytes =
    2 * kChunk / OuterOperand<T>::kDepth * kMaxOuterBlock * sizeof(typename OuterOperand<T>::Packed) +
    kMaxOuterBlock * kMaxOuterBlock * sizeof(acc_t<T>);

}  // namespace moe::MOE_ISA
