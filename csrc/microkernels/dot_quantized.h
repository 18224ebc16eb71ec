// dot for quantised weights (quantized.h): c[m, n] = sum_k a[m][k] * (code[n][k] * scale[n][group of k]).
//
// A weight is its code's value times its scale, rounded to float; sums follow tile.h. Up to kFewRows rows of a (decode)
// are multiplied by weights that are decoded in registers: the panels are read once, as one stream. More rows share
// weights that are decoded into a panel of floats in L1, a chunk at a time: same weights, same chains, same bits.
#pragma once

#include "microkernels/panels.h"
#include "microkernels/quantized.h"

namespace moe::MOE_ISA {

typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));

// Codes in two's complement.
template <int kBits>
struct IntegerCodes {
  static constexpr int kSteps = 32 / kBits;  // codes in a word
  MOE_INLINE Vec<float> value(VecU32 word, int step) {
    const VecI32 code = (VecI32)(word << (32 - kBits * (step + 1))) >> (32 - kBits);
    return __builtin_convertvector(code, Vec<float>);
  }
};

// A sign, kExponent bits of exponent with bias kBias and kMantissa bits of mantissa; no infinities. A denormal is read
// with the exponent of the smallest normal number and an implicit one, which is then subtracted: as denormal floats they
// would be slow.
template <int kExponent, int kMantissa, int kBias>
struct FloatCodes {
  static constexpr int kBits = 1 + kExponent + kMantissa, kSteps = 32 / kBits;
  MOE_INLINE Vec<float> value(VecU32 word, int step) {
    const VecU32 magnitude = (word >> (kBits * step)) & ((1u << (kBits - 1)) - 1);
    const VecU32 denormal = (VecU32)((VecI32)magnitude < (1 << kMantissa));
    const VecU32 bits = (magnitude << (23 - kMantissa)) + ((127u - kBias) << 23) + (denormal & (1u << 23));
    const VecU32 smallest = denormal & ((128u - kBias) << 23);
    const VecU32 sign = (word << (32 - kBits * (step + 1))) & 0x80000000u;
    return (Vec<float>)((VecU32)((Vec<float>)bits - (Vec<float>)smallest) | sign);
  }
};

template <QuantizedFormat kFormat>
struct Codec;
template <>
struct Codec<QuantizedFormat::int8> : IntegerCodes<8> {
  using Scale = float;
};
template <>
struct Codec<QuantizedFormat::int4> : IntegerCodes<4> {
  using Scale = bf16;
};
template <>
struct Codec<QuantizedFormat::fp8> : FloatCodes<4, 3, 7> {
  using Scale = float;
};
template <>
struct Codec<QuantizedFormat::mxfp4> : FloatCodes<2, 1, 1> {
  using Scale = bf16;
};

constexpr int64_t kWordRow = kQuantizedPanel * 4;    // bytes of a panel's words for the same steps
constexpr int64_t kMostCodes = 8;                    // of a word
constexpr int64_t kQuantizedRows = 96;               // the most rows of one call: ExpertMatrices::row_block
constexpr int64_t kFewQuantizedRows = 4;
constexpr int64_t kFewQuantizedSteps = 64 * kChunk;  // rows of a are converted for as many steps at once
static_assert(kQuantizedPanel % kLanes<float> == 0);
static_assert(kFewQuantizedRows * kFewQuantizedSteps * sizeof(float) <= kScratchBytes<float>);
static_assert((kQuantizedRows + kPanel<float>) * kChunk * sizeof(float) <= kScratchBytes<bf16>);

// Calls f(scales, words, k, end) for the part [k, end) of each group in [begin, end), where `panel` is a panel's first byte.
template <class Codec, class F>
MOE_INLINE void over_groups(const QuantizedMatrix& weights, const uint8_t* panel, int64_t begin, int64_t end, const F& f) {
  constexpr int64_t kScales = kQuantizedPanel * static_cast<int64_t>(sizeof(typename Codec::Scale));
  const int64_t size = weights.group_size, group = begin / size;
  const uint8_t* scales = panel + group * (kScales + size / Codec::kSteps * kWordRow);
  for (int64_t k = begin, first = group * size; k < end; first += size) {
    const int64_t group_end = first + size < end ? first + size : end;
    f(scales, scales + kScales + (k - first) / Codec::kSteps * kWordRow, k, group_end);
    k = group_end;
    scales += kScales + size / Codec::kSteps * kWordRow;
  }
}

// kVectors vectors of columns from `column` on, which may run on into the next panel.
template <class Codec, int kVectors>
struct QuantizedColumns {
  int64_t offset[kVectors];  // in columns: of a vector's first column in its panel
  int64_t panel[kVectors];   // in bytes: of its panel after the first

  __attribute__((always_inline)) QuantizedColumns(const QuantizedMatrix& weights, int64_t column) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = column % kQuantizedPanel + v * kLanes<float>;
      offset[v] = at % kQuantizedPanel;
      panel[v] = at / kQuantizedPanel * weights.panel_bytes;
    }
  }
  __attribute__((always_inline)) void scales(const uint8_t* p, Vec<float>* out) const {
    using Scale = typename Codec::Scale;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      out[v] = load_converted(reinterpret_cast<const Scale*>(p + panel[v]) + offset[v]);
  }
  __attribute__((always_inline)) void words(const uint8_t* p, VecU32* out) const {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) std::memcpy(&out[v], p + panel[v] + offset[v] * 4, sizeof out[v]);
  }
};

// How far ahead of the words that are decoded memory is fetched into L2: over the end of a page, where the processor's own
// prefetching stops.
constexpr int64_t kQuantizedAhead = 4096;

// kM rows of converted a, steps [k0, k0 + depth), times kVectors vectors of columns.
template <class Codec, int kM, int kVectors>
static void few_quantized(const float* a, int64_t a_stride, const QuantizedMatrix& weights, int64_t column, int64_t k0,
                          int64_t depth, float* c, int64_t ldc, int64_t width) {
  constexpr int kN = kLanes<float>;
  const QuantizedColumns<Codec, kVectors> columns(weights, column);
  const uint8_t* panel = weights.panel(column);
  float lanes[kVectors * kN] = {};
  Vec<float> total[kM][kVectors];
  for (int m = 0; m < kM && k0 > 0; ++m) {
    std::memcpy(lanes, c + m * ldc, static_cast<size_t>(width) * sizeof *lanes);
    for (int v = 0; v < kVectors; ++v) total[m][v] = load(lanes + v * kN);
  }
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
      for (int v = 0; v < kVectors; ++v) total[m][v] = chunk == 0 ? sum[m][v] : total[m][v] + sum[m][v];
  }
  for (int m = 0; m < kM; ++m) {
    for (int v = 0; v < kVectors; ++v) store(lanes + v * kN, total[m][v]);
    std::memcpy(c + m * ldc, lanes, static_cast<size_t>(width) * sizeof *lanes);
  }
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
    return kColumns;
  };
  // as many sums as registers hold beside the words; more vectors hide the latency of a single row's multiply-adds
  constexpr int kWhole = kQuantizedPanel / kLanes<float>, kWide = kRegisters == 32 ? 2 * kWhole : kWhole < 4 ? kWhole : 4;
  constexpr int kNarrow = kRegisters == 32 ? kWhole : 2;
  constexpr int64_t kWideColumns = kWide * kLanes<float>;
  const int64_t held = ceil_div(block.n, kQuantizedPanel) * kQuantizedPanel;  // columns in memory
  for (int64_t j = 0; j < block.n;) {
    const bool wide = j + kWideColumns <= held;
    switch (m) {
      case 1: j += wide ? run.template operator()<1, kWide>(j) : run.template operator()<1, kNarrow>(j); break;
      case 2: j += wide ? run.template operator()<2, kWide>(j) : run.template operator()<2, kNarrow>(j); break;
      case 3: j += run.template operator()<3, kNarrow>(j); break;
      default: j += run.template operator()<4, kNarrow>(j); break;
    }
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
static void dot_codec(const T* const* a, int64_t m, const QuantizedBlock* blocks, int64_t num_blocks, int64_t ldc,
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
  constexpr int64_t kUnit = kPanel<float> > kQuantizedPanel ? kPanel<float> : kQuantizedPanel;  // columns fetched together
  for (int64_t k0 = 0; k0 < in; k0 += kChunk) {
    const int64_t depth = at_most(in - k0, kChunk);
    convert_rows(a, m, k0, depth, kChunk, packed_a);
    for (int64_t i = 0; i < num_blocks; ++i) {
      const QuantizedBlock& block = blocks[i];
      const int64_t held = ceil_div(block.n, kQuantizedPanel) * kQuantizedPanel;
      for (int64_t j = 0; j < block.n; j += kPanel<float>) {
        decode_panel<Codec>(block.weights, block.column + j, block.column + held, k0, depth, panel);
        // the same steps of the next panels, in shares
        Fetch fetch;
        const int64_t unit = j / kUnit * kUnit, next = unit + kUnit;
        if (next < block.n) {
          over_groups<Codec>(block.weights, block.weights.panel(block.column + next), k0, k0 + 1,
                             [&](const uint8_t* scales, const uint8_t*, int64_t, int64_t) {
                               fetch.begin = reinterpret_cast<uintptr_t>(scales);
                             });
          fetch.run_lines = ceil_div(depth / Codec::kSteps * kWordRow, kCacheLine);
          fetch.run_stride = block.weights.panel_bytes;
          fetch.end = fetch.run_lines * (at_most(held - next, kUnit) / kQuantizedPanel);
          fetch = fetch.part((j - unit) / kPanel<float>, kUnit / kPanel<float>);
        }
        const TileResult<float> result{
            .sums = block.c + j, .sums_stride = ldc, .width = at_most(block.n - j, kPanel<float>), .first = k0 == 0};
        outer_rows<float>(packed_a, kChunk, 1, m, panel, depth, result, fetch);
      }
    }
  }
}

// See Microkernels::dot_quantized.
template <class T>
static void dot_quantized(const T* const* a, int64_t m, const QuantizedBlock* blocks, int64_t num_blocks, int64_t ldc,
                          void* scratch) {
  if (blocks[0].weights.in == 0) {
    for (int64_t i = 0; i < num_blocks; ++i) fill_zero_rows<float>(blocks[i].c, m, blocks[i].n, ldc);
    return;
  }
  switch (blocks[0].weights.format) {
    case QuantizedFormat::int8:
      return dot_codec<T, Codec<QuantizedFormat::int8>>(a, m, blocks, num_blocks, ldc, scratch);
    case QuantizedFormat::int4:
      return dot_codec<T, Codec<QuantizedFormat::int4>>(a, m, blocks, num_blocks, ldc, scratch);
    case QuantizedFormat::fp8:
      return dot_codec<T, Codec<QuantizedFormat::fp8>>(a, m, blocks, num_blocks, ldc, scratch);
    case QuantizedFormat::mxfp4:
      return dot_codec<T, Codec<QuantizedFormat::mxfp4>>(a, m, blocks, num_blocks, ldc, scratch);
  }
}

}  // namespace moe::MOE_ISA
