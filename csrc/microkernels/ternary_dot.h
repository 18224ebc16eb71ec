// Inner products of rows of x with rows of a ternary matrix, read from its bit planes.
//
// t is made in registers, -1, 0 or 1 in the type that the dot product multiplies, so that one multiply-add a row of x
// serves a vector of weights: t * x is exact. Rows begin at any bit of a group, so 64 bits come from two words.
//
// A result is the sum of its chunks, in order; a chunk is one chain of multiply-adds in rising order of elements and one
// fixed tree over lanes. Chunks begin at the row's first element: neither the rows of x beside it, nor threads, nor where
// the row's bits lie change a result.
#pragma once

#include <array>
#include <utility>

#include "microkernels/dot_operand.h"
#include "microkernels/ternary_linear_table.h"

namespace moe::MOE_ISA {

// rows of x at once, and of t for them: with 32 registers 24 sums, so that loads are fewer than products; else 8
constexpr int kTernaryTileM = kLanes<float> == 16 ? 8 : 4;
constexpr int kTernaryTileN = kLanes<float> == 16 ? 3 : 2;
// steps of 64 elements unrolled: all of AVX-512's; more of shorter vectors only take long to compile
constexpr int kTernaryUnroll = kLanes<float> == 16 ? 4 : 2;
constexpr int kTernaryAlone = 4;  // rows that one row of x takes at once
// 2048 elements of AVX-512's sums, and 128 of shorter vectors, whose lanes would add more and err more
constexpr int64_t kTernaryChunk = kLanes<float> == 16 ? 2048 : 128;

// The two words of 64 elements, of which n exist.
struct TernaryWords {
  uint64_t nonzero, negative;
};

// Where a row's words are when they begin with a group: masks are loads.
struct WholeGroups {
  const uint64_t* group;

  WholeGroups(const uint64_t* planes, int64_t bit) : group(planes + bit / 64 * 2) {}
  TernaryWords words() const { return {group[0], group[1]}; }
  void step() { group += 2; }
};

// Where they begin at any bit: each word is the end of one group's and the begin of the next one's. A row that begins with
// a group reads no next one: it may not exist.
struct ShiftedGroups {
  const uint64_t* group;
  int64_t next;
  int shift;

  ShiftedGroups(const uint64_t* planes, int64_t bit)
      : group(planes + bit / 64 * 2), next(bit % 64 == 0 ? 0 : 2), shift(static_cast<int>(bit % 64)) {}
  TernaryWords words() const {
    // two shifts: one of 64 is none
    return {group[0] >> shift | group[next] << 1 << (63 - shift), group[1] >> shift | group[next + 1] << 1 << (63 - shift)};
  }
  void step() { group += 2; }
};

MOE_INLINE TernaryWords ternary_words(const uint64_t* planes, int64_t bit, int64_t n) {
  const uint64_t* group = planes + bit / 64 * 2;
  const int64_t shift = bit % 64;
  TernaryWords words{group[0] >> shift, group[1] >> shift};
  if (shift + n > 64) {  // else the next group may not exist
    words.nonzero |= group[2] << (64 - shift);
    words.negative |= group[3] << (64 - shift);
  }
  if (n < 64) {
    const uint64_t valid = (uint64_t{1} << n) - 1;
    words.nonzero &= valid;
    words.negative &= valid;
  }
  return words;
}

// kStep elements from bit `at` of the words, as the operand of T.
template <class T>
MOE_INLINE typename DotOperand<T>::Reg ternary_step(const TernaryWords& words, int at) {
  using Acc = acc_t<T>;
  const uint64_t nonzero = words.nonzero >> at, negative = words.negative >> at;
#if defined(__AVX512BF16__)
  if constexpr (__is_same(T, bf16)) {
    const __m512i sign = _mm512_mask_blend_epi16(static_cast<__mmask32>(negative), _mm512_set1_epi16(0x3f80),
                                                 _mm512_set1_epi16(static_cast<short>(0xbf80)));
    return _mm512_maskz_mov_epi16(static_cast<__mmask32>(nonzero), sign);
  } else
#endif
  {
#if defined(__AVX512F__)
    if constexpr (sizeof(Acc) == 4) {
      const __m512 sign =
          _mm512_mask_blend_ps(static_cast<__mmask16>(negative), _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
      return (Vec<Acc>)_mm512_maskz_mov_ps(static_cast<__mmask16>(nonzero), sign);
    } else {
      const __m512d sign = _mm512_mask_blend_pd(static_cast<__mmask8>(negative), _mm512_set1_pd(1.0), _mm512_set1_pd(-1.0));
      return (Vec<Acc>)_mm512_maskz_mov_pd(static_cast<__mmask8>(nonzero), sign);
    }
#else
    VecIndex<Acc> one;
    for (int i = 0; i < kLanes<Acc>; ++i) one[i] = static_cast<Index<Acc>>(1) << i;
    const VecIndex<Acc> zero{};
    const VecIndex<Acc> some = ((static_cast<Index<Acc>>(nonzero) + zero) & one) != 0;
    const VecIndex<Acc> minus = ((static_cast<Index<Acc>>(negative) + zero) & one) != 0;
    const VecIndex<Acc> sign = (VecIndex<Acc>)broadcast<Acc>(Acc(-0.0));
    return (Vec<Acc>)((((VecIndex<Acc>)broadcast<Acc>(Acc(1))) ^ (minus & sign)) & some);
#endif
  }
}

// The products over one chunk; they replace or join what is there.
template <class T, int kM, int kN, class Groups>
static void ternary_tile(const T* const* x, const TernaryRows& rows, int64_t first_row, int64_t begin, int64_t end,
                         acc_t<T>* const* products, const NextWeights<T>& next) {
  using Operand = DotOperand<T>;
  using Acc = acc_t<T>;
  constexpr int kStep = Operand::kStep;
  Vec<Acc> sum[kM][kN] = {};
  const auto bit = [&](int n) { return rows.first_bit + (first_row + n) * rows.row_bits; };
  const auto at_row = [&]<int... n>(std::integer_sequence<int, n...>) {
    return std::array<Groups, kN>{Groups(rows.planes, bit(n) + begin)...};
  };
  std::array<Groups, kN> groups = at_row(std::make_integer_sequence<int, kN>{});
  int64_t i = begin;
  for (; i + 64 <= end; i += 64) {
    TernaryWords words[kN];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) words[n] = groups[n].words(), groups[n].step();
    if (next.rows != nullptr) {
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) {
        const char* line = reinterpret_cast<const char*>(next.rows + (first_row + n) * next.stride + i);
#pragma GCC unroll 8
        for (size_t at = 0; at < 64 * sizeof(T); at += 64) __builtin_prefetch(line + at, 0, 2);
      }
    }
#pragma GCC unroll kTernaryUnroll
    for (int at = 0; at < 64; at += kStep) {
      typename Operand::Reg t[kN];
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) t[n] = ternary_step<T>(words[n], at);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        const typename Operand::Reg a = Operand::load_step(x[m] + i + at);
#pragma GCC unroll 8
        for (int n = 0; n < kN; ++n) sum[m][n] = Operand::multiply_add(sum[m][n], a, t[n]);
      }
    }
  }
  if (i < end) {
    TernaryWords words[kN];
    for (int n = 0; n < kN; ++n) words[n] = ternary_words(rows.planes, bit(n) + i, end - i);
    for (int at = 0; i < end; i += kStep, at += kStep) {
      for (int m = 0; m < kM; ++m) {
        const auto a = i + kStep <= end ? Operand::load_step(x[m] + i) : Operand::load_partial(x[m] + i, end - i);
        for (int n = 0; n < kN; ++n) sum[m][n] = Operand::multiply_add(sum[m][n], a, ternary_step<T>(words[n], at));
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
    Acc* out = products[m] + first_row;
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
      const Acc total = reduce<Acc>(sum[m][n]);
      out[n] = begin == 0 ? total : out[n] + total;
    }
  }
}

template <class T, int kM, class Groups>
static void ternary_tiles(const T* const* x, const TernaryRows& rows, int64_t num_rows, int64_t begin, int64_t end,
                          acc_t<T>* const* products, const NextWeights<T>& next) {
  constexpr int kN = kM == 1 ? kTernaryAlone : kM <= 4 ? 2 : kTernaryTileN;
  int64_t j = 0;
  for (; j + kN <= num_rows; j += kN) ternary_tile<T, kM, kN, Groups>(x, rows, j, begin, end, products, next);
  for (; j < num_rows; ++j) ternary_tile<T, kM, 1, Groups>(x, rows, j, begin, end, products, next);
}

template <class T, class Groups>
static void ternary_chunks(const T* const* x, int64_t m, const TernaryRows& rows, int64_t num_rows, int64_t n,
                           acc_t<T>* const* products, const NextWeights<T>& next) {
  const auto ask = [&](int64_t row) { return row == 0 ? next : NextWeights<T>{}; };  // once
  for (int64_t begin = 0; begin < n; begin += kTernaryChunk) {
    const int64_t end = n - begin < kTernaryChunk ? n : begin + kTernaryChunk;
    int64_t row = 0;
    for (; row + kTernaryTileM <= m; row += kTernaryTileM)
      ternary_tiles<T, kTernaryTileM, Groups>(x + row, rows, num_rows, begin, end, products + row, ask(row));
    for (; row + 4 <= m; row += 4) ternary_tiles<T, 4, Groups>(x + row, rows, num_rows, begin, end, products + row, ask(row));
    if (m - row == 3) ternary_tiles<T, 3, Groups>(x + row, rows, num_rows, begin, end, products + row, ask(row));
    if (m - row == 2) ternary_tiles<T, 2, Groups>(x + row, rows, num_rows, begin, end, products + row, ask(row));
    if (m - row == 1) ternary_tiles<T, 1, Groups>(x + row, rows, num_rows, begin, end, products + row, ask(row));
  }
}

// See TernaryLinearKernels::products.
template <class T>
static void ternary_products(const T* const* x, int64_t m, const TernaryRows& rows, int64_t num_rows, int64_t n,
                             acc_t<T>* const* products, const NextWeights<T>& next) {
  for (int64_t row = 0; row < m && n == 0; ++row)
    for (int64_t j = 0; j < num_rows; ++j) products[row][j] = 0;
  if (rows.first_bit % 64 == 0 && rows.row_bits % 64 == 0)  // a chunk is whole groups
    ternary_chunks<T, WholeGroups>(x, m, rows, num_rows, n, products, next);
  else
    ternary_chunks<T, ShiftedGroups>(x, m, rows, num_rows, n, products, next);
}

// See TernaryLinearKernels::decode.
template <class T>
static void ternary_decode(const TernaryRows& rows, int64_t num_rows, int64_t n, T* out, int64_t out_stride) {
  using Acc = acc_t<T>;
  const T values[4] = {from_acc<T>(Acc(0)), from_acc<T>(Acc(1)), from_acc<T>(Acc(0)), from_acc<T>(Acc(-1))};
  for (int64_t r = 0; r < num_rows; ++r) {
    T* row = out + r * out_stride;
    for (int64_t i = 0; i < n; i += 64) {
      const int64_t here = n - i < 64 ? n - i : 64;
      const TernaryWords words = ternary_words(rows.planes, rows.first_bit + r * rows.row_bits + i, here);
      for (int64_t b = 0; b < here; ++b) row[i + b] = values[((words.nonzero >> b) & 1) | ((words.negative >> b) & 1) << 1];
    }
  }
}

}  // namespace moe::MOE_ISA
