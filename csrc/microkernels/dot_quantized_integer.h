// dot for weights whose codes are small integers (quantized.h): c[m, n] = sum_k a[m][k] * (code[n][k] * scale[n][group of k]).
//
// Sums are made of integers, a multiply-add for two steps of each column. For that, rows of a become fixed-point numbers:
// in a block of at most kUnitSteps steps a value is a power of two, the block's unit, times an integer of one digit (bfloat16
// and float16) or two (float). What is rounded away is below 2^-15 of the block's largest value, 2^-29 with two digits. A
// block's sum is exact; blocks are joined in float, in order: total += (sum * unit) * scale. So a result has the same
// bits in tiles of any height, with any rows beside it and in every kernel set that has a multiply-add for floats.
// A block with NaN or infinity gives NaN.
//
// (llama.cpp rounds activations to 8 bits in blocks of 32, which is where the idea of integer sums is from; two or four
// times as many bits here keep the result as exact as the plain kernels'.)
#pragma once

#include "microkernels/quantized_panels.h"

namespace moe::MOE_ISA {

typedef int16_t VecI16 __attribute__((vector_size(kVectorBytes)));

// sum[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]
MOE_INLINE VecI32 multiply_add_pairs(VecI32 sum, VecI16 a, VecI16 b) {
#if defined(__AVX512VNNI__)
  return (VecI32)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)
  return sum + (VecI32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (VecI32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return sum + (VecI32)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const VecI32 x = (VecI32)a, y = (VecI32)b;
  return sum + (x >> 16) * (y >> 16) + ((x << 16) >> 16) * ((y << 16) >> 16);
#endif
}

MOE_INLINE void store_words(int32_t* p, VecI32 v) { std::memcpy(p, &v, sizeof v); }

// Bytes of a table of 16, by indices below 16.
MOE_INLINE VecU32 look_up(const int8_t* table, VecU32 indices) {
#if defined(__AVX512F__)
  return (VecU32)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))),
                                     (__m512i)indices);
#elif defined(__AVX2__)
  const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return (VecU32)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(row), (__m256i)indices);
#else
  uint8_t bytes[kVectorBytes];
  std::memcpy(bytes, &indices, sizeof bytes);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(table[byte]);
  std::memcpy(&indices, bytes, sizeof bytes);
  return indices;
#endif
}

// Each codec gives the kPairs pairs of steps that a word holds, and what an integer of one is worth.
template <>
struct Codec<QuantizedFormat::int8> {
  using Scale = float;
  static constexpr int kSteps = 4, kPairs = 2;
  static constexpr float kWorth = 1;
  MOE_INLINE void pairs(VecU32 word, VecI16* out) {
    out[0] = (VecI16)((VecI16)word << 8) >> 8;
    out[1] = (VecI16)word >> 8;
  }
};
template <>
struct Codec<QuantizedFormat::int4> {
  using Scale = bf16;
  static constexpr int kSteps = 8, kPairs = 4;
  static constexpr float kWorth = 1;
  MOE_INLINE void pairs(VecU32 word, VecI16* out) {
    const VecI16 codes = (VecI16)word;
    out[0] = (VecI16)(codes << 12) >> 12;
    out[1] = (VecI16)(codes << 8) >> 12;
    out[2] = (VecI16)(codes << 4) >> 12;
    out[3] = codes >> 12;
  }
};
constexpr int8_t kTwice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // the values of e2m1
template <>
struct Codec<QuantizedFormat::mxfp4> {
  using Scale = bf16;
  static constexpr int kSteps = 8, kPairs = 4;
  static constexpr float kWorth = 0.5f;
  MOE_INLINE void pairs(VecU32 word, VecI16* out) {
    const VecU32 even = look_up(kTwice, word & 0x0f0f0f0fu), odd = look_up(kTwice, (word >> 4) & 0x0f0f0f0fu);
    VecI16 halves[2];
    Codec<QuantizedFormat::int8>::pairs(even, halves);
    out[0] = halves[0], out[2] = halves[1];
    Codec<QuantizedFormat::int8>::pairs(odd, halves);
    out[1] = halves[0], out[3] = halves[1];
  }
};

constexpr int64_t kUnitSteps = 32;                    // 2^15 * 2^7 * 32 is far from the end of an int32
constexpr int64_t kDigitBits = 15;                // by which the second digit lies below the first
constexpr int64_t kUnitBegin = 8;                 // blocks begin at its multiples
template <class T>
constexpr int kDigitsOf = __is_same(T, float) ? 2 : 1;

// Calls f(k, block_end) for the blocks of [begin, end), of which none crosses a group or a multiple of kChunk.
template <class F>
MOE_INLINE void over_blocks(int64_t begin, int64_t end, const F& f) {
  for (int64_t k = begin; k < end; k += kUnitSteps) f(k, k + kUnitSteps < end ? k + kUnitSteps : end);
}

// Rows as fixed-point numbers: row r's digit d of step k is digits[(r * kDigits + d) * stride + k - k0], and the block that
// begins at k has the unit units[r * units_stride + (k - k0) / kUnitBegin].
template <int kDigits>
struct FixedRows {
  int16_t* digits;
  int64_t stride;  // kUnitSteps more than there are steps
  float* units;
  int64_t units_stride;

  __attribute__((always_inline)) VecI16 pair(int64_t row, int digit, int64_t step) const {
    int32_t both;
    std::memcpy(&both, digits + (row * kDigits + digit) * stride + step, sizeof both);
    return (VecI16)(both - VecI32{});
  }
  __attribute__((always_inline)) Vec<float> unit(int64_t row, int64_t step) const {
    return broadcast(units[row * units_stride + step / kUnitBegin]);
  }
};

MOE_INLINE float float_of_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

// Nearest integer of |x| < 2^22, ties to even, in the low bits of the sum.
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23

// One block; zero past its values.
template <int kDigits, class T>
static void fix_block(const T* values, int64_t n, int16_t* digits, int64_t stride, float* unit, float worth) {
  typedef int16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  constexpr int kN = kLanes<float>, kVectors = kUnitSteps / kN;
  Vec<float> x[kVectors];
  VecI32 largest{};
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const int64_t left = n - v * kN;
    x[v] = left >= kN ? load_converted(values + v * kN) : left > 0 ? load_converted_partial(values + v * kN, left) : Vec<float>{};
    const VecI32 magnitude = (VecI32)x[v] & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  int32_t most = 0;
  for (int lane = 0; lane < kN; ++lane) most = largest[lane] > most ? largest[lane] : most;
  // the largest value becomes an integer of 15 bits, or of 29; where it is not finite the unit is NaN, whatever the digits
  constexpr int32_t kBits = kDigits == 1 ? 14 : 28;
  const int32_t exponent = most >> 23 > kBits ? most >> 23 : kBits + 1;
  *unit = exponent < 255 ? float_of_bits(static_cast<uint32_t>(exponent - kBits) << 23) * worth : __builtin_nanf("");
  const Vec<float> inverse = broadcast(float_of_bits(static_cast<uint32_t>(254 + kBits - exponent) << 23));
  const auto put = [&](int digit, int v, Vec<float> rounded) {
    const Half low = __builtin_convertvector((VecI32)rounded, Half);
    std::memcpy(digits + digit * stride + v * kN, &low, sizeof low);
  };
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    Vec<float> scaled = x[v] * inverse;
    if constexpr (kDigits == 2) {
      constexpr float kDigit = 1 << kDigitBits;
      const Vec<float> high = scaled * (1 / kDigit) + kRounder;
      put(0, v, high);
      scaled = scaled - (high - kRounder) * kDigit;
    }
    put(kDigits - 1, v, scaled + kRounder);
  }
}

template <class T>
static void fix_rows(const T* const* rows, int64_t m, int64_t group_size, int64_t k0, int64_t depth, float worth,
                     const FixedRows<kDigitsOf<T>>& out) {
  constexpr int kD = kDigitsOf<T>;
  for (int64_t row = 0; row < m; ++row)
    for (int64_t begin = k0; begin < k0 + depth;) {
      const int64_t group_end = (begin / group_size + 1) * group_size, chunk_end = (begin / kChunk + 1) * kChunk;
      int64_t end = group_end < chunk_end ? group_end : chunk_end;
      if (end > k0 + depth) end = k0 + depth;
      over_blocks(begin, end, [&](int64_t k, int64_t block_end) {
        fix_block<kD>(rows[row] + k, block_end - k, out.digits + row * kD * out.stride + k - k0, out.stride,
                      out.units + row * out.units_stride + (k - k0) / kUnitBegin, worth);
      });
      begin = end;
    }
}

// total + (a block's sum * unit) * scale
template <int kDigits>
MOE_INLINE Vec<float> join(Vec<float> total, const VecI32* sums, Vec<float> unit, Vec<float> scale) {
  Vec<float> sum = __builtin_convertvector(sums[0], Vec<float>);
  if constexpr (kDigits == 2)
    sum = sum * static_cast<float>(1 << kDigitBits) + __builtin_convertvector(sums[1], Vec<float>);
  return (sum * unit) * scale + total;
}

// kM rows, steps [k0, k0 + depth), times kVectors vectors of columns; weights are decoded in registers.
template <class Codec, int kDigits, int kM, int kVectors>
static void few_integers(const FixedRows<kDigits>& a, const QuantizedMatrix& weights, int64_t column, int64_t k0,
                         int64_t depth, float* c, int64_t ldc, int64_t width) {
  const QuantizedColumns<Codec, kVectors> columns(weights, column);
  const uint8_t* panel = weights.panel(column);
  Totals<kM, kVectors> total;
  if (k0 > 0) total.load_from(c, ldc, width);
  for (int64_t chunk = k0; chunk < k0 + depth; chunk += kChunk) {
    const int64_t chunk_end = chunk + kChunk < k0 + depth ? chunk + kChunk : k0 + depth;
    over_groups<Codec>(weights, panel, chunk, chunk_end, [&](const uint8_t* scales, const uint8_t* words, int64_t begin, int64_t end) {
      Vec<float> scale[kVectors];
      columns.scales(scales, scale);
      over_blocks(begin, end, [&](int64_t block, int64_t block_end) {
        VecI32 sum[kM][kVectors][kDigits] = {};
        for (int64_t k = block; k < block_end; k += Codec::kSteps, words += kWordRow) {
          VecU32 word[kVectors];
          columns.words(words, word);
          for (int64_t line = 0; line < kWordRow; line += kCacheLine)
            __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(words) + kQuantizedAhead + line), 0, 2);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            VecI16 pairs[Codec::kPairs];
            Codec::pairs(word[v], pairs);
#pragma GCC unroll 8
            for (int p = 0; p < Codec::kPairs; ++p)
#pragma GCC unroll 8
              for (int m = 0; m < kM; ++m)
#pragma GCC unroll 2
                for (int d = 0; d < kDigits; ++d)
                  sum[m][v][d] = multiply_add_pairs(sum[m][v][d], pairs[p], a.pair(m, d, k - k0 + 2 * p));
          }
        }
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v)
            total.sums[m][v] = join<kDigits>(total.sums[m][v], sum[m][v], a.unit(m, block - k0), scale[v]);
      });
    });
  }
  total.store_to(c, ldc, width);
}

// A chunk of kPanel columns: for every two steps their pairs side by side, and every block's scales.
struct IntegerPanel {
  int32_t pairs[kChunk / 2 * kPanel<float>];
  float scales[kChunk / kUnitBegin * kPanel<float>];  // of the block that begins at step k: at k / kUnitBegin * kPanel
};

// Columns [column, column + kPanel), steps [k0, k0 + depth); columns past `end` are zero.
template <class Codec>
static void decode_integers(const QuantizedMatrix& weights, int64_t column, int64_t end, int64_t k0, int64_t depth,
                            IntegerPanel* out) {
  constexpr int kN = kLanes<float>, kVectors = kPanel<float> < kQuantizedPanel ? kOuterVectors : kQuantizedPanel / kN;
  for (int64_t j = 0; j < kPanel<float>; j += kVectors * kN) {
    if (column + j >= end) {
      for (int64_t step = 0; step < kChunk; step += 2)
        for (int v = 0; v < kVectors; ++v) store_words(out->pairs + step / 2 * kPanel<float> + j + v * kN, VecI32{});
      for (int64_t step = 0; step < kChunk; step += kUnitBegin)
        for (int v = 0; v < kVectors; ++v) store(out->scales + step / kUnitBegin * kPanel<float> + j + v * kN, Vec<float>{});
      continue;
    }
    const QuantizedColumns<Codec, kVectors> columns(weights, column + j);
    over_groups<Codec>(weights, weights.panel(column + j), k0, k0 + depth,
                       [&](const uint8_t* scales, const uint8_t* words, int64_t begin, int64_t group_end) {
                         Vec<float> scale[kVectors];
                         columns.scales(scales, scale);
                         over_blocks(begin, group_end, [&](int64_t k, int64_t) {
                           for (int v = 0; v < kVectors; ++v)
                             store(out->scales + (k - k0) / kUnitBegin * kPanel<float> + j + v * kN, scale[v]);
                         });
                         int32_t* to = out->pairs + (begin - k0) / 2 * kPanel<float> + j;
                         for (int64_t k = begin; k < group_end; k += Codec::kSteps, words += kWordRow) {
                           VecU32 word[kVectors];
                           columns.words(words, word);
                           VecI16 pairs[kVectors][Codec::kPairs];
                           for (int v = 0; v < kVectors; ++v) Codec::pairs(word[v], pairs[v]);
                           for (int p = 0; p < Codec::kPairs; ++p, to += kPanel<float>)
                             for (int v = 0; v < kVectors; ++v) store_words(to + v * kN, (VecI32)pairs[v][p]);
                         }
                       });
  }
}

// kM rows times a panel: totals[m * totals_stride + j] (+)= the chunk's blocks; every total is kept as whole vectors.
template <int kDigits, int kM>
static void integer_tile(const FixedRows<kDigits>& a, int64_t first_row, const IntegerPanel& panel, int64_t group_size,
                         int64_t k0, int64_t depth, float* totals, int64_t totals_stride, bool first, const Fetch& fetch) {
  constexpr int kN = kLanes<float>;
  FetchCursor cursor(fetch, ceil_div(depth, kUnitSteps));
  for (int64_t begin = 0; begin < depth;) {
    const int64_t group_end = ((k0 + begin) / group_size + 1) * group_size - k0, end = group_end < depth ? group_end : depth;
    over_blocks(begin, end, [&](int64_t block, int64_t block_end) {
      cursor.fetch_share();
      VecI32 sum[kM][kOuterVectors][kDigits] = {};
      const int32_t* b = panel.pairs + block / 2 * kPanel<float>;
      for (int64_t step = block; step < block_end; step += 2, b += kPanel<float>) {
        VecI16 pairs[kOuterVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kOuterVectors; ++v) std::memcpy(&pairs[v], b + v * kN, sizeof pairs[v]);
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m)
#pragma GCC unroll 2
          for (int d = 0; d < kDigits; ++d) {
            const VecI16 x = a.pair(first_row + m, d, step);
#pragma GCC unroll 8
            for (int v = 0; v < kOuterVectors; ++v) sum[m][v][d] = multiply_add_pairs(sum[m][v][d], pairs[v], x);
          }
      }
      const float* scales = panel.scales + block / kUnitBegin * kPanel<float>;
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < kOuterVectors; ++v) {
          float* total = totals + m * totals_stride + v * kN;
          const Vec<float> before = first && block == 0 ? Vec<float>{} : load(total);
          store(total, join<kDigits>(before, sum[m][v], a.unit(first_row + m, block), load(scales + v * kN)));
        }
    });
    begin = end;
  }
}

template <class T, class Codec>
static void dot_quantized_integer(const T* const* a, int64_t m, const QuantizedBlock* blocks, int64_t num_blocks,
                                  int64_t ldc, void* scratch) {
  constexpr int kD = kDigitsOf<T>;
  const int64_t in = blocks[0].weights.in, group_size = blocks[0].weights.group_size;
  float* units = static_cast<float*>(scratch);
  if (m <= kFewQuantizedRows) {
    constexpr int64_t kUnits = kFewQuantizedSteps / kUnitBegin, kStride = kFewQuantizedSteps + kUnitSteps;
    static_assert(kFewQuantizedRows * (kUnits * sizeof(float) + kD * kStride * sizeof(int16_t)) <= kScratchBytes<T>);
    const FixedRows<kD> rows{reinterpret_cast<int16_t*>(units + kFewQuantizedRows * kUnits), kStride, units, kUnits};
    for (int64_t k0 = 0; k0 < in; k0 += kFewQuantizedSteps) {
      const int64_t depth = at_most(in - k0, kFewQuantizedSteps);
      fix_rows<T>(a, m, group_size, k0, depth, Codec::kWorth, rows);
      for (int64_t i = 0; i < num_blocks; ++i) {
        const QuantizedBlock& block = blocks[i];
        const auto run = [&]<int kM, int kVectors>(int64_t j) {
          few_integers<Codec, kD, kM, kVectors>(rows, block.weights, block.column + j, k0, depth, block.c + j, ldc,
                                                at_most(block.n - j, kVectors * kLanes<float>));
        };
        // sums of integers and of floats, as many as registers hold beside the words
        constexpr int kWhole = kQuantizedPanel / kLanes<float>, kMost = kRegisters == 32 ? kWhole : kWhole < 4 ? kWhole : 4;
        constexpr int kNarrow = kMost < 2 ? kMost : 2;
        switch (m) {
          case 1: over_columns<1, kMost, kNarrow>(block.n, run); break;
          case 2: over_columns<2, kNarrow, kNarrow>(block.n, run); break;
          case 3: over_columns<3, kNarrow, kNarrow>(block.n, run); break;
          default: over_columns<4, kNarrow, kNarrow>(block.n, run); break;
        }
      }
    }
    return;
  }
  constexpr int64_t kUnits = kChunk / kUnitBegin, kStride = kChunk + kUnitSteps;
  constexpr int kTileM = kOuterTileM / kD;
  const FixedRows<kD> rows{reinterpret_cast<int16_t*>(units + kQuantizedRows * kUnits), kStride, units, kUnits};
  IntegerPanel* panel = reinterpret_cast<IntegerPanel*>(rows.digits + kQuantizedRows * kD * kStride);
  static_assert(kQuantizedRows * (kUnits * sizeof(float) + kD * kStride * sizeof(int16_t)) + sizeof *panel <=
                kScratchBytes<T>);
  for (int64_t k0 = 0; k0 < in; k0 += kChunk) {
    const int64_t depth = at_most(in - k0, kChunk);
    fix_rows<T>(a, m, group_size, k0, depth, Codec::kWorth, rows);
    for (int64_t i = 0; i < num_blocks; ++i) {
      const QuantizedBlock& block = blocks[i];
      const int64_t held = ceil_div(block.n, kQuantizedPanel) * kQuantizedPanel;
      for (int64_t j = 0; j < block.n; j += kPanel<float>) {
        decode_integers<Codec>(block.weights, block.column + j, block.column + held, k0, depth, panel);
        const Fetch fetch = fetch_panels<Codec>(block, j, k0, depth);
        const int64_t num_tiles = ceil_div(m, kTileM), width = at_most(block.n - j, kPanel<float>);
        for (int64_t tile = 0, row = 0; tile < num_tiles; ++tile) {
          const int64_t height = m / num_tiles + (tile < m % num_tiles);
          float partial[kTileM * kPanel<float>];
          float* c = block.c + row * ldc + j;
          const bool whole = width == kPanel<float>;
          if (!whole)
            for (int64_t r = 0; r < height; ++r)
              std::memcpy(partial + r * kPanel<float>, c + r * ldc, static_cast<size_t>(width) * sizeof *c);
          const auto run = [&]<int kM>() {
            integer_tile<kD, kM>(rows, row, *panel, group_size, k0, depth, whole ? c : partial,
                                 whole ? ldc : kPanel<float>, k0 == 0, fetch.part(tile, num_tiles));
          };
          with_height<kTileM>(height, run);
          if (!whole)
            for (int64_t r = 0; r < height; ++r)
              std::memcpy(c + r * ldc, partial + r * kPanel<float>, static_cast<size_t>(width) * sizeof *c);
          row += height;
        }
      }
    }
  }
}

}  // namespace moe::MOE_ISA
