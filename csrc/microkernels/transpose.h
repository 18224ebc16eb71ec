// A square of lanes in registers, turned: kLanes vectors of kLanes elements.
#pragma once

#include "microkernels/vec.h"

namespace moe::MOE_ISA {

// Units of kUnit lanes of a and b in turns: from the low halves, or the high halves, of 16-byte blocks; units that are
// whole blocks from those of the vector. One instruction each (vunpcklps, vunpcklpd, vperm2f128 …).
template <class Acc, int kUnit, bool kHigh>
MOE_INLINE Vec<Acc> unpack(Vec<Acc> a, Vec<Acc> b) {
  constexpr int kN = kLanes<Acc>, kBlock = 16 / static_cast<int>(sizeof(Acc)), kSpan = kUnit < kBlock ? kBlock : kN;
  VecIndex<Acc> index{};
  for (int i = 0; i < kN; ++i) {
    const int at = i % kSpan, unit = at / kUnit;
    index[i] = (unit % 2) * kN + i / kSpan * kSpan + kHigh * kSpan / 2 + unit / 2 * kUnit + at % kUnit;
  }
  return __builtin_shuffle(a, b, index);
}

// From squares of kUnit lanes to squares of kSquare.
template <class Acc, int kUnit, int kSquare>
MOE_INLINE void transpose_units(Vec<Acc>* v) {
  constexpr int kN = kLanes<Acc>, kBlock = 16 / static_cast<int>(sizeof(Acc));
  Vec<Acc> out[kN];
#pragma GCC unroll 16
  for (int group = 0; group < kN; group += 2 * kUnit)
#pragma GCC unroll 16
    for (int i = 0; i < kUnit; ++i) {
      const Vec<Acc> a = v[group + i], b = v[group + kUnit + i];
      out[kUnit < kBlock ? group + 2 * i : group + i] = unpack<Acc, kUnit, false>(a, b);
      out[kUnit < kBlock ? group + 2 * i + 1 : group + kUnit + i] = unpack<Acc, kUnit, true>(a, b);
    }
#pragma GCC unroll 16
  for (int i = 0; i < kN; ++i) v[i] = out[i];
  if constexpr (2 * kUnit < kSquare) transpose_units<Acc, 2 * kUnit, kSquare>(v);
}

// v[i][j] becomes v[j][i], for kLanes vectors.
template <class Acc>
MOE_INLINE void transpose(Vec<Acc>* v) {
  static_assert(kVectorBytes <= 32);
  transpose_units<Acc, 1, kLanes<Acc>>(v);
}

// The same for kLanes rows in memory. Halves of two rows are put together as they are loaded, which leaves only the cheap
// shuffles inside 16-byte blocks (Zen 3: two a cycle, one of the others).
template <class Acc>
MOE_INLINE void load_transposed(const void* rows, int64_t row_bytes, Vec<Acc>* out) {
  constexpr int kN = kLanes<Acc>, kBlock = 16 / static_cast<int>(sizeof(Acc));
  const char* row = static_cast<const char*>(rows);
#if defined(__AVX2__)
#pragma GCC unroll 16
  for (int i = 0; i < kN; ++i) {
    const char* half = row + i % kBlock * row_bytes + i / kBlock * 16;
    out[i] = (Vec<Acc>)_mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half))),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + kBlock * row_bytes)), 1);
  }
#else
#pragma GCC unroll 16
  for (int i = 0; i < kN; ++i) std::memcpy(&out[i], row + i * row_bytes, sizeof out[i]);
#endif
  transpose_units<Acc, 1, kBlock>(out);
}

}  // namespace moe::MOE_ISA
