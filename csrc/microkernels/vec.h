// One vector type for every instruction set, and the conversions between it and the element types.
//
// Everything here has internal linkage or lives in the instruction set's own namespace: a weak symbol compiled for
// AVX-512 must never be the copy that the linker keeps for all (tests/test_native_build.py looks for them).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/dtype.h"

#define MOE_INLINE static inline __attribute__((always_inline))

namespace moe::MOE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

template <class Acc>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Acc));

template <class Acc>
struct vector_of;
template <>
struct vector_of<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct vector_of<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <class Acc>
using Vec = typename vector_of<Acc>::type;
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));

// Integers of the lanes' width: what comparisons give (-1 or 0 a lane) and shuffles take.
template <class Acc>
struct index_of;
template <>
struct index_of<float> {
  typedef int32_t type;
};
template <>
struct index_of<double> {
  typedef int64_t type;
};
template <class Acc>
using Index = typename index_of<Acc>::type;
template <class Acc>
struct vector_index_of {
  typedef Index<Acc> type __attribute__((vector_size(kVectorBytes)));
};
template <class Acc>
using VecIndex = typename vector_index_of<Acc>::type;

template <class Acc>
MOE_INLINE Vec<Acc> load(const Acc* p) {
  Vec<Acc> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class Acc>
MOE_INLINE void store(Acc* p, Vec<Acc> v) {
  std::memcpy(p, &v, sizeof v);
}

// x - 0 and not x + 0: the compiler may drop the first (-0 - 0 is -0) and then broadcasts straight from memory
template <class Acc>
MOE_INLINE Vec<Acc> broadcast(Acc x) {
  return x - Vec<Acc>{};
}

// Bit i: whether lane i of a comparison holds.
template <class Acc>
MOE_INLINE uint64_t lane_bits(VecIndex<Acc> holds) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) return _mm512_movepi32_mask((__m512i)holds);
  return _mm512_movepi64_mask((__m512i)holds);
#elif defined(__AVX2__)
  if constexpr (sizeof(Acc) == 4) return static_cast<uint32_t>(_mm256_movemask_ps((__m256)holds));
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)holds));
#elif defined(__x86_64__)
  if constexpr (sizeof(Acc) == 4) return static_cast<uint32_t>(_mm_movemask_ps((__m128)holds));
  return static_cast<uint32_t>(_mm_movemask_pd((__m128d)holds));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes<Acc>; ++i) bits |= static_cast<uint64_t>(holds[i] & 1) << i;
  return bits;
#endif
}

template <class Acc>
MOE_INLINE Vec<Acc> larger_of(Vec<Acc> a, Vec<Acc> b) {
  return a > b ? a : b;  // b where a is NaN
}

template <class Acc>
MOE_INLINE Acc reduce_largest(Vec<Acc> v) {
  VecIndex<Acc> lane;
  for (int i = 0; i < kLanes<Acc>; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int half = kLanes<Acc> / 2; half > 0; half /= 2) v = larger_of<Acc>(v, __builtin_shuffle(v, lane ^ half));
  return v[0];
}

// --- scalar conversions (round to nearest even; NaN stays NaN) ---

MOE_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

MOE_INLINE bf16 to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
#if defined(__AVX512BF16__)
  // as vcvtneps2bf16 does, so that a row's tail rounds like its vectors: denormals become zero
  if ((bits & 0x7f800000) == 0) bits &= 0x80000000;
#endif
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(f == f ? rounded : (bits >> 16) | 0x40)};
}

MOE_INLINE float to_float(fp16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // shift the exponent and mantissa into place, then scale by 2^112 to move the bias from 15 to 127: exact, also for
  // denormals; inf and NaN (exponent 31) get the exponent 255 explicitly
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((x.bits & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000;
  bits |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

MOE_INLINE fp16 to_fp16(float f) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
  if (bits < 0x38800000) {  // denormal: adding 0.5 makes the processor round at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000))};
  }
  const uint32_t rounded = bits - 0x38000000 + 0xfff + ((bits >> 13) & 1);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
}

MOE_INLINE float to_acc(float x) { return x; }
MOE_INLINE double to_acc(double x) { return x; }
MOE_INLINE float to_acc(bf16 x) { return to_float(x); }
MOE_INLINE float to_acc(fp16 x) { return to_float(x); }

template <class T>
MOE_INLINE T from_acc(acc_t<T> x) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    return x;
  } else if constexpr (__is_same(T, bf16)) {
    return to_bf16(x);
  } else {
    return to_fp16(x);
  }
}

// --- blocks ---

// kLanes elements, converted.
template <class T>
MOE_INLINE Vec<acc_t<T>> load_converted(const T* p) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    return load(p);
  } else if constexpr (__is_same(T, bf16)) {
#if defined(__AVX512F__)
    // gcc 12 widens a 32-byte vector in two halves that it then joins: five instructions
    return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#else
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    Half half;
    std::memcpy(&half, p, sizeof half);
    return (Vec<float>)(__builtin_convertvector(half, VecU32) << 16);
#endif
  } else {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Vec<float> v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
    return v;
#endif
  }
}

// The first n < kLanes elements, converted; the other lanes are zero.
template <class T>
MOE_INLINE Vec<acc_t<T>> load_converted_partial(const T* p, int64_t n) {
  T padded[kLanes<acc_t<T>>] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return load_converted(padded);
}

template <class T>
MOE_INLINE void store_converted(T* p, Vec<acc_t<T>> v) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    store(p, v);
  } else if constexpr (__is_same(T, bf16)) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    const VecU32 bits = (VecU32)v;
    const VecU32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const VecU32 is_number = (VecU32)(v == v);
    const Half half = __builtin_convertvector((rounded & is_number) | (((bits >> 16) | 0x40) & ~is_number), Half);
    std::memcpy(p, &half, sizeof half);
#endif
  } else {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes<float>; ++i) p[i] = to_fp16(v[i]);
#endif
  }
}

// Whether whole cache lines of T can be stored past the caches.
#if defined(__AVX512F__)
template <class T>
constexpr bool kCanStream = true;
#elif defined(__AVX2__)
template <class T>
constexpr bool kCanStream = sizeof(T) == sizeof(acc_t<T>);
#else
template <class T>
constexpr bool kCanStream = false;
#endif

// store_converted past the caches; p aligned to the bytes that are stored. stream_fence() before anyone else reads them.
template <class T>
MOE_INLINE void stream_converted(T* p, Vec<acc_t<T>> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
  } else {
    T half[kLanes<acc_t<T>>];
    store_converted(half, v);
    __m256i bits;
    std::memcpy(&bits, half, sizeof bits);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
  }
#elif defined(__AVX2__)
  if constexpr (kCanStream<T>)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
  else
    store_converted(p, v);
#else
  store_converted(p, v);
#endif
}
MOE_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// out[0, n) = in[0, n), converted
template <class T>
MOE_INLINE void convert(const T* in, acc_t<T>* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<acc_t<T>> <= n; i += kLanes<acc_t<T>>) store(out + i, load_converted(in + i));
  for (; i < n; ++i) out[i] = to_acc(in[i]);
}

template <class T>
MOE_INLINE void convert_back(const acc_t<T>* in, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<acc_t<T>> <= n; i += kLanes<acc_t<T>>) store_converted(out + i, load(in + i));
  for (; i < n; ++i) out[i] = from_acc<T>(in[i]);
}

// --- sums of lanes ---

// The sum of a vector's lanes, added in one fixed tree: sums of four vectors at once use the same tree (reduce4), so a
// result has the same bits in whatever group it is reduced.
template <class Acc>
MOE_INLINE Acc reduce(Vec<Acc> v) {
  Acc lanes[kLanes<Acc>];
  std::memcpy(lanes, &v, sizeof v);
  // 16-byte blocks first: (0 + 1) + (2 + 3); then inside the block: (even 0 + even 1) + (odd 0 + odd 1)
  constexpr int kBlock = 16 / static_cast<int>(sizeof(Acc));
  constexpr int kBlocks = kVectorBytes / 16;
  Acc block_sums[kBlocks];
  for (int b = 0; b < kBlocks; ++b) {
    const Acc* x = lanes + b * kBlock;
    if constexpr (kBlock == 4)
      block_sums[b] = (x[0] + x[2]) + (x[1] + x[3]);
    else
      block_sums[b] = x[0] + x[1];
  }
  if constexpr (kBlocks == 4)
    return (block_sums[0] + block_sums[2]) + (block_sums[1] + block_sums[3]);
  else if constexpr (kBlocks == 2)
    return block_sums[0] + block_sums[1];
  else
    return block_sums[0];
}

// out[i] = reduce(v_i)
template <class Acc>
MOE_INLINE void reduce4(Vec<Acc> v0, Vec<Acc> v1, Vec<Acc> v2, Vec<Acc> v3, Acc* out) {
#if defined(__AVX512F__)
  if constexpr (__is_same(Acc, float)) {
    const __m512 a = (__m512)v0, b = (__m512)v1, c = (__m512)v2, d = (__m512)v3;
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 abcd = (__m512)_mm512_add_ps(
        (__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    return;
  }
#elif defined(__AVX2__)
  if constexpr (__is_same(Acc, float)) {
    const __m256 a = (__m256)v0, b = (__m256)v1, c = (__m256)v2, d = (__m256)v3;
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const __m256 abcd = _mm256_add_ps((__m256)_mm256_unpacklo_pd((__m256d)ab, (__m256d)cd),
                                      (__m256)_mm256_unpackhi_pd((__m256d)ab, (__m256d)cd));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
    return;
  }
#endif
  out[0] = reduce<Acc>(v0);
  out[1] = reduce<Acc>(v1);
  out[2] = reduce<Acc>(v2);
  out[3] = reduce<Acc>(v3);
}

}  // namespace moe::MOE_ISA
