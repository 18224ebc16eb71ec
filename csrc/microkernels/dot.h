// c[m, n] = sum_k a[m][k] * b[n][k]: both operands contiguous along k, as rows of x and rows of a weight matrix are.
//
// No operand is packed. A tile keeps kTileM x kTileN vectors of partial sums, one for each result, and reads one vector
// of each row a step; lanes are added once at the end (3 instructions a result). Compared with the outer-product form
// the loads are as many (10 for 24 multiply-adds) and the weights' [out, in] layout needs no transposition.
//
// What will be needed is fetched into L2 meanwhile. One tile of rows (decode) reads each weight once, so it runs ahead in
// its own block, in the order of addresses: without that the four rows of a tile are four streams within a page or two,
// which the hardware prefetcher follows badly when rows are short (Zen 4, one core, weights from DRAM: 6 rows of x and 768
// columns 58 -> 206 GFLOP/s, 2048 columns 95 -> 121). Several tiles find their block in L2 after the first, so they fetch
// what follows it, the block's next chunk or the caller's next block, spread over the whole of the arithmetic, and the next
// tile's rows of x. (Zen 5, one thread, 2048 tokens, 2048 x 5632 x 8 experts: rows of x fetched 3 % bf16, 4 % fp32; 512
// tokens, 2048 x 768 x 128 experts, fp32, whose blocks have two chunks: next chunk and next block too, 145 -> 160 GFLOP/s.
// The same lines fetched in bursts before each tile of columns: 405 -> 363 GFLOP/s in the first shape, bf16.)
//
// A result is the sum of its chunks, in order; a chunk is one chain of multiply-adds in rising k and one fixed tree over
// lanes. The length of a chunk follows from k alone: a row's result has the same bits whatever rows are computed beside it.
#pragma once

#include "microkernels/dot_operand.h"
#include "microkernels/tile.h"

namespace moe::MOE_ISA {

// 24 sums fill AVX-512's 32 registers
constexpr int kDotTileM = 6;
constexpr int kDotTileN = 4;

template <class T>
static int64_t dot_chunk(int64_t k) {  // steps of k > 0 in a chunk; of nearly equal length
  constexpr int64_t kStep = DotOperand<T>::kStep;
  const int64_t chunks = ceil_div(k * static_cast<int64_t>(sizeof(T)), kDotChunkBytes);
  return ceil_div(ceil_div(k, chunks), kStep) * kStep;
}

// Steps [begin, begin + depth) of k; `first`: no earlier chunk's sums are in c.
struct DotChunk {
  int64_t begin, depth;
  bool first;
};

// A walk over memory that will be read soon: in each step of a tile kLines cache lines, `line_stride` bytes apart.
struct PrefetchWalk {
  uintptr_t at, line_stride, step;
};

template <class T, int kTileM, int kTileN, int kLines>
static void dot_tile(const T* const* a, const T* b, int64_t b_row_stride, int64_t b_step_stride, PrefetchWalk prefetch,
                     const DotChunk& chunk, acc_t<T>* c, int64_t ldc) {
  using Operand = DotOperand<T>;
  using Reg = typename Operand::Reg;
  Vec<acc_t<T>> sum[kTileM][kTileN] = {};
  const T* rows[kTileM];
  for (int m = 0; m < kTileM; ++m) rows[m] = a[m] + chunk.begin;
  b += chunk.begin / Operand::kStep * b_step_stride;
  const int64_t k = chunk.depth;
  int64_t i = 0;
  for (; i + Operand::kStep <= k; i += Operand::kStep, b += b_step_stride, prefetch.at += prefetch.step) {
    Reg x[kTileM];
#pragma GCC unroll 8
    for (int m = 0; m < kTileM; ++m) x[m] = Operand::load_step(rows[m] + i);
#pragma GCC unroll 8
    for (int line = 0; line < kLines; ++line)  // into L2, not L1, which rows of x need
      __builtin_prefetch(reinterpret_cast<const void*>(prefetch.at + line * prefetch.line_stride), 0, 2);
#pragma GCC unroll 8
    for (int n = 0; n < kTileN; ++n) {
      const Reg w = Operand::load_step(b + n * b_row_stride);
#pragma GCC unroll 8
      for (int m = 0; m < kTileM; ++m) sum[m][n] = Operand::multiply_add(sum[m][n], x[m], w);
    }
  }
  if (i < k) {
#pragma GCC unroll 8
    for (int n = 0; n < kTileN; ++n) {
      const Reg w = Operand::load_partial(b + n * b_row_stride, k - i);
#pragma GCC unroll 8
      for (int m = 0; m < kTileM; ++m)
        sum[m][n] = Operand::multiply_add(sum[m][n], Operand::load_partial(rows[m] + i, k - i), w);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTileM; ++m) {
    acc_t<T> sums[kTileN];
    if constexpr (kTileN % 4 == 0) {
#pragma GCC unroll 8
      for (int n = 0; n < kTileN; n += 4)
        reduce4<acc_t<T>>(sum[m][n], sum[m][n + 1], sum[m][n + 2], sum[m][n + 3], sums + n);
    } else {
      for (int n = 0; n < kTileN; ++n) sums[n] = reduce<acc_t<T>>(sum[m][n]);
    }
#pragma GCC unroll 8
    for (int n = 0; n < kTileN; ++n) c[m * ldc + n] = chunk.first ? sums[n] : c[m * ldc + n] + sums[n];
  }
}

template <class T, int kTileN, int kLines>
static void dot_rows(const T* const* a, int64_t m, const DotWeights<T>& weights, int64_t column, PrefetchWalk prefetch,
                     const DotChunk& chunk, acc_t<T>* c, int64_t ldc) {
  const auto tile = [&]<int kTileM>() {
    dot_tile<T, kTileM, kTileN, kLines>(a, weights.row(column), weights.row_stride, weights.step_stride, prefetch, chunk,
                                        c, ldc);
  };
  switch (m) {
    case 1: return tile.template operator()<1>();
    case 2: return tile.template operator()<2>();
    case 3: return tile.template operator()<3>();
    case 4: return tile.template operator()<4>();
    case 5: return tile.template operator()<5>();
    case 6: return tile.template operator()<6>();
  }
}

// Rows of x that lie a multiple of 4 KiB apart meet in the same few sets of the L1 cache: a tile's rows are then copied
// side by side, if its columns repay the copy. (Zen 4, 2048 bf16 columns, 11264 x 5632 experts: 317 -> 348 GFLOP/s.)
constexpr int64_t kAliasBytes = 4096;
constexpr int64_t kCopiedBytes = 48 * 1024;
constexpr int64_t kColumnsToCopy = 32;

template <class T>
static bool rows_alias(const T* const* a, int64_t height) {
  for (int64_t m = 1; m < height; ++m) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(a[0]), other = reinterpret_cast<uintptr_t>(a[m]);
    if (first != other && (first - other) % kAliasBytes == 0) return true;
  }
  return false;
}

// Cache lines of weights that a step of a whole tile reads.
template <class T>
constexpr int kStepLines =
    (kDotTileN * DotOperand<T>::kStep * static_cast<int>(sizeof(T)) + kCacheLine - 1) / static_cast<int>(kCacheLine);

// A single tile of rows fetches kPrefetchRows below `column`: in this block, the one after it, or the caller's next.
constexpr int64_t kPrefetchRows = 8;

template <class T>
static PrefetchWalk walk_ahead(const DotBlocks<T>& all, int64_t i, int64_t column, const DotBlocks<T>& next, int64_t steps) {
  const DotBlock<T>& block = all.blocks[i];
  const int64_t ahead = column + kPrefetchRows, past = ahead - (block.column + block.n);
  const DotBlock<T>* after = i + 1 < all.num_blocks ? &all.blocks[i + 1] : next.num_blocks > 0 ? &next.blocks[0] : nullptr;
  const T* at = past < 0 || after == nullptr ? block.weights.row(ahead) : after->weights.row(after->column + past);
  constexpr uintptr_t step = kStepLines<T> * kCacheLine;
  return {reinterpret_cast<uintptr_t>(at) + static_cast<uintptr_t>(steps) * step, kCacheLine, step};
}

// Several tiles of rows: what a tile fetches of what follows it, the next tile's rows of x and its share of the weights, in
// runs of a chunk's length: one, or two at once, by the steps of one tile of columns.
template <class T>
struct Coming {
  const T* const* rows;
  int64_t num_rows, row_begin;
  const DotBlocks<T>* weights;
  int64_t weights_begin, depth;        // in steps of k
  int64_t weight_row, num_weight_rows;  // this tile's share of the blocks' rows
  int64_t num_column_tiles;
  int64_t run = 0, due = 0;

  // always_inline as DotWeights::row is
  __attribute__((always_inline)) uintptr_t run_at(int64_t i) const {
    if (i < num_rows) return reinterpret_cast<uintptr_t>(rows[i] + row_begin);
    int64_t row = weight_row + i - num_rows;
    const DotBlock<T>* block = weights->blocks;
    for (; row >= block->n; ++block) row -= block->n;
    const bool packed = block->weights.step_stride != DotOperand<T>::kStep;
    const int64_t in_panel = packed ? (block->column + row) % block->weights.panel_rows : 0;
    const T* first = block->weights.row(block->column + row - in_panel);
    const int64_t at = packed ? weights_begin * block->weights.panel_rows + in_panel * depth : weights_begin;
    return reinterpret_cast<uintptr_t>(first) + static_cast<uintptr_t>(at) * sizeof(T);
  }
  // What the next tile of columns fetches: two runs where line_stride is not 0. `cached`: an address where nothing is due.
  // num_column_tiles calls come to the last run's end and never past it.
  __attribute__((always_inline)) PrefetchWalk walk(const void* cached) {
    const int64_t runs = num_rows + num_weight_rows, first = run;
    due += runs;
    const int64_t now = due / num_column_tiles;
    due -= now * num_column_tiles;
    run += now;
    if (now == 0) return {reinterpret_cast<uintptr_t>(cached), 0, 0};
    const uintptr_t at = run_at(first);
    return {at, now == 1 ? 0 : run_at(first + 1) - at, kCacheLine};
  }
};

// See Microkernels::dot.
template <class T>
static void dot(const T* const* a, int64_t m, const DotBlocks<T>& all, int64_t k, int64_t ldc, const DotBlocks<T>& next,
                void*) {
  if (k == 0) {
    for (int64_t i = 0; i < all.num_blocks; ++i) fill_zero_rows<T>(all.blocks[i].c, m, all.blocks[i].n, ldc);
    return;
  }
  alignas(64) char copied[kCopiedBytes];
  const int64_t columns = all.columns();
  // rows in tiles of nearly equal height: 32 rows are 6 + 6 + 5 + 5 + 5 + 5, not five sixes and a 2
  const int64_t num_tiles = ceil_div(m, kDotTileM), chunk = dot_chunk<T>(k);
  const auto height_of = [&](int64_t tile) { return m / num_tiles + (tile < m % num_tiles); };
  // Several tiles of rows go through all the columns chunk by chunk. One (decode) reads each row of weights to its end,
  // as it lies in memory.
  const int64_t span = num_tiles == 1 ? k : chunk;
  const int64_t copied_stride = ceil_div(span, 64) * 64 + 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t begin = 0; begin < k; begin += span) {
    const int64_t end = at_most(begin + span, k);
    // what follows this chunk of these blocks
    const DotBlocks<T>& weights_after = end < k || (next.num_blocks == 0 && begin > 0) ? all : next;
    const int64_t num_weights_after = weights_after.columns();
    for (int64_t tile = 0, row = 0; tile < num_tiles; ++tile) {
      const int64_t height = height_of(tile);
      const T* rows[kDotTileM];
      for (int64_t r = 0; r < height; ++r) rows[r] = a[row + r];
      if (columns >= kColumnsToCopy && height * copied_stride * static_cast<int64_t>(sizeof(T)) <= kCopiedBytes &&
          rows_alias(rows, height)) {
        T* copy = reinterpret_cast<T*>(copied);
        for (int64_t r = 0; r < height; ++r, copy += copied_stride) {
          std::memcpy(static_cast<void*>(copy), rows[r] + begin, static_cast<size_t>(end - begin) * sizeof(T));
          rows[r] = copy - begin;
        }
      }
      const bool last = tile + 1 == num_tiles;
      const int64_t share = num_weights_after * tile / num_tiles;
      Coming<T> coming{.rows = last ? a : a + row + height,
                       .num_rows = !last ? height_of(tile + 1) : end < k ? height_of(0) : 0,
                       .row_begin = last ? end : begin,
                       .weights = &weights_after,
                       .weights_begin = end < k ? end : 0,
                       .depth = chunk,
                       .weight_row = share,
                       .num_weight_rows = num_weights_after * (tile + 1) / num_tiles - share,
                       .num_column_tiles = ceil_div(columns, kDotTileN)};
      if (coming.num_rows + coming.num_weight_rows > 2 * coming.num_column_tiles) coming.num_rows = 0;
      for (int64_t i = 0; i < all.num_blocks; ++i) {
        const DotBlock<T>& block = all.blocks[i];
        const DotWeights<T>& weights = block.weights;
        for (int64_t j = 0, width; j < block.n; j += width) {
          const int64_t column = block.column + j;
          acc_t<T>* sums = block.c + row * ldc + j;
          width = block.n - j >= kDotTileN && weights.rows_together(column) >= kDotTileN ? kDotTileN : 1;
          PrefetchWalk walk{};
          if (num_tiles > 1 && width > 1) walk = coming.walk(weights.row(column));
          for (int64_t at = begin; at < end; at += chunk) {
            const DotChunk part{at, at_most(chunk, k - at), at == 0};
            if (width == 1)
              dot_rows<T, 1, 0>(rows, height, weights, column, walk, part, sums, ldc);
            else if (num_tiles == 1)
              dot_rows<T, kDotTileN, kStepLines<T>>(rows, height, weights, column,
                                                    walk_ahead(all, i, column, next, at / DotOperand<T>::kStep), part, sums,
                                                    ldc);
            else if (walk.line_stride == 0)
              dot_rows<T, kDotTileN, 1>(rows, height, weights, column, walk, part, sums, ldc);
            else
              dot_rows<T, kDotTileN, 2>(rows, height, weights, column, walk, part, sums, ldc);
          }
        }
      }
      row += height;
    }
  }
}

}  // namespace moe::MOE_ISA
