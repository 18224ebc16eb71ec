// c[m, n] = sum_k a[m][k] * b[k][n]: the right operand contiguous along n, as weights are when the sum runs over their
// outer dimension (transposed layouts, and the gradient of the rows), and as both operands are in a weight gradient.
//
// b is packed into panels kPanel columns wide, in chunks of kChunk steps that stay in L2 (256 x 256 bf16 = 128 KiB); a is
// packed beside it. Sums live in registers within a chunk and in c (float) between chunks: each result is one chain in
// rising k, so its bits do not depend on the tile or on the rows beside it.
//
// Up to kFewRows rows of a (decode) do not repay packing: outer_few streams b as it lies and keeps c in L1. Same chains,
// same bits.
#pragma once

#include "microkernels/table.h"
#include "microkernels/vec.h"

namespace moe::MOE_ISA {

// What a packed element is: the accumulator's type, or with vdpbf16ps a pair of bf16 along k.
template <class T>
struct OuterOperand {
  using Packed = acc_t<T>;
  static constexpr int kDepth = 1;  // steps of k in a packed element
  using Reg = Vec<acc_t<T>>;
  MOE_INLINE Reg load_packed(const Packed* p) { return load(p); }
  MOE_INLINE Reg broadcast_packed(const Packed* p) { return broadcast(*p); }
  MOE_INLINE Vec<acc_t<T>> multiply_add(Vec<acc_t<T>> sum, Reg a, Reg b) { return a * b + sum; }
  // out[i] = rows[0][i]
  MOE_INLINE void pack(const T* const* rows, int64_t, Packed* out, int64_t n) { convert(rows[0], out, n); }
  // out[i] = row[i]
  MOE_INLINE void pack_along(const T* row, int64_t k, Packed* out) { convert(row, out, k); }

  // for outer_few: kStripVectors registers that hold kDepth rows of one strip of columns
  static constexpr int kStripVectors = 1;
  MOE_INLINE void load_strip(const T* row, const T*, Reg* w) { w[0] = load_converted(row); }
  MOE_INLINE void restore_order(Vec<acc_t<T>>*) {}
};

#if defined(__AVX512BF16__)
template <>
struct OuterOperand<bf16> {
  using Packed = uint32_t;
  static constexpr int kDepth = 2;
  using Reg = __m512i;
  MOE_INLINE Reg load_packed(const Packed* p) { return _mm512_loadu_si512(p); }
  MOE_INLINE Reg broadcast_packed(const Packed* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  MOE_INLINE Vec<float> multiply_add(Vec<float> sum, Reg a, Reg b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  // out[i] = (rows[0][i], rows[1][i]); the second is zero where there is one row
  MOE_INLINE void pack(const bf16* const* rows, int64_t depth, Packed* out, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[0] + i)));
      __m512i high = _mm512_setzero_si512();
      if (depth == 2)
        high = _mm512_slli_epi32(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[1] + i))), 16);
      _mm512_storeu_si512(out + i, _mm512_or_si512(low, high));
    }
    for (; i < n; ++i)
      out[i] = rows[0][i].bits | (depth == 2 ? static_cast<uint32_t>(rows[1][i].bits) << 16 : 0u);
  }
  MOE_INLINE void pack_along(const bf16* row, int64_t k, Packed* out) {
    std::memcpy(out, row, static_cast<size_t>(k) / 2 * 4);
    if (k % 2) out[k / 2] = row[k - 1].bits;
  }

  // interleaving two rows lane by lane leaves the columns in another order, which restore_order undoes at the end
  static constexpr int kStripVectors = 2;
  MOE_INLINE void load_strip(const bf16* row, const bf16* next, Reg* w) {
    const __m512i even = _mm512_loadu_si512(row);
    const __m512i odd = next == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(next);
    w[0] = _mm512_unpacklo_epi16(even, odd);
    w[1] = _mm512_unpackhi_epi16(even, odd);
  }
  MOE_INLINE void restore_order(Vec<float>* sums) {
    const __m512 low = (__m512)sums[0], high = (__m512)sums[1];  // low: columns 0-3, 8-11, 16-19, 24-27
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    sums[0] = (Vec<float>)_mm512_permutex2var_ps(low, first, high);
    sums[1] = (Vec<float>)_mm512_permutex2var_ps(low, second, high);
  }
};
#endif

constexpr int kOuterTileM = 6;
constexpr int kOuterVectors = kRegisters == 32 ? 4 : 2;  // 24 or 12 sums
template <class T>
constexpr int kPanel = kOuterVectors * kLanes<acc_t<T>>;
constexpr int64_t kChunk = 256;  // steps of k in L2 at a time; a multiple of every kDepth
constexpr int64_t kMaxOuterBlock = 256;

// c[m, j] (+)= sum over steps of a(m, step) * b[step][j]; a(m, step) = a[m * a_row_stride + step * a_step_stride]
template <class T, int kTileM>
static void outer_tile(const typename OuterOperand<T>::Packed* a, int64_t a_row_stride, int64_t a_step_stride,
                       const typename OuterOperand<T>::Packed* b, int64_t steps, acc_t<T>* c, int64_t ldc, bool first) {
  using Operand = OuterOperand<T>;
  constexpr int kN = kLanes<acc_t<T>>;
  Vec<acc_t<T>> sum[kTileM][kOuterVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kTileM; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kOuterVectors; ++v)
      sum[m][v] = first ? Vec<acc_t<T>>{} : load(c + m * ldc + v * kN);
  for (int64_t step = 0; step < steps; ++step, a += a_step_stride, b += kPanel<T>) {
    typename Operand::Reg w[kOuterVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kOuterVectors; ++v) w[v] = Operand::load_packed(b + v * kN);
#pragma GCC unroll 8
    for (int m = 0; m < kTileM; ++m) {
      const typename Operand::Reg x = Operand::broadcast_packed(a + m * a_row_stride);
#pragma GCC unroll 8
      for (int v = 0; v < kOuterVectors; ++v) sum[m][v] = Operand::multiply_add(sum[m][v], x, w[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTileM; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kOuterVectors; ++v) store(c + m * ldc + v * kN, sum[m][v]);
}

// All tiles of one chunk: m rows of packed a times num_panels panels of packed b.
template <class T>
static void outer_panels(const typename OuterOperand<T>::Packed* a, int64_t a_row_stride, int64_t a_step_stride,
                         int64_t m, const typename OuterOperand<T>::Packed* b, int64_t num_panels, int64_t steps,
                         acc_t<T>* c, int64_t ldc, bool first) {
  const int64_t num_tiles = (m + kOuterTileM - 1) / kOuterTileM;
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    const auto* b_panel = b + panel * steps * kPanel<T>;
    for (int64_t tile = 0, row = 0; tile < num_tiles; ++tile) {
      const int64_t height = m / num_tiles + (tile < m % num_tiles);
      const auto* a_row = a + row * a_row_stride;
      acc_t<T>* c_tile = c + row * ldc + panel * kPanel<T>;
      const auto run = [&]<int kTileM>() {
        outer_tile<T, kTileM>(a_row, a_row_stride, a_step_stride, b_panel, steps, c_tile, ldc, first);
      };
      switch (height) {
        case 1: run.template operator()<1>(); break;
        case 2: run.template operator()<2>(); break;
        case 3: run.template operator()<3>(); break;
        case 4: run.template operator()<4>(); break;
        case 5: run.template operator()<5>(); break;
        case 6: run.template operator()<6>(); break;
      }
      row += height;
    }
  }
}

// Packs columns [column, column + n) of rows[0 … num_rows) into panels; columns past n are zero.
// row_stride is that of `packed`: kPanel for a right operand (panel after panel), the full width for a left one.
template <class T, class RowAt>
static void pack_columns(const RowAt& row_at, int64_t num_rows, int64_t n, int64_t width, int64_t row_stride,
                         typename OuterOperand<T>::Packed* out) {
  constexpr int kDepth = OuterOperand<T>::kDepth;
  for (int64_t row = 0; row < num_rows; row += kDepth, out += row_stride) {
    const T* pair[2] = {row_at(row), nullptr};
    const bool both = kDepth == 2 && row + 1 < num_rows;
    if (both) pair[1] = row_at(row + 1);
    OuterOperand<T>::pack(pair, both ? 2 : 1, out, n);
    if (n < width) std::memset(static_cast<void*>(out + n), 0, static_cast<size_t>(width - n) * sizeof *out);
  }
}

MOE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One packed chunk of each operand, kMaxOuterBlock wide, and the float tile of a weight gradient.
template <class T>
constexpr int64_t kOuterScratchBytes =
    2 * kChunk / OuterOperand<T>::kDepth * kMaxOuterBlock * sizeof(typename OuterOperand<T>::Packed) +
    kMaxOuterBlock * kMaxOuterBlock * sizeof(acc_t<T>);

constexpr int64_t kFewRows = 4;

// outer for m rows that are not packed. Columns of c up to the next multiple of kPanel are scratch.
template <class T, int kM>
static void outer_few(const T* const* a, const T* b, int64_t b_step_stride, int64_t n, int64_t k, acc_t<T>* c,
                      int64_t ldc) {
  using Operand = OuterOperand<T>;
  constexpr int kDepth = Operand::kDepth, kVectors = Operand::kStripVectors, kN = kLanes<acc_t<T>>;
  constexpr int64_t kStrip = kVectors * kN;
  constexpr int kGroup = 4;  // steps between a load and a store of c
  for (int64_t k0 = 0; k0 < k; k0 += kGroup * kDepth) {
    const int64_t depth = k - k0 < kGroup * kDepth ? k - k0 : kGroup * kDepth;
    typename Operand::Packed packed_a[kM][kGroup];
    for (int m = 0; m < kM; ++m) Operand::pack_along(a[m] + k0, depth, packed_a[m]);
    for (int64_t column = 0; column < n; column += kStrip) {
      Vec<acc_t<T>> sum[kM][kVectors];
      for (int m = 0; m < kM; ++m)
        for (int v = 0; v < kVectors; ++v)
          sum[m][v] = k0 == 0 ? Vec<acc_t<T>>{} : load(c + m * ldc + column + v * kN);
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
      if (k0 + depth == k)
        for (int m = 0; m < kM; ++m) Operand::restore_order(sum[m]);
      for (int m = 0; m < kM; ++m)
        for (int v = 0; v < kVectors; ++v) store(c + m * ldc + column + v * kN, sum[m][v]);
    }
  }
}

// See Microkernels::outer.
template <class T>
static void outer(const T* const* a, int64_t m, const T* b, int64_t b_step_stride, int64_t n, int64_t k, acc_t<T>* c,
                  int64_t ldc, void* scratch) {
  if (k == 0) {
    for (int64_t row = 0; row < m; ++row)
      std::memset(static_cast<void*>(c + row * ldc), 0, static_cast<size_t>(n) * sizeof *c);
    return;
  }
  static_assert(kPanel<T> % (OuterOperand<T>::kStripVectors * kLanes<acc_t<T>>) == 0 && kFewRows == 4);
  switch (m) {
    case 1: return outer_few<T, 1>(a, b, b_step_stride, n, k, c, ldc);
    case 2: return outer_few<T, 2>(a, b, b_step_stride, n, k, c, ldc);
    case 3: return outer_few<T, 3>(a, b, b_step_stride, n, k, c, ldc);
    case 4: return outer_few<T, 4>(a, b, b_step_stride, n, k, c, ldc);
  }
  using Packed = typename OuterOperand<T>::Packed;
  constexpr int kDepth = OuterOperand<T>::kDepth;
  constexpr int64_t kSteps = kChunk / kDepth;
  Packed* packed_a = static_cast<Packed*>(scratch);
  Packed* packed_b = packed_a + kSteps * kMaxOuterBlock;
  const int64_t num_panels = ceil_div(n, kPanel<T>);
  for (int64_t k0 = 0; k0 < k; k0 += kChunk) {
    const int64_t depth = k - k0 < kChunk ? k - k0 : kChunk;
    const int64_t steps = ceil_div(depth, kDepth);
    for (int64_t row = 0; row < m; ++row) OuterOperand<T>::pack_along(a[row] + k0, depth, packed_a + row * kSteps);
    for (int64_t panel = 0; panel < num_panels; ++panel) {
      const int64_t column = panel * kPanel<T>;
      const int64_t width = n - column < kPanel<T> ? n - column : kPanel<T>;
      pack_columns<T>([&](int64_t row) { return b + (k0 + row) * b_step_stride + column; }, depth, width, kPanel<T>,
                      kPanel<T>, packed_b + panel * steps * kPanel<T>);
    }
    outer_panels<T>(packed_a, kSteps, 1, m, packed_b, num_panels, steps, c, ldc, k0 == 0);
  }
}

// See Microkernels::weight_grad.
template <class T>
static void weight_grad(const T* const* a, int64_t a_column, int64_t an, const T* const* b, int64_t b_column, int64_t bn,
                        int64_t m, T* out, int64_t out_row_stride, void* scratch) {
  using Packed = typename OuterOperand<T>::Packed;
  constexpr int kDepth = OuterOperand<T>::kDepth;
  constexpr int64_t kSteps = kChunk / kDepth;
  Packed* packed_a = static_cast<Packed*>(scratch);
  Packed* packed_b = packed_a + kSteps * kMaxOuterBlock;
  acc_t<T>* c = reinterpret_cast<acc_t<T>*>(packed_b + kSteps * kMaxOuterBlock);
  const int64_t num_panels = ceil_div(bn, kPanel<T>);
  for (int64_t m0 = 0; m0 < m; m0 += kChunk) {
    const int64_t depth = m - m0 < kChunk ? m - m0 : kChunk;
    const int64_t steps = ceil_div(depth, kDepth);
    pack_columns<T>([&](int64_t row) { return a[m0 + row] + a_column; }, depth, an, an, kMaxOuterBlock, packed_a);
    for (int64_t panel = 0; panel < num_panels; ++panel) {
      const int64_t column = panel * kPanel<T>;
      const int64_t width = bn - column < kPanel<T> ? bn - column : kPanel<T>;
      pack_columns<T>([&](int64_t row) { return b[m0 + row] + b_column + column; }, depth, width, kPanel<T>, kPanel<T>,
                      packed_b + panel * steps * kPanel<T>);
    }
    outer_panels<T>(packed_a, 1, kMaxOuterBlock, an, packed_b, num_panels, steps, c, kMaxOuterBlock, m0 == 0);
  }
  for (int64_t row = 0; row < an; ++row) {
    if (m == 0)
      std::memset(static_cast<void*>(out + row * out_row_stride), 0, static_cast<size_t>(bn) * sizeof(T));
    else
      convert_back(c + row * kMaxOuterBlock, out + row * out_row_stride, bn);
  }
}

}  // namespace moe::MOE_ISA
