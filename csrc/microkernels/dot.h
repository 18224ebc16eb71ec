// c[m, n] = sum_k a[m][k] * b[n][k]: both operands contiguous along k, as rows of x and rows of a weight matrix are.
//
// No operand is packed. A tile keeps kTileM x kTileN vectors of partial sums, one for each result, and reads one vector
// of each row a step; lanes are added once at the end (3 instructions a result). Compared with the outer-product form
// the loads are as many (10 for 24 multiply-adds) and the weights' [out, in] layout needs no transposition.
//
// While a tile is computed, weights that will be needed are fetched into L2 in the order of their addresses. One tile
// of rows (decode) reads each weight once, so it runs ahead in its own block: without that the four rows of a tile are
// four streams within a page or two, which the hardware prefetcher follows badly when rows are short (Zen 4, one core,
// weights from DRAM: 6 rows of x and 768 columns 58 -> 206 GFLOP/s, 2048 columns 95 -> 121). Several tiles find their
// block in L2 after the first, so they fetch the caller's next block instead, where it fits, spread over the whole of
// the arithmetic. Fetching their own as the first tile does would cost more than it brings (Zen 3, 96 rows, 2048
// columns, weights in L2: 53 GFLOP/s of 85, without 74).
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

// A walk over memory that will be read soon: `step` bytes further with every step of a tile.
struct PrefetchWalk {
  uintptr_t at;
  uintptr_t step;

  // what is left of it from a tile's step `steps` on
  __attribute__((always_inline)) PrefetchWalk from(int64_t steps) const {
    return {at + static_cast<uintptr_t>(steps) * step, step};
  }
};

// Steps [begin, begin + depth) of k; `first`: no earlier chunk's sums are in c.
struct DotChunk {
  int64_t begin, depth;
  bool first;
};

// kLines: cache lines to prefetch in each step.
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
      __builtin_prefetch(reinterpret_cast<const void*>(prefetch.at + line * kCacheLine), 0, 2);
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

// Bytes of weights that a step of a whole tile reads, and the cache lines they are.
template <class T>
constexpr int64_t kStepBytes = kDotTileN * DotOperand<T>::kStep * static_cast<int64_t>(sizeof(T));
template <class T>
constexpr int kStepLines = kStepBytes<T> > kCacheLine ? static_cast<int>(kStepBytes<T> / kCacheLine) : 1;

// A single tile of rows: kPrefetchRows below `column`, in this block, the one after it, or the caller's next.
constexpr int64_t kPrefetchRows = 8;

template <class T>
static PrefetchWalk walk_ahead(const DotBlock<T>* block, bool last, int64_t column, const NextWeights& next) {
  const int64_t ahead = column + kPrefetchRows, past = ahead - (block->column + block->n);
  if (past < 0 || (last && next.num_ranges == 0))
    return {reinterpret_cast<uintptr_t>(block->weights.row(ahead)), kStepBytes<T>};
  if (!last) return {reinterpret_cast<uintptr_t>(block[1].weights.row(block[1].column + past)), kStepBytes<T>};
  const int64_t row_bytes = block->weights.row_stride * static_cast<int64_t>(sizeof(T));
  return {next.ranges[0].begin + static_cast<uintptr_t>(past * row_bytes), kStepBytes<T>};
}

// Several tiles of rows: the caller's next weights, spread evenly over `num_tiles` tiles of `num_steps` steps.
struct SpreadWalk {
  NextWeights next;
  uintptr_t tile_bytes = 0, step_bytes = 0, offset = 0;
  int64_t range = 0;

  __attribute__((always_inline)) SpreadWalk(const NextWeights& weights, int64_t num_tiles, int64_t num_steps)
      : next(weights) {
    uintptr_t bytes = 0;
    for (int64_t i = 0; i < next.num_ranges; ++i) bytes += next.ranges[i].bytes;
    tile_bytes = bytes / static_cast<uintptr_t>(num_tiles) + 1;
    step_bytes = tile_bytes / static_cast<uintptr_t>(num_steps > 0 ? num_steps : 1) + 1;
  }
  // `nothing_to_fetch`: an address that is in cache
  __attribute__((always_inline)) PrefetchWalk tile(const void* nothing_to_fetch) {
    while (range < next.num_ranges && offset >= next.ranges[range].bytes) offset -= next.ranges[range++].bytes;
    if (range >= next.num_ranges) return {reinterpret_cast<uintptr_t>(nothing_to_fetch), 0};
    const PrefetchWalk walk{next.ranges[range].begin + offset, step_bytes};
    offset += tile_bytes;
    return walk;
  }
};

// See Microkernels::dot.
template <class T>
static void dot(const T* const* a, int64_t m, const DotBlock<T>* blocks, int64_t num_blocks, int64_t k, int64_t ldc,
                const NextWeights& next, void*) {
  if (k == 0) {
    for (int64_t i = 0; i < num_blocks; ++i) fill_zero_rows<T>(blocks[i].c, m, blocks[i].n, ldc);
    return;
  }
  alignas(64) char copied[kCopiedBytes];
  int64_t columns = 0;
  for (int64_t i = 0; i < num_blocks; ++i) columns += blocks[i].n;
  // rows in tiles of nearly equal height: 32 rows are 6 + 6 + 5 + 5 + 5 + 5, not five sixes and a 2
  const int64_t num_tiles = ceil_div(m, kDotTileM), chunk = dot_chunk<T>(k);
  // Several tiles of rows go through all the columns chunk by chunk. One (decode) reads each row of weights to its end,
  // as it lies in memory.
  const int64_t span = num_tiles == 1 ? k : chunk;
  const int64_t copied_stride = ceil_div(span, 64) * 64 + 64 / static_cast<int64_t>(sizeof(T));
  // the next block's weights would not fit beside this one's where a block is sized by its chunks
  SpreadWalk spread(chunk < k ? NextWeights{} : next, num_tiles * ceil_div(columns, kDotTileN), k / DotOperand<T>::kStep);
  for (int64_t begin = 0; begin < k; begin += span) {
    const int64_t end = at_most(begin + span, k);
    for (int64_t tile = 0, row = 0; tile < num_tiles; ++tile) {
      const int64_t height = m / num_tiles + (tile < m % num_tiles);
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
      for (int64_t i = 0; i < num_blocks; ++i) {
        const DotBlock<T>& block = blocks[i];
        const DotWeights<T>& weights = block.weights;
        for (int64_t j = 0, width; j < block.n; j += width) {
          const int64_t column = block.column + j;
          acc_t<T>* sums = block.c + row * ldc + j;
          width = block.n - j >= kDotTileN && weights.rows_together(column) >= kDotTileN ? kDotTileN : 1;
          for (int64_t at = begin; at < end; at += chunk) {
            const DotChunk part{at, at_most(chunk, k - at), at == 0};
            if (width == 1) {
              dot_rows<T, 1, 1>(rows, height, weights, column, {reinterpret_cast<uintptr_t>(weights.row(column)), 0}, part,
                                sums, ldc);
              continue;
            }
            const bool last = i + 1 == num_blocks;
            const PrefetchWalk walk = num_tiles == 1
                                          ? walk_ahead(&block, last, column, next).from(at / DotOperand<T>::kStep)
                                          : spread.tile(weights.row(column));
            if (walk.step <= kCacheLine)
              dot_rows<T, kDotTileN, 1>(rows, height, weights, column, walk, part, sums, ldc);
            else
              dot_rows<T, kDotTileN, kStepLines<T>>(rows, height, weights, column, walk, part, sums, ldc);
          }
        }
      }
      row += height;
    }
  }
}

}  // namespace moe::MOE_ISA
