// dot for weights whose codes are floating-point numbers (e4m3): c[m, n] = sum_k a[m][k] * (value[n][k] * scale[n][group of k]).
//
// A weight is its code's value times its scale, rounded to float; sums follow tile.h. Up to kFewQuantizedRows rows of a
// (decode) are multiplied by weights that are decoded in registers: the panels are read once, as one stream. More rows share
// weights that are decoded into a panel of floats in L1, a chunk at a time: same weights, same chains, same bits.
#pragma once

#include "microkernels/quantized_panels.h"

namespace moe::MOE_ISA {

// A sign, 4 bits of exponent with bias 7 and 3 of mantissa; no infinities. A denormal is read with the exponent of the
// smallest normal number and an implicit one, which is then subtracted: as denormal floats they would be slow.
template <>
struct Codec<QuantizedFormat::fp8> {
  using Scale = float;
  static constexpr int kSteps = 4;
  MOE_INLINE Vec<float> value(VecU32 word, int step) {
    constexpr uint32_t kOne = 1u << 23;
    const int byte = step / 2 + step % 2 * 2;  // where quantized.h puts the step's code
    const VecU32 magnitude = (word >> (8 * byte)) & 127u;
    const VecU32 denormal = (VecU32)((VecI32)magnitude < 8);
    const VecU32 bits = (magnitude << 20) + 120u * kOne + (denormal & kOne);
    const VecU32 smallest = denormal & (121u * kOne);
    const VecU32 sign = (word << (24 - 8 * byte)) & 0x80000000u;
    return (Vec<float>)((VecU32)((Vec<float>)bits - (Vec<float>)smallest) | sign);
  }
};

static_assert(kFewQuantizedRows * kFewQuantizedSteps * sizeof(float) <= kScratchBytes<float>);
static_assert((kQuantizedRows + kPanel<float>) * kChunk * sizeof(float) <= kScratchBytes<bf16>);

// kM rows of converted a, steps [k0, k0 + depth), times kVectors vectors of columns.
template <class Codec, int kM, int kVectors>
static void few_quantized(const float* a, int64_t a_stride, const QuantizedMatrix& weights, int64_t column, int64_t k0,
                          int64_t depth, float* c, int64_t ldc, int64_t width) {
  const QuantizedColumns<Codec, kVectors> columns(weights, column);
  const uint8_t* panel = weights.panel(column);
  Totals<kM, kVectors> total;
  if (k0 > 0) total.load_from(c, ldc, width);
  for (int64_t chunk = k0; chunk < k0 + depth; chunk += kChunk) {
    Vec<float> sum[kM][kVectors] = {};
    const int64_t chunk_end = chunk + kChunk < k0 + depth ? chunk + kChunk : k0 + depth;
    over_groups<Codec>(weights, panel, chunk, chunk_end, [&](const uint8_t* scales, const uint8_t* words, int64_t k, int64_t end) {
      Vec<float> scale[kVectors];
      columns.scales(scales, scale);
      for (; k < end; k += Codec::kSteps, words += kWordRow) {
        VecU32 word[kVectors];
        columns.words(words, word);
        for (int64_t line = 0; line < kWordRow; line += kCacheLine)
          __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(words) + kQuantizedAhead + line), 0, 2);
#pragma GCC unroll 8
        for (int step = 0; step < Codec::kSteps; ++step)
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            const Vec<float> w = Codec::value(word[v], step) * scale[v];
#pragma GCC unroll 8
            for (int m = 0; m < kM; ++m) sum[m][v] = broadcast(a[m * a_stride + k - k0 + step]) * w + sum[m][v];
          }
      }
    });
    for (int m = 0; m < kM; ++m)
      for (int v = 0; v < kVectors; ++v) total.sums[m][v] = chunk == 0 ? sum[m][v] : total.sums[m][v] + sum[m][v];
  }
  total.store_to(c, ldc, width);
}

// out[step * kPanel + j]: weights (column + j, k0 + step) for step in [0, depth); columns past `end` are zero.
template <class Codec>
static void decode_panel(const QuantizedMatrix& weights, int64_t column, int64_t end, int64_t k0, int64_t depth, float* out) {
  constexpr int kN = kLanes<float>, kVectors = kPanel<float> < kQuantizedPanel ? kOuterVectors : kQuantizedPanel / kN;
  for (int64_t j = 0; j < kPanel<float>; j += kVectors * kN) {
    if (column + j >= end) {
      for (int64_t step = 0; step < depth; ++step)
        for (int v = 0; v < kVectors; ++v) store(out + step * kPanel<float> + j + v * kN, Vec<float>{});
      continue;
    }
    const QuantizedColumns<Codec, kVectors> columns(weights, column + j);
    over_groups<Codec>(weights, weights.panel(column + j), k0, k0 + depth,
                       [&](const uint8_t* scales, const uint8_t* words, int64_t k, int64_t group_end) {
                         Vec<float> scale[kVectors];
                         columns.scales(scales, scale);
                         float* to = out + (k - k0) * kPanel<float> + j;
                         for (; k < group_end; k += Codec::kSteps, words += kWordRow) {
                           VecU32 word[kVectors];
                           columns.words(words, word);
#pragma GCC unroll 8
                           for (int step = 0; step < Codec::kSteps; ++step, to += kPanel<float>)
#pragma GCC unroll 8
                             for (int v = 0; v < kVectors; ++v)
                               store(to + v * kN, Codec::value(word[v], step) * scale[v]);
                         }
                       });
  }
}

template <class Codec>
static void dot_few_quantized(const float* a, int64_t a_stride, int64_t m, const QuantizedBlock& block, int64_t k0,
                              int64_t depth, int64_t ldc) {
  const auto run = [&]<int kM, int kVectors>(int64_t j) {
    constexpr int64_t kColumns = kVectors * kLanes<float>;
    few_quantized<Codec, kM, kVectors>(a, a_stride, block.weights, block.column + j, k0, depth, block.c + j, ldc,
                                       block.n - j < kColumns ? block.n - j : kColumns);
  };
  // as many sums as registers hold beside the words; more vectors hide the latency of a single row's multiply-adds
  constexpr int kWhole = kQuantizedPanel / kLanes<float>, kWide = kRegisters == 32 ? 2 * kWhole : kWhole < 4 ? kWhole : 4;
  constexpr int kNarrow = kRegisters == 32 ? kWhole : 2;
  switch (m) {
    case 1: return over_columns<1, kWide, kNarrow>(block.n, run);
    case 2: return over_columns<2, kWide, kNarrow>(block.n, run);
    case 3: return over_columns<3, kNarrow, kNarrow>(block.n, run);
    default: return over_columns<4, kNarrow, kNarrow>(block.n, run);
  }
}

// rows[m][0, depth) as floats, zero up to whole words
template <class T>
static void convert_rows(const T* const* rows, int64_t m, int64_t k0, int64_t depth, int64_t stride, float* out) {
  for (int64_t row = 0; row < m; ++row, out += stride) {
    convert(rows[row] + k0, out, depth);
    for (int64_t k = depth; k < ceil_div(depth, kMostCodes) * kMostCodes; ++k) out[k] = 0;
  }
}

template <class T, class Codec>
static void dot_quantized_float(const T* const* a, int64_t m, const QuantizedBlock* blocks, int64_t num_blocks, int64_t ldc,
                      void* scratch) {
  const auto at_most = [](int64_t x, int64_t limit) { return x < limit ? x : limit; };
  const int64_t in = blocks[0].weights.in;
  float* packed_a = static_cast<float*>(scratch);
  if (m <= kFewQuantizedRows) {
    for (int64_t k0 = 0; k0 < in; k0 += kFewQuantizedSteps) {
      const int64_t depth = at_most(in - k0, kFewQuantizedSteps), stride = ceil_div(depth, kMostCodes) * kMostCodes;
      convert_rows(a, m, k0, depth, stride, packed_a);
      for (int64_t i = 0; i < num_blocks; ++i)
        dot_few_quantized<Codec>(packed_a, stride, m, blocks[i], k0, depth, ldc);
    }
    return;
  }
  float* panel = packed_a + kQuantizedRows * kChunk;
  for (int64_t k0 = 0; k0 < in; k0 += kChunk) {
    const int64_t depth = at_most(in - k0, kChunk);
    convert_rows(a, m, k0, depth, kChunk, packed_a);
    for (int64_t i = 0; i < num_blocks; ++i) {
      const QuantizedBlock& block = blocks[i];
      const int64_t held = ceil_div(block.n, kQuantizedPanel) * kQuantizedPanel;
      for (int64_t j = 0; j < block.n; j += kPanel<float>) {
        decode_panel<Codec>(block.weights, block.column + j, block.column + held, k0, depth, panel);
        const TileResult<float> result{
            .sums = block.c + j, .sums_stride = ldc, .width = at_most(block.n - j, kPanel<float>), .first = k0 == 0};
        outer_rows<float>(packed_a, kChunk, 1, m, panel, depth, result,
                          fetch_panels<Codec>(block, j, k0, depth));
      }
    }
  }
}

}  // namespace moe::MOE_ISA
