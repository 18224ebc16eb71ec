// Rows of x times panels of weights, whatever the weights' layout: each source turns its memory into panels of kPanel
// columns, a chunk of kChunk steps and kPanels panels at a time, just before their tiles run: they are still in L1 or L2.
//
// Turning costs about half a cycle a weight (Zen 3), as much as the multiply-adds of 8 rows of x. Rows of x are packed
// beside each other: where they lie a multiple of 4 KiB apart they would meet in the same sets of L1.
#pragma once

#include "microkernels/tile.h"

namespace moe::MOE_ISA {

// From one packed step of a weight gradient's left operand to the next: not a power of two, since a tile reads one cache
// line of each step and they must not meet in the same sets of L1.
constexpr int64_t kPackedStride = kMaxOuterBlock + 16;

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
  // Packed together, so that each step is read in runs of 256 bytes or more: one panel's 64 bytes a page are the worst
  // that can be asked of DRAM and of the TLB.
  static constexpr int kPanels = 4;
  const T* b;
  int64_t step_stride;

  __attribute__((always_inline)) const Panel* panels(int64_t column, int64_t width, int64_t k0, int64_t depth,
                                                     Panel* out) const {
    constexpr int kDepth = OuterOperand<T>::kDepth;
    const int64_t stride = panel_stride(ceil_div(depth, kDepth));
    for (int64_t step = 0; step < depth; step += kDepth, out += kPanel<T>) {
      const T* row = b + (k0 + step) * step_stride + column;
      const int rows = depth - step < kDepth ? 1 : kDepth;
      for (int64_t j = 0; j < width; j += kPanel<T>) {
        const T* pair[2] = {row + j, row + j + (rows - 1) * step_stride};
        Panel* panel = out + j / kPanel<T> * stride;
        if (width - j >= kPanel<T>) {  // a constant width: no loop
          OuterOperand<T>::pack(pair, rows, panel, kPanel<T>);
        } else {
          OuterOperand<T>::pack(pair, rows, panel, width - j);
          std::memset(static_cast<void*>(panel + width - j), 0, static_cast<size_t>(kPanel<T> - width + j) * sizeof *panel);
        }
      }
    }
    return out - ceil_div(depth, kDepth) * kPanel<T>;
  }
  // a step's stores to all panels would meet in one set of L1 if panels were whole multiples of 4 KiB
  static constexpr int64_t panel_stride(int64_t steps) { return (steps + 1) * kPanel<T>; }
  // The rows that the next panels are made of. (Zen 3, one thread, backward of 2048 x 768 x 32 experts of 32 rows: 36
  // GFLOP/s without fetching them ahead, 40 with.)
  __attribute__((always_inline)) Fetch fetch(int64_t column, int64_t width, int64_t k0, int64_t depth) const {
    const int64_t lines = ceil_div(width * static_cast<int64_t>(sizeof(T)), kCacheLine);
    return {.begin = reinterpret_cast<uintptr_t>(b + k0 * step_stride + column),
            .run_lines = lines,
            .run_stride = step_stride * static_cast<int64_t>(sizeof(T)),
            .end = depth * lines};
  }
};

// `n` columns of the result.
template <class T, class Source>
struct PanelBlock {
  Source source;
  int64_t column, n;  // the first of them in the source, and how many
  acc_t<T>* c;
};

// c[m, j] = sum_k a[m][k] * b[k][column + j] for all blocks. `after` is fetched at the end.
template <class T, class Source>
static void multiply_panels(const T* const* a, int64_t m, const PanelBlock<T, Source>* blocks, int64_t num_blocks, int64_t k,
                            int64_t ldc, const Fetch& after, void* scratch) {
  using Packed = typename OuterOperand<T>::Packed;
  constexpr int64_t kSteps = kChunk / OuterOperand<T>::kDepth, kGroup = Source::kPanels * kPanel<T>;
  Packed* packed_a = static_cast<Packed*>(scratch);
  Packed* panel_scratch = packed_a + kSteps * kPackedStride;
  for (int64_t k0 = 0; k0 < k; k0 += kChunk) {
    const int64_t depth = at_most(k - k0, kChunk), steps = ceil_div(depth, OuterOperand<T>::kDepth);
    pack_rows<T>(a, m, k0, depth, packed_a, kSteps);
    for (int64_t i = 0; i < num_blocks; ++i) {
      const PanelBlock<T, Source>& block = blocks[i];
      for (int64_t group = 0; group < block.n; group += kGroup) {
        const int64_t width = at_most(block.n - group, kGroup), next = group + kGroup;
        Fetch fetch = after;
        if (next < block.n)
          fetch = block.source.fetch(block.column + next, at_most(block.n - next, kGroup), k0, depth);
        else if (i + 1 < num_blocks)
          fetch = blocks[i + 1].source.fetch(blocks[i + 1].column, at_most(blocks[i + 1].n, kGroup), k0, depth);
        else if (k0 + kChunk < k)
          fetch = blocks[0].source.fetch(blocks[0].column, at_most(blocks[0].n, kGroup), k0 + kChunk,
                                         at_most(k - k0 - kChunk, kChunk));
        const auto* panels = block.source.panels(block.column + group, width, k0, depth, panel_scratch);
        const int64_t num_panels = ceil_div(width, kPanel<T>);
        for (int64_t p = 0; p < num_panels; ++p) {
          const int64_t j = p * kPanel<T>;
          const TileResult<T> result{.sums = block.c + group + j,
                                     .sums_stride = ldc,
                                     .width = at_most(width - j, kPanel<T>),
                                     .first = k0 == 0};
          outer_rows<T>(packed_a, kSteps, 1, m, panels + p * Source::panel_stride(steps), steps, result,
                        fetch.part(p, num_panels));
        }
      }
    }
  }
}

// One chunk of packed rows, panels or a chunk of the other operand, and a block of sums.
template <class T>
constexpr int64_t kScratchBytes =
    2 * kChunk / OuterOperand<T>::kDepth * kPackedStride * sizeof(typename OuterOperand<T>::Packed) +
    kMaxOuterBlock * kMaxOuterBlock * sizeof(acc_t<T>);

}  // namespace moe::MOE_ISA
