// What a dense difference keeps as a ternary vector: magnitudes counted, the largest chosen. n <= kTernaryBlock.
//
// A magnitude's order is that of its bits as an integer: 31 bits, of which a histogram takes the high 16, then another
// the low 15 of those that share the threshold's high ones. Two passes find any rank exactly.
#pragma once

#include "microkernels/apply_ternary.h"

namespace moe::MOE_ISA {

// t = x - base in float32 (float64 in float64, then rounded); base may be null
template <class T>
static void differences(const T* __restrict__ x, const T* __restrict__ base, int64_t n, float* __restrict__ t) {
  if (base == nullptr) {
    for (int64_t i = 0; i < n; ++i) t[i] = static_cast<float>(to_acc(x[i]));
    return;
  }
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) {
    __builtin_prefetch(x + n + i, 0, 2);
    __builtin_prefetch(base + n + i, 0, 2);
  }
  for (int64_t i = 0; i < n; ++i) t[i] = static_cast<float>(to_acc(x[i]) - to_acc(base[i]));
}

MOE_INLINE uint32_t magnitude_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffff;
}

static void count_magnitudes(const float* t, int64_t n, uint32_t* counts) {
  for (int64_t i = 0; i < n; ++i) ++counts[magnitude_bits(t[i]) >> kLowBits];
}

// Calls each(pointer to 64 elements, which of them there are); the last ones may be a copy.
template <class F>
MOE_INLINE void each_group_of(const float* t, int64_t n, const F& each) {
  int64_t i = 0;
  for (; i + kTernaryGroup <= n; i += kTernaryGroup) each(t + i, ~uint64_t{0});
  if (i == n) return;
  float padded[kTernaryGroup] = {};
  std::memcpy(padded, t + i, (n - i) * sizeof(float));
  each(padded, first_bits(n - i));
}

// Bit i: whether holds(magnitude's bits of element i).
template <class F>
MOE_INLINE uint64_t where(const float* p, const F& holds) {
  uint64_t mask = 0;
#pragma GCC unroll 16
  for (int v = 0; v < kVectorsOfGroup<float>; ++v) {
    const VecIndex<float> bits = (VecIndex<float>)load(p + v * kLanes<float>) & 0x7fffffff;
    mask |= lane_bits<float>(holds(bits)) << (v * kLanes<float>);
  }
  return mask;
}

static void count_low_magnitudes(const float* t, int64_t n, uint32_t high, uint32_t* counts) {
  const int32_t low = static_cast<int32_t>(high << kLowBits);
  each_group_of(t, n, [&](const float* p, uint64_t valid) {
    uint64_t inside = valid & where(p, [&](VecIndex<float> bits) { return (bits ^ low) < (1 << kLowBits); });
    for (; inside != 0; inside &= inside - 1)
      ++counts[magnitude_bits(p[__builtin_ctzll(inside)]) & ((1 << kLowBits) - 1)];
  });
}

// As count_magnitudes for high bits in [first, last] alone: of those above, how many there are goes to last + 1, of those
// below to first - 1, of infinities and NaN to those of infinity. Few are in between, so this reads and hardly writes.
static void count_window(const float* t, int64_t n, int32_t first, int32_t last, uint32_t* counts) {
  const int32_t low = first << kLowBits, high = ((last + 1) << kLowBits) - 1;
  constexpr int32_t kLargest = 0x7f7fffff;
  int64_t above = 0, inside = 0, broken = 0;
  each_group_of(t, n, [&](const float* p, uint64_t valid) {
    const uint64_t over = valid & where(p, [&](VecIndex<float> bits) { return bits > high; });
    above += __builtin_popcountll(over);
    if (over != 0) broken += __builtin_popcountll(over & where(p, [&](VecIndex<float> bits) { return bits > kLargest; }));
    uint64_t word = valid & ~over & where(p, [&](VecIndex<float> bits) { return bits >= low; });
    for (; word != 0; word &= word - 1, ++inside) ++counts[magnitude_bits(p[__builtin_ctzll(word)]) >> kLowBits];
  });
  counts[last + 1] += static_cast<uint32_t>(above - broken);
  counts[0x7f800000 >> kLowBits] += static_cast<uint32_t>(broken);
  if (first > 0) counts[first - 1] += static_cast<uint32_t>(n - above - inside);
}

// moments[j] += sum of t, moments[kMomentLanes + j] += sum of t^2 over i % kMomentLanes == j: one order for every
// instruction set
static void add_moments(const float* t, int64_t n, double* moments) {
  double sums[kMomentLanes], squares[kMomentLanes];
  std::memcpy(sums, moments, sizeof sums);
  std::memcpy(squares, moments + kMomentLanes, sizeof squares);
  int64_t i = 0;
  for (; i + kMomentLanes <= n; i += kMomentLanes)
#pragma GCC unroll 32
    for (int j = 0; j < kMomentLanes; ++j) {
      const double x = t[i + j];
      sums[j] += x;
      squares[j] += x * x;  // the product of two floats is exact: a fused multiply-add is the same
    }
  for (int j = 0; i + j < n; ++j) {
    const double x = t[i + j];
    sums[j] += x;
    squares[j] += x * x;
  }
  std::memcpy(moments, sums, sizeof sums);
  std::memcpy(moments + kMomentLanes, squares, sizeof squares);
}

// The planes of the elements whose magnitude is above the threshold, or is just that; returns how many are just that.
static int64_t select_ternary(const float* t, int64_t n, uint32_t threshold, bool equal, uint64_t* planes) {
  int64_t ties = 0;
  for (int64_t group = 0; group * kTernaryGroup < n; ++group) {
    float padded[kTernaryGroup];
    const float* p = t + group * kTernaryGroup;
    const int64_t rest = n - group * kTernaryGroup;
    if (rest < kTernaryGroup) {
      std::memset(padded, 0, sizeof padded);
      std::memcpy(padded, p, rest * sizeof(float));
      p = padded;
    }
    uint64_t above = 0, same = 0, negative = 0;
#pragma GCC unroll 16
    for (int v = 0; v < kVectorsOfGroup<float>; ++v) {
      const VecIndex<float> bits = (VecIndex<float>)load(p + v * kLanes<float>), magnitude = bits & 0x7fffffff;
      const int32_t bound = static_cast<int32_t>(threshold);
      above |= lane_bits<float>(magnitude > bound) << (v * kLanes<float>);
      same |= lane_bits<float>(magnitude == bound) << (v * kLanes<float>);
      negative |= lane_bits<float>(bits < 0) << (v * kLanes<float>);
    }
    same &= first_bits(rest);
    const uint64_t nonzero = equal ? same : above;
    planes[2 * group] = nonzero;
    planes[2 * group + 1] = negative & nonzero;
    ties += __builtin_popcountll(same);
  }
  return ties;
}

}  // namespace moe::MOE_ISA
