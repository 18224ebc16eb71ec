// What a dense difference keeps as a ternary vector: magnitudes counted, the largest chosen. n <= kTernaryBlock.
//
// A magnitude's order is that of its bits as an integer: 31 bits, of which a histogram takes the high 16, then another
// the low 15 of those that share the threshold's high ones. Two passes find any rank exactly.
#pragma once

#include "microkernels/apply_ternary.h"

namespace moe::MOE_ISA {

// t = x - base in float32 (float64 in float64, then rounded); base may be null
template <class T>
static void differences(const T* x, const T* base, int64_t n, float* t) {
  for (int64_t i = 0; i < n; ++i) {
    const acc_t<T> from = base == nullptr ? acc_t<T>(0) : to_acc(base[i]);
    t[i] = static_cast<float>(base == nullptr ? to_acc(x[i]) : to_acc(x[i]) - from);
  }
}

MOE_INLINE uint32_t magnitude_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffff;
}

static void count_magnitudes(const float* t, int64_t n, uint32_t* counts) {
  for (int64_t i = 0; i < n; ++i) ++counts[magnitude_bits(t[i]) >> kLowBits];
}

static void count_low_magnitudes(const float* t, int64_t n, uint32_t high, uint32_t* counts) {
  constexpr int kStep = 64;  // few have the same high bits: look at many at once
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    uint32_t any = 0;
    for (int j = 0; j < kStep; ++j) any |= magnitude_bits(t[i + j]) >> kLowBits == high;
    if (any == 0) continue;
    for (int j = 0; j < kStep; ++j) {
      const uint32_t bits = magnitude_bits(t[i + j]);
      if (bits >> kLowBits == high) ++counts[bits & ((1 << kLowBits) - 1)];
    }
  }
  for (; i < n; ++i) {
    const uint32_t bits = magnitude_bits(t[i]);
    if (bits >> kLowBits == high) ++counts[bits & ((1 << kLowBits) - 1)];
  }
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
