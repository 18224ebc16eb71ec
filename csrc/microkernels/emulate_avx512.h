// The AVX-512 instructions that the kernels use, for processors without them: put before everything else in the build of
// make test-emulated, so that the AVX-512 kernel sets are tested on every machine. Slow. vdpbf16ps flushes denormals and
// adds the odd product first, as Intel's manual (Software Developer's Manual, volume 2) defines it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1

namespace moe::emulated {

template <class Lane, class V>
struct Lanes {
  static constexpr int kCount = sizeof(V) / sizeof(Lane);
  Lane lane[kCount];
  Lanes() = default;
  explicit Lanes(V v) { std::memcpy(lane, &v, sizeof v); }
  V vector() const {
    V v;
    std::memcpy(&v, lane, sizeof v);
    return v;
  }
};

template <class V, class Lane, class F>
inline V make(const F& lane_at) {
  Lanes<Lane, V> out;
  for (int i = 0; i < out.kCount; ++i) out.lane[i] = lane_at(i);
  return out.vector();
}

// kHigh: from the high halves of each 16-byte block
template <class Lane, bool kHigh, class V>
inline V unpack(V a, V b) {
  const Lanes<Lane, V> x(a), y(b);
  constexpr int kBlock = 16 / sizeof(Lane);
  return make<V, Lane>([&](int i) {
    const int at = i / kBlock * kBlock + kHigh * kBlock / 2 + i % kBlock / 2;
    return i % 2 == 0 ? x.lane[at] : y.lane[at];
  });
}

inline float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float flushed(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return (bits & 0x7f800000) == 0 ? from_bits(bits & 0x80000000) : f;
}
inline uint16_t to_bf16(uint32_t bits) {
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// sum + odd product, then + even product
inline __m512 dpbf16(__m512 sum, __m512bh a, __m512bh b) {
  const Lanes<float, __m512> s(sum);
  const Lanes<uint32_t, __m512bh> x(a), y(b);
  return make<__m512, float>([&](int i) {
    const auto product_added = [](float to, uint32_t p, uint32_t q) {
      return flushed(__builtin_fmaf(flushed(from_bits(p)), flushed(from_bits(q)), flushed(to)));
    };
    const float odd = product_added(s.lane[i], x.lane[i] & 0xffff0000, y.lane[i] & 0xffff0000);
    return product_added(odd, x.lane[i] << 16, y.lane[i] << 16);
  });
}

inline __m512i loadu(const void* p) {
  __m512i v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void storeu(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
inline __m512i maskz_loadu_16(__mmask32 mask, const void* p) {
  const uint16_t* from = static_cast<const uint16_t*>(p);
  return make<__m512i, uint16_t>([&](int i) { return mask >> i & 1 ? from[i] : uint16_t{0}; });
}
inline __m512i widen_u16(__m256i v) {
  const Lanes<uint16_t, __m256i> x(v);
  return make<__m512i, uint32_t>([&](int i) { return uint32_t{x.lane[i]}; });
}
inline __m512i setr(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int l, int m, int n, int o,
                    int p) {
  const int lanes[] = {a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
  return loadu(lanes);
}
inline __m512 permute2(__m512 a, __m512i index, __m512 b) {
  const Lanes<float, __m512> x(a), y(b);
  const Lanes<uint32_t, __m512i> at(index);
  return make<__m512, float>([&](int i) { return (at.lane[i] & 16 ? y : x).lane[at.lane[i] & 15]; });
}
inline __m512i madd(__m512i a, __m512i b) {
  const Lanes<int16_t, __m512i> x(a), y(b);
  return make<__m512i, int32_t>([&](int i) {
    return x.lane[2 * i] * y.lane[2 * i] + x.lane[2 * i + 1] * y.lane[2 * i + 1];
  });
}
inline __m512i look_up_bytes(__m512i table, __m512i indices) {
  const Lanes<uint8_t, __m512i> x(table), at(indices);
  return make<__m512i, uint8_t>([&](int i) {
    return at.lane[i] & 0x80 ? uint8_t{0} : x.lane[i / 16 * 16 + (at.lane[i] & 15)];
  });
}
inline __m512i four_times(__m128i v) {
  const __m128i all[] = {v, v, v, v};
  return loadu(all);
}
template <class Half, class V>
inline Half half(V v, int index) {
  Half h;
  std::memcpy(&h, reinterpret_cast<const char*>(&v) + index * sizeof h, sizeof h);
  return h;
}
inline __m512 from_fp16(__m256i v) {
  const __m256 halves[] = {_mm256_cvtph_ps(half<__m128i>(v, 0)), _mm256_cvtph_ps(half<__m128i>(v, 1))};
  return (__m512)loadu(halves);
}
inline __m256i to_fp16(__m512 v) {
  const __m128i halves[] = {_mm256_cvtps_ph(half<__m256>(v, 0), 0), _mm256_cvtps_ph(half<__m256>(v, 1), 0)};
  __m256i out;
  std::memcpy(&out, halves, sizeof out);
  return out;
}
template <class Lane>
inline unsigned sign_bits(__m512i v) {
  const Lanes<Lane, __m512i> x(v);
  unsigned bits = 0;
  for (int i = 0; i < x.kCount; ++i) bits |= static_cast<unsigned>(x.lane[i] < 0) << i;
  return bits;
}
inline __m256bh cvtneps(__m512 v) {
  const Lanes<uint32_t, __m512> x(v);
  return make<__m256bh, uint16_t>([&](int i) { return to_bf16(x.lane[i]); });
}

inline __m512bh cvtne2ps(__m512 high, __m512 low) {
  const Lanes<uint32_t, __m512> x(low), y(high);
  return make<__m512bh, uint16_t>([&](int i) { return to_bf16(i < 16 ? x.lane[i] : y.lane[i - 16]); });
}
// Lane i of `yes` where bit i of the mask is set.
template <class Lane, class V>
inline V blend(uint64_t mask, V no, V yes) {
  const Lanes<Lane, V> x(no), y(yes);
  return make<V, Lane>([&](int i) { return mask >> i & 1 ? y.lane[i] : x.lane[i]; });
}
template <class Lane>
inline __m512i all_ones(uint64_t mask) {
  return make<__m512i, Lane>([&](int i) { return mask >> i & 1 ? Lane(-1) : Lane(0); });
}
template <class Lane, class F>
inline uint64_t lanes_where(__m512i a, __m512i b, const F& holds) {
  const Lanes<Lane, __m512i> x(a), y(b);
  uint64_t bits = 0;
  for (int i = 0; i < x.kCount; ++i) bits |= static_cast<uint64_t>(holds(x.lane[i], y.lane[i])) << i;
  return bits;
}
inline __mmask16 test_32(__m512i a, __m512i b) {
  return static_cast<__mmask16>(lanes_where<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return (x & y) != 0; }));
}
inline __mmask32 testn_16(__m512i a, __m512i b) {
  return static_cast<__mmask32>(lanes_where<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return (x & y) == 0; }));
}
inline __mmask32 greater_u16(__m512i a, __m512i b) {
  return static_cast<__mmask32>(lanes_where<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x > y; }));
}
inline __m512i set1_16(int x) {
  return make<__m512i, uint16_t>([&](int) { return static_cast<uint16_t>(x); });
}

}  // namespace moe::emulated

#undef _mm512_setr_epi32  // a macro in the compiler's header
#define _mm512_add_ps(a, b) ((__m512)((a) + (b)))
#define _mm512_and_si512(a, b) ((__m512i)((a) & (b)))
#define _mm512_broadcast_i32x4(v) moe::emulated::four_times(v)
#define _mm512_castps512_ps256(v) moe::emulated::half<__m256>(v, 0)
#define _mm512_extractf32x8_ps(v, index) moe::emulated::half<__m256>(v, index)
#define _mm512_cvtepu16_epi32(v) moe::emulated::widen_u16(v)
#define _mm512_cmpgt_epu16_mask(a, b) moe::emulated::greater_u16(a, b)
#define _mm512_cvtne2ps_pbh(high, low) moe::emulated::cvtne2ps(high, low)
#define _mm512_cvtneps_pbh(v) moe::emulated::cvtneps(v)
#define _mm512_cvtph_ps(v) moe::emulated::from_fp16(v)
#define _mm512_cvtps_ph(v, rounding) moe::emulated::to_fp16(v)
#define _mm512_dpbf16_ps(sum, a, b) moe::emulated::dpbf16(sum, a, b)
#define _mm512_loadu_si512(p) moe::emulated::loadu(p)
#define _mm512_madd_epi16(a, b) moe::emulated::madd(a, b)
#define _mm512_mask_add_pd(no, mask, a, b) moe::emulated::blend<double>(mask, no, (__m512d)((a) + (b)))
#define _mm512_mask_add_ps(no, mask, a, b) moe::emulated::blend<float>(mask, no, (__m512)((a) + (b)))
#define _mm512_mask_blend_epi16(mask, no, yes) moe::emulated::blend<uint16_t>(mask, no, yes)
#define _mm512_mask_blend_pd(mask, no, yes) moe::emulated::blend<double>(mask, no, yes)
#define _mm512_mask_blend_ps(mask, no, yes) moe::emulated::blend<float>(mask, no, yes)
#define _mm512_maskz_loadu_epi16(mask, p) moe::emulated::maskz_loadu_16(mask, p)
#define _mm512_maskz_mov_epi16(mask, v) moe::emulated::blend<uint16_t>(mask, (__m512i){}, v)
#define _mm512_maskz_mov_pd(mask, v) moe::emulated::blend<double>(mask, (__m512d){}, v)
#define _mm512_maskz_mov_ps(mask, v) moe::emulated::blend<float>(mask, (__m512){}, v)
#define _mm512_movm_epi32(mask) moe::emulated::all_ones<uint32_t>(mask)
#define _mm512_movm_epi64(mask) moe::emulated::all_ones<uint64_t>(mask)
#define _mm512_movepi32_mask(v) moe::emulated::sign_bits<int32_t>(v)
#define _mm512_movepi64_mask(v) moe::emulated::sign_bits<int64_t>(v)
#define _mm512_or_si512(a, b) ((__m512i)((a) | (b)))
#define _mm512_permutex2var_ps(a, index, b) moe::emulated::permute2(a, index, b)
#define _mm512_set1_epi16(x) moe::emulated::set1_16(x)
#define _mm512_set1_pd(x) ((__m512d)((__v8df{} + (x))))
#define _mm512_set1_ps(x) ((__m512)((__v16sf{} + (x))))
#define _mm512_set1_epi32(x) (__m512i)((__v16si{} + (x)))
#define _mm512_setr_epi32(...) moe::emulated::setr(__VA_ARGS__)
#define _mm512_setzero_si512() (__m512i{})
#define _mm512_shuffle_epi8(table, indices) moe::emulated::look_up_bytes(table, indices)
#define _mm512_slli_epi32(v, bits) ((__m512i)((__v16su)(v) << (bits)))
#define _mm512_storeu_si512(p, v) moe::emulated::storeu(p, v)
#define _mm512_stream_si512(p, v) moe::emulated::storeu(p, v)
#define _mm512_test_epi32_mask(a, b) moe::emulated::test_32(a, b)
#define _mm512_testn_epi16_mask(a, b) moe::emulated::testn_16(a, b)
#define _mm512_unpackhi_epi16(a, b) moe::emulated::unpack<uint16_t, true>(a, b)
#define _mm512_unpacklo_epi16(a, b) moe::emulated::unpack<uint16_t, false>(a, b)
#define _mm512_unpackhi_ps(a, b) moe::emulated::unpack<float, true>(a, b)
#define _mm512_unpacklo_ps(a, b) moe::emulated::unpack<float, false>(a, b)
#define _mm512_unpackhi_pd(a, b) moe::emulated::unpack<double, true>(a, b)
#define _mm512_unpacklo_pd(a, b) moe::emulated::unpack<double, false>(a, b)
