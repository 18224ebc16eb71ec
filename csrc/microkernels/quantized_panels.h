// Reading the panels of quantised weights (quantized.h): their groups, and vectors of words and scales side by side.
#pragma once

#include "microkernels/panels.h"
#include "microkernels/quantized.h"

namespace moe::MOE_ISA {

using VecI32 = VecIndex<float>;

// How a word's codes are read, one a format: kSteps codes in a word, and the type of a group's scales.
template <QuantizedFormat kFormat>
struct Codec;

constexpr int64_t kWordRow = kQuantizedPanel * 4;    // bytes of a panel's words for the same steps
constexpr int64_t kMostCodes = 8;                    // of a word
constexpr int64_t kQuantizedRows = 96;               // the most rows of one call: ExpertMatrices::row_block
constexpr int64_t kFewQuantizedRows = 4;
constexpr int64_t kFewQuantizedSteps = 64 * kChunk;  // rows of a are converted for as many steps at once
static_assert(kQuantizedPanel % kLanes<float> == 0);

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

// Sums of kM rows and kVectors vectors of columns, of which `width` columns exist in memory.
template <int kM, int kVectors>
struct Totals {
  Vec<float> sums[kM][kVectors] = {};

  __attribute__((always_inline)) void load_from(const float* c, int64_t ldc, int64_t width) {
    float lanes[kVectors * kLanes<float>] = {};
    for (int m = 0; m < kM; ++m) {
      std::memcpy(lanes, c + m * ldc, static_cast<size_t>(width) * sizeof *lanes);
      for (int v = 0; v < kVectors; ++v) sums[m][v] = load(lanes + v * kLanes<float>);
    }
  }
  __attribute__((always_inline)) void store_to(float* c, int64_t ldc, int64_t width) const {
    float lanes[kVectors * kLanes<float>];
    for (int m = 0; m < kM; ++m) {
      for (int v = 0; v < kVectors; ++v) store(lanes + v * kLanes<float>, sums[m][v]);
      std::memcpy(c + m * ldc, lanes, static_cast<size_t>(width) * sizeof *lanes);
    }
  }
};

// How far ahead of the words that are decoded memory is fetched into L2: over the end of a page, where the processor's own
// prefetching stops.
constexpr int64_t kQuantizedAhead = 4096;

// Runs f<kM, kVectors>(j) over the columns j of a block, `wide` vectors at once where they lie in memory and else `narrow`.
template <int kM, int kWide, int kNarrow, class F>
MOE_INLINE void over_columns(int64_t n, const F& f) {
  const int64_t held = ceil_div(n, kQuantizedPanel) * kQuantizedPanel;  // columns in memory
  for (int64_t j = 0; j < n;) {
    if (j + kWide * kLanes<float> <= held) {
      f.template operator()<kM, kWide>(j);
      j += kWide * kLanes<float>;
    } else {
      f.template operator()<kM, kNarrow>(j);
      j += kNarrow * kLanes<float>;
    }
  }
}

// The words of `depth` steps of the next panels of a block, in a share for each panel of columns; j: the panel that is
// multiplied meanwhile.
template <class Codec>
static Fetch fetch_panels(const QuantizedBlock& block, int64_t j, int64_t k0, int64_t depth) {
  constexpr int64_t kUnit = kPanel<float> > kQuantizedPanel ? kPanel<float> : kQuantizedPanel;  // columns fetched together
  const int64_t held = ceil_div(block.n, kQuantizedPanel) * kQuantizedPanel;
  const int64_t unit = j / kUnit * kUnit, next = unit + kUnit;
  Fetch fetch;
  if (next >= block.n) return fetch;
  over_groups<Codec>(block.weights, block.weights.panel(block.column + next), k0, k0 + 1,
                     [&](const uint8_t* scales, const uint8_t*, int64_t, int64_t) {
                       fetch.begin = reinterpret_cast<uintptr_t>(scales);
                     });
  fetch.run_lines = ceil_div(depth / Codec::kSteps * kWordRow, kCacheLine);
  fetch.run_stride = block.weights.panel_bytes;
  fetch.end = fetch.run_lines * ((held - next < kUnit ? held - next : kUnit) / kQuantizedPanel);
  return fetch.part((j - unit) / kPanel<float>, kUnit / kPanel<float>);
}

}  // namespace moe::MOE_ISA
