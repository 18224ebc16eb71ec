// Products with a low-rank factor: a few rows (16, say) of a few thousand elements each.
//
// GEMM tiles turn or pack their weights, which so few rows do not repay. Here nothing is packed: rank_products keeps lanes
// along the sum and adds them once at the end, rank_sums streams a few rows of the factor past sums that stay in L1.
//
// Each result is one chain of multiply-adds in a fixed order in every tile shape: a row's result has the same bits
// whatever rows are computed beside it.
#pragma once

#include "microkernels/dot_operand.h"

namespace moe::MOE_ISA {

// 3 x 4 sums, 3 rows of x and one of the factor fill 16 registers
constexpr int kProductTileM = kRegisters == 32 ? 4 : 3;
constexpr int kProductTileN = 4;
constexpr int kProductAlone = 8;  // rows that one row of x takes at once: 4 chains would wait for each other
// Elements whose products are added before they join the total: rows of x stay in L1 between tiles, and the rounding
// error grows with the number of chunks instead of that of elements. A lane sums 128 of them in any kernel set (float).
constexpr int64_t kProductChunk = 128 * kLanes<float>;

// The products over one chunk; they replace or join what is there.
template <class T, int kM, int kN>
static void products_tile(const T* const* x, const T* const* rows, int64_t begin, int64_t end, acc_t<T>* const* products,
                          int64_t column) {
  using Operand = DotOperand<T>;
  using Reg = typename Operand::Reg;
  using Acc = acc_t<T>;
  Vec<Acc> sum[kM][kN] = {};
  int64_t i = begin;
  for (; i + Operand::kStep <= end; i += Operand::kStep) {
    Reg a[kM];
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) a[m] = Operand::load_step(x[m] + i);
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
      const Reg b = Operand::load_step(rows[n] + i);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) sum[m][n] = Operand::multiply_add(sum[m][n], a[m], b);
    }
  }
  if (i < end) {
    for (int n = 0; n < kN; ++n) {
      const Reg b = Operand::load_partial(rows[n] + i, end - i);
      for (int m = 0; m < kM; ++m)
        sum[m][n] = Operand::multiply_add(sum[m][n], Operand::load_partial(x[m] + i, end - i), b);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
    Acc total[kN];
    if constexpr (kN % 4 == 0) {
#pragma GCC unroll 8
      for (int n = 0; n < kN; n += 4) reduce4<Acc>(sum[m][n], sum[m][n + 1], sum[m][n + 2], sum[m][n + 3], total + n);
    } else {
      for (int n = 0; n < kN; ++n) total[n] = reduce<Acc>(sum[m][n]);
    }
    Acc* out = products[m] + column;
    for (int n = 0; n < kN; ++n) out[n] = begin == 0 ? total[n] : out[n] + total[n];
  }
}

template <class T, int kM>
static void products_tiles(const T* const* x, const T* const* rows, int64_t num_rows, int64_t begin, int64_t end,
                           acc_t<T>* const* products) {
  constexpr int kN = kM == 1 ? kProductAlone : kProductTileN;
  int64_t j = 0;
  for (; j + kN <= num_rows; j += kN) products_tile<T, kM, kN>(x, rows + j, begin, end, products, j);
  if constexpr (kN != kProductTileN)
    for (; j + kProductTileN <= num_rows; j += kProductTileN)
      products_tile<T, kM, kProductTileN>(x, rows + j, begin, end, products, j);
  for (; j < num_rows; ++j) products_tile<T, kM, 1>(x, rows + j, begin, end, products, j);
}

// See Microkernels::rank_products.
template <class T>
static void rank_products(const T* const* x, int64_t m, const T* const* rows, int64_t num_rows, int64_t n,
                          acc_t<T>* const* products) {
  for (int64_t row = 0; row < m && n == 0; ++row)
    for (int64_t j = 0; j < num_rows; ++j) products[row][j] = 0;
  for (int64_t begin = 0; begin < n; begin += kProductChunk) {
    const int64_t end = n - begin < kProductChunk ? n : begin + kProductChunk;
    for (int64_t row = 0; row < m;) {
      const auto run = [&]<int kM>() {
        products_tiles<T, kM>(x + row, rows, num_rows, begin, end, products + row);
        row += kM;
      };
      const int64_t left = m - row;
      if (left >= kProductTileM)
        run.template operator()<kProductTileM>();
      else if (left == 3)
        run.template operator()<3>();
      else if (left == 2)
        run.template operator()<2>();
      else
        run.template operator()<1>();
    }
  }
}

// Rows j of the factor are taken a few at a time; sums wait in L1 between them. The first ones start from the base, the
// last ones round into the output.
template <class T>
struct RankSums {
  const T* const* base;  // [m]; null: zero
  T* const* out;         // [m]; null: the sums stay
  acc_t<T>* sums;
  int64_t sums_stride;

  __attribute__((always_inline)) RankSums at_row(int64_t row) const {
    return {base == nullptr ? nullptr : base + row, out == nullptr ? nullptr : out + row, sums + row * sums_stride,
            sums_stride};
  }
};

// Two rows of sums take four rows of the factor at once (8 weights, 4 + 2 operands: 14 registers), one takes eight.
template <class T, int kM, int kJ, bool kFirst, bool kLast>
static void sums_tile(const T* const* rows, const acc_t<T>* const* weights, int64_t first, const RankSums<T>& result,
                      int64_t n) {
  using Acc = acc_t<T>;
  constexpr int kN = kLanes<Acc>;
  Acc w[kM][kJ];
  const T* b[kJ];
  for (int j = 0; j < kJ; ++j) {
    b[j] = rows[first + j];
    for (int m = 0; m < kM; ++m) w[m][j] = weights[m][first + j];
  }
  const T* base[kM] = {};
  T* out[kM] = {};
  for (int m = 0; m < kM; ++m) {
    if (kFirst && result.base != nullptr) base[m] = result.base[m];
    if (kLast) out[m] = result.out[m];
  }
  const bool has_base = kFirst && result.base != nullptr;
  int64_t i = 0;
  for (; i + kN <= n; i += kN) {
    Vec<Acc> sum[kM];
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      if constexpr (kFirst)
        sum[m] = has_base ? load_converted(base[m] + i) : Vec<Acc>{};
      else
        sum[m] = load(result.sums + m * result.sums_stride + i);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kJ; ++j) {
      const Vec<Acc> row = load_converted(b[j] + i);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) sum[m] = broadcast(w[m][j]) * row + sum[m];
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      if constexpr (kLast)
        store_converted(out[m] + i, sum[m]);
      else
        store(result.sums + m * result.sums_stride + i, sum[m]);
    }
  }
  if (i == n) return;
  for (int m = 0; m < kM; ++m) {
    Vec<Acc> sum{};
    if constexpr (!kFirst)
      sum = load(result.sums + m * result.sums_stride + i);
    else if (has_base)
      sum = load_converted_partial(base[m] + i, n - i);
    for (int j = 0; j < kJ; ++j) sum = broadcast(w[m][j]) * load_converted_partial(b[j] + i, n - i) + sum;
    Acc lanes[kN];
    store(kLast ? lanes : result.sums + m * result.sums_stride + i, sum);
    if constexpr (kLast) convert_back(lanes, out[m] + i, n - i);
  }
}

template <class T, int kM>
static void sums_tiles(const T* const* rows, int64_t num_rows, const acc_t<T>* const* weights, const RankSums<T>& result,
                       int64_t n) {
  constexpr int kJ = kM == 1 ? 8 : 4;
  for (int64_t j = 0; j < num_rows;) {
    const auto run = [&]<int kRows>() {
      const bool last = j + kRows == num_rows && result.out != nullptr;
      if (j == 0 && last)
        sums_tile<T, kM, kRows, true, true>(rows, weights, j, result, n);
      else if (j == 0)
        sums_tile<T, kM, kRows, true, false>(rows, weights, j, result, n);
      else if (last)
        sums_tile<T, kM, kRows, false, true>(rows, weights, j, result, n);
      else
        sums_tile<T, kM, kRows, false, false>(rows, weights, j, result, n);
      j += kRows;
    };
    if (j + kJ <= num_rows)
      run.template operator()<kJ>();
    else
      run.template operator()<1>();
  }
}

// See Microkernels::rank_sums.
template <class T>
static void rank_sums(const T* const* rows, int64_t num_rows, const acc_t<T>* const* weights, int64_t m,
                      const T* const* base, T* const* out, acc_t<T>* sums, int64_t sums_stride, int64_t n) {
  const RankSums<T> result{base, out, sums, sums_stride};
  int64_t row = 0;
  for (; row + 2 <= m; row += 2) sums_tiles<T, 2>(rows, num_rows, weights + row, result.at_row(row), n);
  if (row < m) sums_tiles<T, 1>(rows, num_rows, weights + row, result.at_row(row), n);
}

}  // namespace moe::MOE_ISA
