// Ternary task vectors added to a block of weights, and taken away again to the last bit.
//
// Every sum is of the same numbers in the same order in every lane, so all instruction sets and GPUs give the same bits.
// Results are rounded by integer arithmetic: vcvtneps2bf16 turns denormals into zero.
#pragma once

#include "microkernels/task_vector_table.h"
#include "microkernels/vec.h"

namespace moe::MOE_ISA {

template <class Acc>
struct vector_bits_of;
template <>
struct vector_bits_of<float> {
  typedef uint32_t type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct vector_bits_of<double> {
  typedef uint64_t type __attribute__((vector_size(kVectorBytes)));
};
// The bits of each lane's element, in the lane's low end.
template <class Acc>
using VecBits = typename vector_bits_of<Acc>::type;

template <class T>
constexpr int kVectorsOfGroup = kTernaryGroup / kLanes<acc_t<T>>;

// All ones in the lanes whose bit is set, the lowest first.
template <class Acc>
MOE_INLINE VecBits<Acc> lanes_of(uint64_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4)
    return (VecBits<Acc>)_mm512_movm_epi32(static_cast<__mmask16>(bits));
  else
    return (VecBits<Acc>)_mm512_movm_epi64(static_cast<__mmask8>(bits));
#else
  VecBits<Acc> one;
  for (int i = 0; i < kLanes<Acc>; ++i) one[i] = static_cast<Index<Acc>>(1) << i;
  return (VecBits<Acc>)(((static_cast<Index<Acc>>(bits) + VecBits<Acc>{}) & one) != 0);
#endif
}

// sum + value t of the group's vector v. One addition: the sign is chosen beside it.
template <class Acc>
MOE_INLINE Vec<Acc> add_ternary(Vec<Acc> sum, Vec<Acc> value, const uint64_t* planes, int v) {
#if defined(__AVX512F__)
  // the masks by vector tests: through general registers they cost a third more (Zen 4, 3.9 against 2.9 ns for 64)
  if constexpr (sizeof(Acc) == 4) {
    int32_t nonzero, negative;
    std::memcpy(&nonzero, reinterpret_cast<const char*>(planes) + 4 * (v / 2), sizeof nonzero);
    std::memcpy(&negative, reinterpret_cast<const char*>(planes + 1) + 4 * (v / 2), sizeof negative);
    const __m512i one = _mm512_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768);
    const __m512i bit = v % 2 == 0 ? one : _mm512_slli_epi32(one, 16);
    const __mmask16 minus = _mm512_test_epi32_mask(_mm512_set1_epi32(negative), bit);
    const __m512 term = _mm512_mask_blend_ps(minus, (__m512)value, (__m512)-value);
    return (Vec<Acc>)_mm512_mask_add_ps((__m512)sum, _mm512_test_epi32_mask(_mm512_set1_epi32(nonzero), bit), (__m512)sum, term);
  } else {
    const __mmask8 minus = static_cast<__mmask8>(planes[1] >> (8 * v)), some = static_cast<__mmask8>(planes[0] >> (8 * v));
    const __m512d term = _mm512_mask_blend_pd(minus, (__m512d)value, (__m512d)-value);
    return (Vec<Acc>)_mm512_mask_add_pd((__m512d)sum, some, (__m512d)sum, term);
  }
#else
  // + 0 where t is zero: no sum is -0, so that is itself
  const VecBits<Acc> nonzero = lanes_of<Acc>(planes[0] >> (v * kLanes<Acc>));
  const VecBits<Acc> negative = lanes_of<Acc>(planes[1] >> (v * kLanes<Acc>));
  const VecBits<Acc> sign = (VecBits<Acc>)broadcast<Acc>(Acc(-0.0));
  return sum + (Vec<Acc>)(((VecBits<Acc>)value ^ (negative & sign)) & nonzero);
#endif
}

// sum + the terms of the group's vector v where t is not zero; other lanes may hold anything
template <class Acc>
MOE_INLINE Vec<Acc> add_terms(Vec<Acc> sum, const Acc* terms, const uint64_t* planes, int v) {
  const VecBits<Acc> nonzero = lanes_of<Acc>(planes[0] >> (v * kLanes<Acc>));
  return sum + (Vec<Acc>)((VecBits<Acc>)load(terms + v * kLanes<Acc>) & nonzero);
}

template <class T>
MOE_INLINE VecBits<acc_t<T>> load_bits(const T* p) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    return (VecBits<T>)load(p);
  } else {
#if defined(__AVX512F__)
    return (VecBits<float>)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    Half half;
    std::memcpy(&half, p, sizeof half);
    return __builtin_convertvector(half, VecBits<float>);
#endif
  }
}

template <class T>
MOE_INLINE void store_bits(T* p, VecBits<acc_t<T>> bits) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    store(p, (Vec<T>)bits);
  } else {
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    const Half half = __builtin_convertvector(bits, Half);
    std::memcpy(p, &half, sizeof half);
  }
}

template <class T>
MOE_INLINE Vec<acc_t<T>> from_bits(VecBits<acc_t<T>> bits) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    return (Vec<T>)bits;
  } else if constexpr (__is_same(T, bf16)) {
    return (Vec<float>)(bits << 16);
  } else {
    fp16 half[kLanes<float>];
    store_bits(half, bits);
    return load_converted(half);
  }
}

// The bits of the nearest T, ties to even; not for NaN.
template <class T>
MOE_INLINE VecBits<acc_t<T>> round_to_bits(Vec<acc_t<T>> x) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    return (VecBits<T>)x;
  } else if constexpr (__is_same(T, bf16)) {
    const VecBits<float> bits = (VecBits<float>)x;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  } else {
    fp16 half[kLanes<float>];
    store_converted(half, x);
    return load_bits(half);
  }
}

template <class Acc>
MOE_INLINE VecBits<Acc> select_lanes(VecBits<Acc> lanes, VecBits<Acc> yes, VecBits<Acc> no) {
  return (yes & lanes) | (no & ~lanes);
}

// The sums of one group's vectors of lanes; returns the elements where any t is not zero.
template <class T>
MOE_INLINE uint64_t sum_group(const VectorSource<acc_t<T>>* sources, int64_t num_sources, int64_t group, uint64_t valid,
                              Vec<acc_t<T>>* sums) {
  using Acc = acc_t<T>;
  uint64_t touched = 0;
#pragma GCC unroll 16
  for (int v = 0; v < kVectorsOfGroup<T>; ++v) sums[v] = Vec<Acc>{};
  for (int64_t i = 0; i < num_sources; ++i) {
    const uint64_t* planes = sources[i].planes + 2 * group;
    if (planes[0] == 0) continue;
    touched |= planes[0];
    if (sources[i].terms != nullptr) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectorsOfGroup<T>; ++v) sums[v] = add_terms<Acc>(sums[v], sources[i].terms + group * kTernaryGroup, planes, v);
      continue;
    }
    const Vec<Acc> value = broadcast(sources[i].value);
#pragma GCC unroll 16
    for (int v = 0; v < kVectorsOfGroup<T>; ++v) sums[v] = add_ternary<Acc>(sums[v], value, planes, v);
  }
  return touched & valid;
}

MOE_INLINE uint64_t first_bits(int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// Calls work(pointer to 64 elements, group, which of them there are) for each group; the last one's elements may be a copy.
template <class T, class F>
MOE_INLINE void each_group(T* weight, int64_t n, const F& work) {
  const int64_t whole = n / kTernaryGroup;
  for (int64_t g = 0; g < whole; ++g) work(weight + g * kTernaryGroup, g, ~uint64_t{0});
  const int64_t rest = n - whole * kTernaryGroup;
  if (rest == 0) return;
  T padded[kTernaryGroup] = {};
  std::memcpy(padded, weight + whole * kTernaryGroup, rest * sizeof(T));
  work(padded, whole, first_bits(rest));
  std::memcpy(weight + whole * kTernaryGroup, padded, rest * sizeof(T));
}

// w = round(w + sums) of the touched elements of one group.
template <class T>
MOE_INLINE void add_sums(T* w, const Vec<acc_t<T>>* sums, uint64_t touched, int first, int last) {
  using Acc = acc_t<T>;
#pragma GCC unroll 16
  for (int v = first; v < last; ++v) {
    const VecBits<Acc> old = load_bits(w + v * kLanes<Acc>);
    const Vec<Acc> x = from_bits<T>(old);
    const VecBits<Acc> lanes = lanes_of<Acc>(touched >> (v * kLanes<Acc>)) & (VecBits<Acc>)(x == x);
    store_bits(w + v * kLanes<Acc>, select_lanes<Acc>(lanes, round_to_bits<T>(x + sums[v]), old));
  }
}

#if defined(__AVX512BF16__)
// 32 at once with the processor's rounding, which is the same but for denormals: where there is one, without it. Half the
// instructions: 3.9 ms for 16.8M weights before, memcpy of the same bytes 2.1 ms (Zen 4).
MOE_INLINE void add_sums_bf16(bf16* w, const Vec<float>* sums, uint64_t touched) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    bf16* p = w + 32 * half;
    const __m512i old = _mm512_loadu_si512(p);
    const __mmask32 nan = _mm512_cmpgt_epu16_mask(_mm512_and_si512(old, _mm512_set1_epi16(0x7fff)), _mm512_set1_epi16(0x7f80));
    const __mmask32 changed = static_cast<__mmask32>(touched >> (32 * half)) & ~nan;
    const Vec<float> low = load_converted(p) + sums[2 * half], high = load_converted(p + 16) + sums[2 * half + 1];
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    if (__builtin_expect((_mm512_testn_epi16_mask(rounded, _mm512_set1_epi16(0x7f80)) & changed) != 0, 0))
      add_sums(w, sums, touched, 2 * half, 2 * half + 2);
    else
      _mm512_storeu_si512(p, _mm512_mask_blend_epi16(changed, old, rounded));
  }
}
#endif

template <class T>
static void apply(T* weight, int64_t n, const VectorSource<acc_t<T>>* sources, int64_t num_sources) {
  each_group(weight, n, [&](T* w, int64_t group, uint64_t valid) {
    Vec<acc_t<T>> sums[kVectorsOfGroup<T>];
    const uint64_t touched = sum_group<T>(sources, num_sources, group, valid, sums);
    if (touched == 0) return;
#if defined(__AVX512BF16__)
    if constexpr (__is_same(T, bf16)) return add_sums_bf16(w, sums, touched);
#endif
    add_sums(w, sums, touched, 0, kVectorsOfGroup<T>);
  });
}

// The bits of `word` at the places that `mask` has, moved together: what pext does.
MOE_INLINE uint64_t gather_bits(uint64_t word, uint64_t mask) {
#if defined(__BMI2__)
  return _pext_u64(word, mask);
#else
  uint64_t result = 0;
  for (int i = 0; mask != 0; ++i, mask &= mask - 1) result |= ((word >> __builtin_ctzll(mask)) & 1) << i;
  return result;
#endif
}

MOE_INLINE uint64_t spread_bits(uint64_t word, uint64_t mask) {
#if defined(__BMI2__)
  return _pdep_u64(word, mask);
#else
  uint64_t result = 0;
  for (int i = 0; mask != 0; ++i, mask &= mask - 1) result |= ((word >> i) & 1) << __builtin_ctzll(mask);
  return result;
#endif
}

// `count` <= 64 bits to or from place `at` of a string of bits.
MOE_INLINE void write_bits(uint64_t* string, int64_t at, uint64_t bits, int64_t count) {
  const int64_t word = at / 64, shift = at % 64;
  string[word] |= bits << shift;
  if (shift + count > 64) string[word + 1] |= bits >> (64 - shift);
}
MOE_INLINE uint64_t read_bits(const uint64_t* string, int64_t at, int64_t count) {
  const int64_t word = at / 64, shift = at % 64;
  uint64_t bits = string[word] >> shift;
  if (shift + count > 64) bits |= string[word + 1] << (64 - shift);
  return bits & first_bits(count);
}

template <class T>
static int64_t apply_undoable(T* weight, int64_t n, const VectorSource<acc_t<T>>* sources, int64_t num_sources,
                              const UndoStream<T>& undo) {
  using Acc = acc_t<T>;
  int64_t at = 0, num_kept = 0;
  each_group(weight, n, [&](T* w, int64_t group, uint64_t valid) {
    Vec<Acc> sums[kVectorsOfGroup<T>];
    const uint64_t touched = sum_group<T>(sources, num_sources, group, valid, sums);
    if (touched == 0) return;
    uint64_t moved = 0, other = 0;
    T before[kTernaryGroup];
    std::memcpy(before, w, sizeof before);
#pragma GCC unroll 16
    for (int v = 0; v < kVectorsOfGroup<T>; ++v) {
      const VecBits<Acc> old = load_bits(w + v * kLanes<Acc>);
      const Vec<Acc> x = from_bits<T>(old);
      const VecBits<Acc> lanes = lanes_of<Acc>(touched >> (v * kLanes<Acc>)) & (VecBits<Acc>)(x == x);
      const VecBits<Acc> sum = round_to_bits<T>(x + sums[v]);
      store_bits(w + v * kLanes<Acc>, select_lanes<Acc>(lanes, sum, old));
      const VecBits<Acc> step = (old - round_to_bits<T>(from_bits<T>(sum) - sums[v])) & lanes;
      const VecIndex<Acc> up = step == 1, down = step == VecBits<Acc>{} - 1;
      moved |= lane_bits<Acc>(up | down) << (v * kLanes<Acc>);
      other |= lane_bits<Acc>((step != 0) & ~up) << (v * kLanes<Acc>);
    }
    const int64_t count = __builtin_popcountll(touched);
    write_bits(undo.moved, at, gather_bits(moved, touched), count);
    write_bits(undo.other, at, gather_bits(other, touched), count);
    at += count;
    for (uint64_t kept = other & ~moved; kept != 0; kept &= kept - 1)
      undo.kept[num_kept++] = before[__builtin_ctzll(kept)];
  });
  return num_kept;
}

template <class T>
static void unapply(T* weight, int64_t n, const VectorSource<acc_t<T>>* sources, int64_t num_sources,
                    const UndoStream<T>& undo) {
  using Acc = acc_t<T>;
  int64_t at = 0, num_kept = 0;
  each_group(weight, n, [&](T* w, int64_t group, uint64_t valid) {
    Vec<Acc> sums[kVectorsOfGroup<T>];
    const uint64_t touched = sum_group<T>(sources, num_sources, group, valid, sums);
    if (touched == 0) return;
    const int64_t count = __builtin_popcountll(touched);
    const uint64_t moved = spread_bits(read_bits(undo.moved, at, count), touched);
    const uint64_t other = spread_bits(read_bits(undo.other, at, count), touched);
    at += count;
#pragma GCC unroll 16
    for (int v = 0; v < kVectorsOfGroup<T>; ++v) {
      const VecBits<Acc> old = load_bits(w + v * kLanes<Acc>);
      const Vec<Acc> x = from_bits<T>(old);
      const VecBits<Acc> lanes = lanes_of<Acc>(touched >> (v * kLanes<Acc>)) & (VecBits<Acc>)(x == x);
      // a lane that is all ones is -1: minus it is plus one
      const VecBits<Acc> up = lanes_of<Acc>((moved & ~other) >> (v * kLanes<Acc>));
      const VecBits<Acc> down = lanes_of<Acc>((moved & other) >> (v * kLanes<Acc>));
      const VecBits<Acc> back = round_to_bits<T>(x - sums[v]) - up + down;
      store_bits(w + v * kLanes<Acc>, select_lanes<Acc>(lanes, back, old));
    }
    for (uint64_t kept = other & ~moved; kept != 0; kept &= kept - 1) w[__builtin_ctzll(kept)] = undo.kept[num_kept++];
  });
}

}  // namespace moe::MOE_ISA
