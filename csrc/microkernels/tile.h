// The register tile that every packed product runs on: kTileM rows times a panel of kPanel columns.
//
// A panel holds, for each step of k, its columns side by side; rows are packed too, so that a tile reads two streams and
// keeps 12 or 24 sums in registers.
//
// A result is the sum of its chunks, in order; a chunk's sum is one chain of multiply-adds over kChunk steps of k. Every
// path follows this order, so a result has the same bits in tiles of any height and with any rows beside it.
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
constexpr int64_t kChunk = 256;  // steps of k; a panel of 16 floats then stays in L1
constexpr int64_t kMaxOuterBlock = 256;
constexpr int64_t kCacheLine = 64;

MOE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MOE_INLINE int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }

template <class T>
static void fill_zero_rows(acc_t<T>* c, int64_t m, int64_t n, int64_t ldc) {
  for (int64_t row = 0; row < m; ++row)
    std::memset(static_cast<void*>(c + row * ldc), 0, static_cast<size_t>(n) * sizeof *c);
}

// Memory to fetch into L2 meanwhile, in the order of its addresses: lines [first, end) of runs of contiguous cache lines.
struct Fetch {
  uintptr_t begin = 0;
  int64_t run_lines = 1, run_stride = 0;  // cache lines of a run, bytes between runs
  int64_t first = 0, end = 0;

  // the lines that fall to one of `parts`
  __attribute__((always_inline)) Fetch part(int64_t index, int64_t parts) const {
    Fetch fetch = *this;
    fetch.first = first + (end - first) * index / parts;
    fetch.end = first + (end - first) * (index + 1) / parts;
    return fetch;
  }
};
constexpr int64_t kFetchSteps = 16;  // packed steps between fetches

// Fetches so many lines at a time that the last of `times` fetches the last.
struct FetchCursor {
  uintptr_t run;
  int64_t run_lines, run_stride, line, lines_left, lines_at_once;

  __attribute__((always_inline)) FetchCursor(const Fetch& fetch, int64_t times)
      : run(fetch.begin + static_cast<uintptr_t>(fetch.first / fetch.run_lines * fetch.run_stride)),
        run_lines(fetch.run_lines),
        run_stride(fetch.run_stride),
        line(fetch.first % fetch.run_lines),
        lines_left(fetch.end - fetch.first),
        lines_at_once(ceil_div(lines_left, times)) {}

  __attribute__((always_inline)) void fetch_share() {
    for (int64_t i = 0; i < lines_at_once && lines_left > 0; ++i, --lines_left) {
      __builtin_prefetch(reinterpret_cast<const void*>(run + static_cast<uintptr_t>(line * kCacheLine)), 0, 2);
      if (++line == run_lines) {
        line = 0;
        run += static_cast<uintptr_t>(run_stride);
      }
    }
  }
};

// Where the sums of a tile are added up over chunks, and where they go after the last.
template <class T>
struct TileResult {
  acc_t<T>* sums;
  int64_t sums_stride;
  int64_t width;                       // columns that exist, at most kPanel
  bool first;                          // no sums of earlier chunks
  T* out = nullptr;                    // rounded results after the last chunk; null: they stay in sums
  int64_t out_stride = 0;
  bool stream = false;                 // out is aligned to cache lines and is not read again soon

  __attribute__((always_inline)) TileResult at_row(int64_t row) const {
    TileResult result = *this;
    result.sums += row * sums_stride;
    if (out != nullptr) result.out += row * out_stride;
    return result;
  }
};

// sums[m, j] (+)= the chunk's sum over steps of a(m, step) * b[step][j]; a(m, step) = a[m * a_row_stride + step * a_step_stride].
// B is the packed type, or T itself where panels lie packed in memory in another precision.
template <class T, int kTileM, class B>
static void outer_tile(const typename OuterOperand<T>::Packed* a, int64_t a_row_stride, int64_t a_step_stride, const B* b,
                       int64_t steps, const TileResult<T>& result, const Fetch& fetch) {
  using Operand = OuterOperand<T>;
  using Acc = acc_t<T>;
  constexpr int kN = kLanes<Acc>;
  Vec<Acc> sum[kTileM][kOuterVectors] = {};
  FetchCursor cursor(fetch, ceil_div(steps, kFetchSteps));
  for (int64_t step = 0; step < steps;) {
    cursor.fetch_share();
    const int64_t end = step + kFetchSteps < steps ? step + kFetchSteps : steps;
    for (; step < end; ++step, a += a_step_stride, b += kPanel<T>) {
      typename Operand::Reg w[kOuterVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kOuterVectors; ++v) {
        if constexpr (__is_same(B, typename Operand::Packed))
          w[v] = Operand::load_packed(b + v * kN);
        else
          w[v] = load_converted(b + v * kN);
      }
#pragma GCC unroll 8
      for (int m = 0; m < kTileM; ++m) {
        const typename Operand::Reg x = Operand::broadcast_packed(a + m * a_row_stride);
#pragma GCC unroll 8
        for (int v = 0; v < kOuterVectors; ++v) sum[m][v] = Operand::multiply_add(sum[m][v], x, w[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTileM; ++m) {
    Acc* sums = result.sums + m * result.sums_stride;
    T* out = result.out + m * result.out_stride;
    if (result.width < kPanel<T>) {
      Acc partial[kPanel<T>];
#pragma GCC unroll 8
      for (int v = 0; v < kOuterVectors; ++v) store(partial + v * kN, sum[m][v]);
      for (int64_t i = 0; i < result.width && !result.first; ++i) partial[i] = sums[i] + partial[i];
      if (result.out == nullptr)
        std::memcpy(sums, partial, static_cast<size_t>(result.width) * sizeof(Acc));
      else
        convert_back(partial, out, result.width);
      continue;
    }
#pragma GCC unroll 8
    for (int v = 0; v < kOuterVectors; ++v) {
      const Vec<Acc> all = result.first ? sum[m][v] : load(sums + v * kN) + sum[m][v];
      if (result.out == nullptr)
        store(sums + v * kN, all);
      else if (result.stream)
        stream_converted(out + v * kN, all);
      else
        store_converted(out + v * kN, all);
    }
  }
}

// Runs f<height>().
template <int kMost, class F>
MOE_INLINE void with_height(int64_t height, const F& f) {
  if constexpr (kMost > 1) {
    if (height < kMost) return with_height<kMost - 1>(height, f);
  }
  f.template operator()<kMost>();
}

// The panel times m rows of packed a, in tiles of nearly equal height.
template <class T, class B>
static void outer_rows(const typename OuterOperand<T>::Packed* a, int64_t a_row_stride, int64_t a_step_stride, int64_t m,
                       const B* b, int64_t steps, const TileResult<T>& result, const Fetch& fetch) {
  const int64_t num_tiles = ceil_div(m, kOuterTileM);
  for (int64_t tile = 0, row = 0; tile < num_tiles; ++tile) {
    const int64_t height = m / num_tiles + (tile < m % num_tiles);
    const auto run = [&]<int kTileM>() {
      outer_tile<T, kTileM>(a + row * a_row_stride, a_row_stride, a_step_stride, b, steps, result.at_row(row),
                            fetch.part(tile, num_tiles));
    };
    with_height<kOuterTileM>(height, run);
    row += height;
  }
}

}  // namespace moe::MOE_ISA
