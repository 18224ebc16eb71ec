// dot (see Microkernels::dot) for instruction sets with 16 registers: weights whose rows are contiguous along k are turned
// into panels, kLanes rows at a time, in registers.
//
// The untransposed form of dot.h leaves 16 registers no more than 3 x 4 vectors of sums: it would read each weight from L2
// again for every third row of x, 21 bytes a cycle at the peak, and convert it again (Zen 3, two threads, of 205 GFLOP/s:
// fp32 107, bf16 60). Panels are read from L1 and converted once.
//
// Up to kFewRows rows of x (decode) are multiplied as the weights are turned, without a panel in memory: same chains, same
// bits. Prepacked weights (kPanel rows, one step apart) are panels already.
#pragma once

#include "microkernels/panels.h"
#include "microkernels/transpose.h"

namespace moe::MOE_ISA {

// The next kSteps elements of kLanes rows: operator[](s) holds element s of each row.
template <class T>
struct Turned {
  using Acc = acc_t<T>;
  static constexpr int kN = kLanes<Acc>;
  static constexpr bool kPairs = __is_same(T, bf16);  // two bf16 turn as one 32-bit lane
  static constexpr int kSteps = kPairs ? 2 * kN : kN;
  Vec<Acc> columns[kN];

  __attribute__((always_inline)) void load_rows(const T* rows, int64_t row_stride) {
    if constexpr (kPairs || sizeof(T) == sizeof(Acc)) {
      load_transposed<Acc>(rows, row_stride * static_cast<int64_t>(sizeof(T)), columns);
    } else {
      for (int r = 0; r < kN; ++r) columns[r] = load_converted(rows + r * row_stride);
      transpose<Acc>(columns);
    }
  }
  // num_rows and depth may lie below kN and kSteps, or beyond; what is missing is zero
  __attribute__((always_inline)) void load(const T* rows, int64_t row_stride, int64_t num_rows, int64_t depth) {
    if (num_rows >= kN && depth >= kSteps) return load_rows(rows, row_stride);
    T padded[kN][kSteps] = {};
    for (int64_t r = 0; r < kN && r < num_rows; ++r)
      for (int64_t s = 0; s < kSteps && s < depth; ++s) padded[r][s] = rows[r * row_stride + s];
    load_rows(padded[0], kSteps);
  }
  __attribute__((always_inline)) Vec<Acc> operator[](int s) const {
    if constexpr (!kPairs)
      return columns[s];
    else if (s % 2 == 0)
      return (Vec<Acc>)((VecU32)columns[s / 2] << 16);
    else
      return (Vec<Acc>)((VecU32)columns[s / 2] & 0xffff0000u);
  }
};

// Elements of a cache line. A line of each of kLanes rows is used up before the next rows are touched: rows that lie a
// multiple of 4 KiB apart share a set of L1, which holds 8 lines and not the 16 of a panel.
template <class T>
constexpr int64_t kLineSteps = kCacheLine / static_cast<int64_t>(sizeof(T));

template <class T>
struct RowMajor {
  using Panel = acc_t<T>;
  static constexpr int kPanels = 1;
  static constexpr int64_t panel_stride(int64_t) { return 0; }
  DotWeights<T> weights;

  __attribute__((always_inline)) const Panel* panels(int64_t column, int64_t width, int64_t k0, int64_t depth,
                                                     Panel* out) const {
    constexpr int kN = kLanes<Panel>;
    const T* rows = weights.row(column) + k0;
    for (int64_t line = 0; line < depth; line += kLineSteps<T>)
#pragma GCC unroll 8
      for (int v = 0; v < kOuterVectors; ++v)
#pragma GCC unroll 8
        for (int64_t step = line; step < line + kLineSteps<T>; step += Turned<T>::kSteps) {
          Turned<T> turned;
          turned.load(rows + v * kN * weights.row_stride + step, weights.row_stride, width - v * kN, depth - step);
#pragma GCC unroll 16
          for (int s = 0; s < Turned<T>::kSteps; ++s) store(out + (step + s) * kPanel<T> + v * kN, turned[s]);
        }
    return out;
  }
  __attribute__((always_inline)) Fetch fetch(int64_t column, int64_t width, int64_t k0, int64_t depth) const {
    const int64_t lines = ceil_div(depth, kLineSteps<T>);
    return {reinterpret_cast<uintptr_t>(weights.row(column) + k0), lines,
            weights.row_stride * static_cast<int64_t>(sizeof(T)), 0, width * lines};
  }
};

template <class T>
struct Prepacked {
  using Panel = T;
  static constexpr int kPanels = 1;
  static constexpr int64_t panel_stride(int64_t) { return 0; }
  DotWeights<T> weights;

  __attribute__((always_inline)) const T* panels(int64_t column, int64_t, int64_t k0, int64_t, acc_t<T>*) const {
    return weights.row(column) + k0 * kPanel<T>;
  }
  __attribute__((always_inline)) Fetch fetch(int64_t column, int64_t, int64_t k0, int64_t depth) const {
    const int64_t lines = ceil_div(depth * kPanel<T>, kLineSteps<T>);
    return {reinterpret_cast<uintptr_t>(weights.row(column) + k0 * kPanel<T>), lines, 0, 0, lines};
  }
};

// Prepacked weights of another precision, converted once for all tiles of a chunk.
template <class T>
struct ConvertedPrepacked : Prepacked<T> {
  using Panel = acc_t<T>;
  __attribute__((always_inline)) const Panel* panels(int64_t column, int64_t, int64_t k0, int64_t depth,
                                                     Panel* out) const {
    convert(this->weights.row(column) + k0 * kPanel<T>, out, depth * kPanel<T>);
    return out;
  }
};

constexpr int64_t kFewRows = 4;
constexpr int64_t kFewSteps = kChunk * kMaxOuterBlock / kFewRows;  // as many as the scratch memory holds

// Adds a chunk to total, for kM rows of packed a and the next kLanes rows of weights. The rows that follow them in memory
// are fetched in the order of their addresses. (Four chunks side by side would hide the latency of the multiply-adds, but
// as 32 streams they read DRAM at 14 GB/s and not 20: Zen 3, two threads.)
template <class T, int kM>
MOE_INLINE void add_chunk(const acc_t<T>* a, int64_t a_stride, const T* rows, int64_t row_stride, uintptr_t& prefetch,
                          Vec<acc_t<T>>* total) {
  constexpr int64_t kFetch = kLanes<acc_t<T>> * kCacheLine;
  Vec<acc_t<T>> sum[kM] = {};
  for (int64_t line = 0; line < kChunk; line += kLineSteps<T>, prefetch += kFetch) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kFetch; i += kCacheLine)
      __builtin_prefetch(reinterpret_cast<const void*>(prefetch + static_cast<uintptr_t>(i)), 0, 2);
#pragma GCC unroll 8
    for (int64_t step = line; step < line + kLineSteps<T>; step += Turned<T>::kSteps) {
      Turned<T> turned;
      turned.load_rows(rows + step, row_stride);
#pragma GCC unroll 16
      for (int s = 0; s < Turned<T>::kSteps; ++s)
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) sum[m] = broadcast(a[m * a_stride + step + s]) * turned[s] + sum[m];
    }
  }
  for (int m = 0; m < kM; ++m) total[m] += sum[m];
}

// The same for what is left: fewer steps than a chunk, or fewer rows of weights than lanes.
template <class T, int kM>
static void add_partial_chunk(const acc_t<T>* a, int64_t a_stride, const T* rows, int64_t row_stride, int64_t num_rows,
                              int64_t depth, Vec<acc_t<T>>* total) {
  Vec<acc_t<T>> sum[kM] = {};
  for (int64_t step = 0; step < depth; step += Turned<T>::kSteps) {
    Turned<T> turned;
    turned.load(rows + step, row_stride, num_rows, depth - step);
#pragma GCC unroll 16
    for (int s = 0; s < Turned<T>::kSteps; ++s) {
      if (step + s >= depth) break;
      for (int m = 0; m < kM; ++m) sum[m] = broadcast(a[m * a_stride + step + s]) * turned[s] + sum[m];
    }
  }
  for (int m = 0; m < kM; ++m) total[m] += sum[m];
}

// kM rows of packed a times num_rows (at most kLanes) rows of weights.
template <class T, int kM>
static void few_rows(const acc_t<T>* a, int64_t a_stride, const T* rows, int64_t row_stride, int64_t num_rows,
                     int64_t depth, uintptr_t prefetch, const TileResult<T>& result) {
  constexpr int kN = kLanes<acc_t<T>>;
  acc_t<T> columns[kN] = {};
  Vec<acc_t<T>> total[kM] = {};
  for (int m = 0; m < kM && !result.first; ++m) {
    std::memcpy(columns, result.sums + m * result.sums_stride, static_cast<size_t>(num_rows) * sizeof *columns);
    total[m] = load(columns);
  }
  int64_t k = 0;
  for (; num_rows == kN && k + kChunk <= depth; k += kChunk)
    add_chunk<T, kM>(a + k, a_stride, rows + k, row_stride, prefetch, total);
  for (; k < depth; k += kChunk)
    add_partial_chunk<T, kM>(a + k, a_stride, rows + k, row_stride, num_rows, depth - k < kChunk ? depth - k : kChunk, total);
  for (int m = 0; m < kM; ++m) {
    store(columns, total[m]);
    std::memcpy(result.sums + m * result.sums_stride, columns, static_cast<size_t>(num_rows) * sizeof *columns);
  }
}

template <class F>
MOE_INLINE void with_few_rows(int64_t m, const F& f) {
  static_assert(kFewRows == 4);
  switch (m) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
  }
}

template <class T>
static void dot_few(const T* const* a, int64_t m, const DotBlocks<T>& all, int64_t k, int64_t ldc,
                    const DotBlocks<T>& next, void* scratch) {
  acc_t<T>* packed_a = static_cast<acc_t<T>*>(scratch);
  for (int64_t k0 = 0; k0 < k; k0 += kFewSteps) {
    const int64_t depth = k - k0 < kFewSteps ? k - k0 : kFewSteps;
    pack_rows<T>(a, m, k0, depth, packed_a, depth);
    for (int64_t i = 0; i < all.num_blocks; ++i) {
      const DotBlock<T>& block = all.blocks[i];
      const DotWeights<T>& weights = block.weights;
      const bool prepacked = weights.panel_rows == kPanel<T>;
      const int64_t step = prepacked ? kPanel<T> : kLanes<acc_t<T>>;
      for (int64_t j = 0; j < block.n; j += step) {
        const int64_t width = block.n - j < step ? block.n - j : step;
        const TileResult<T> result{.sums = block.c + j, .sums_stride = ldc, .width = width, .first = k0 == 0};
        // in the order of addresses: the rows after these, of this block, the next or the caller's next
        const T* after = weights.row(block.column + j + step);
        if (j + step >= block.n && i + 1 < all.num_blocks)
          after = all.blocks[i + 1].weights.row(all.blocks[i + 1].column);
        else if (j + step >= block.n && next.num_blocks > 0)
          after = next.blocks[0].weights.row(next.blocks[0].column);
        const uintptr_t prefetch = reinterpret_cast<uintptr_t>(after);
        with_few_rows(m, [&]<int kM>() {
          if (!prepacked) {
            few_rows<T, kM>(packed_a, depth, weights.row(block.column + j) + k0, weights.row_stride, width, depth, prefetch,
                            result);
            return;
          }
          for (int64_t at = 0; at < depth; at += kChunk) {
            const T* panel = weights.row(block.column + j) + (k0 + at) * kPanel<T>;
            TileResult<T> chunk = result;
            chunk.first = k0 + at == 0;
            outer_tile<T, kM>(packed_a + at, depth, 1, panel, depth - at < kChunk ? depth - at : kChunk, chunk,
                              {});  // one stream, which the hardware follows by itself
          }
        });
      }
    }
  }
}

template <class T, class Source>
static void dot_from(const T* const* a, int64_t m, const DotBlocks<T>& all, int64_t k, int64_t ldc,
                     const DotBlocks<T>& next, void* scratch) {
  const auto panel_block = [](const DotBlock<T>& block) {
    return PanelBlock<T, Source>{Source{{block.weights}}, block.column, block.n, block.c};
  };
  PanelBlock<T, Source> panels[kMaxDotBlocks];
  for (int64_t i = 0; i < all.num_blocks; ++i) panels[i] = panel_block(all.blocks[i]);
  Fetch after;
  if (next.num_blocks > 0) {
    const PanelBlock<T, Source> first = panel_block(next.blocks[0]);
    after = first.source.fetch(first.column, kPanel<T>, 0, k < kChunk ? k : kChunk);
  }
  multiply_panels<T>(a, m, panels, all.num_blocks, k, ldc, after, scratch);
}

// See Microkernels::dot.
template <class T>
static void dot(const T* const* a, int64_t m, const DotBlocks<T>& all, int64_t k, int64_t ldc, const DotBlocks<T>& next,
                void* scratch) {
  if (k == 0) {
    for (int64_t i = 0; i < all.num_blocks; ++i) fill_zero_rows<T>(all.blocks[i].c, m, all.blocks[i].n, ldc);
  } else if (m <= kFewRows) {
    dot_few(a, m, all, k, ldc, next, scratch);
  } else if (all.blocks[0].weights.panel_rows != kPanel<T>) {
    dot_from<T, RowMajor<T>>(a, m, all, k, ldc, next, scratch);
  } else if (sizeof(T) == sizeof(acc_t<T>) || m <= 2 * kOuterTileM) {
    dot_from<T, Prepacked<T>>(a, m, all, k, ldc, next, scratch);
  } else {
    dot_from<T, ConvertedPrepacked<T>>(a, m, all, k, ldc, next, scratch);
  }
}

}  // namespace moe::MOE_ISA
