// Sums over the exponential tilt of a row: weights exp(base + alpha direction).
#pragma once

#include "microkernels/logits_backward.h"

namespace moe::MOE_ISA {

// Leaves the tokens that no tensor rules out: base, and direction - subtracted (which may be null). Returns how many.
template <class Acc>
static int64_t tilt_row(Acc* base, Acc* direction, const Acc* subtracted, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Acc less = subtracted == nullptr ? Acc{0} : subtracted[i];
    if (base[i] == kNegInf<Acc> || direction[i] == kNegInf<Acc> || less == kNegInf<Acc>) continue;
    base[count] = base[i];
    direction[count++] = direction[i] - less;
  }
  return count;
}

// What is smaller beside the largest weight than exp(this) counts nothing, however large its direction; numbers below the
// smallest normal one, which are slow, never come up.
template <class Acc>
constexpr Acc kSmallestLog = -80;

// exp(x) of x in [-80, 0] within 1e-11: x = n ln 2 + r with |r| <= ln 2 / 2, a Taylor polynomial of degree 9 in r. Roots
// are differences of nearly equal sums, float's exponentials would be seen in them. Branch-free, so that loops vectorise.
MOE_INLINE double exp_of_log_weight(double x) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer in the low mantissa bits
  const double shifted = x * 1.4426950408889634 + magic;
  const double n = shifted - magic;
  const double r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  uint64_t bits, magic_bits;
  std::memcpy(&bits, &shifted, 8);
  std::memcpy(&magic_bits, &magic, 8);
  const uint64_t scale_bits = (bits - magic_bits + 1023) << 52;
  double scale;
  std::memcpy(&scale, &scale_bits, 8);
  return p * scale;
}

// base, direction: one block. All in double.
template <class Acc>
static TiltBlock tilt_block(const Acc* base, const Acc* direction, int64_t n, double alpha) {
  double weights[kLogitBlock], first[kLogitBlock], second[kLogitBlock];
  for (int64_t i = 0; i < n; ++i)
    weights[i] = static_cast<double>(base[i]) + alpha * static_cast<double>(direction[i]);
  const double top = largest(weights, n);
  for (int64_t i = 0; i < n; ++i) {
    const double below = weights[i] - top;
    const double weight = exp_of_log_weight(below > kSmallestLog<double> ? below : kSmallestLog<double>);
    weights[i] = below > kSmallestLog<double> ? weight : 0.0;  // exactly: the direction may be as large as a masked logit
    first[i] = weights[i] * static_cast<double>(direction[i]);
    second[i] = first[i] * static_cast<double>(direction[i]);
  }
  return {top, block_sum(weights, n), block_sum(first, n), block_sum(second, n)};
}

// sums[j] += sum_i w_ij and means[j] += sum_i w_ij direction_i with w_ij = start_i ratio_i^j, for j in [0, num_points).
// start = exp(base + low direction - first_top), ratio = exp(step direction - top_step): two exponentials a token, however
// many points. False, and nothing is added, where a power starts too small for what it grows to.
template <class Acc>
static bool tilt_grid(const Acc* base, const Acc* direction, int64_t n, const TiltGrid& grid, double* sums, double* means) {
  constexpr int kN = 2 * kLanes<Acc>;
  Acc start[kLogitBlock], ratio[kLogitBlock], padded[kLogitBlock];
  const Acc low = static_cast<Acc>(grid.low), step = static_cast<Acc>(grid.step);
  const Acc first_top = static_cast<Acc>(grid.first_top), top_step = static_cast<Acc>(grid.top_step);
  const Acc steps = static_cast<Acc>(grid.num_points - 1);
  Acc worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    start[i] = (base[i] - first_top) + low * direction[i];
    ratio[i] = step * direction[i] - top_step;
    padded[i] = direction[i];
    const Acc end = start[i] + steps * ratio[i];
    // what starts below exp(-65) would be taken for nothing; what also ends below exp(-40) is nothing
    worst = start[i] < Acc{-65} && end > Acc{-40} ? Acc{1} : worst;
    start[i] = start[i] > kSmallestLog<Acc> ? start[i] : kSmallestLog<Acc>;
  }
  if (worst != 0) return false;
  exponentials(start, n, Acc{0}, start);
  constexpr Acc kNothing = static_cast<Acc>(1e-30);
  for (int64_t i = 0; i < n; ++i) start[i] = start[i] > kNothing ? start[i] : Acc{0};
  exponentials(ratio, n, Acc{0}, ratio);
  int64_t count = n;
  for (; count % kN != 0; ++count) start[count] = ratio[count] = padded[count] = 0;
  const Vec<Acc> nothing = broadcast(kNothing);
  for (int64_t j = 0; j < grid.num_points; ++j) {
    Vec<Acc> sum[2] = {}, mean[2] = {};
    for (int64_t i = 0; i < count; i += kN)
      for (int half = 0; half < 2; ++half) {
        const int64_t at = i + half * kLanes<Acc>;
        const Vec<Acc> weight = load(start + at);
        sum[half] += weight;
        mean[half] += weight * load(padded + at);
        const Vec<Acc> next = weight * load(ratio + at);
        store(start + at, next > nothing ? next : Vec<Acc>{});  // numbers that are not normal are slow
      }
    sums[j] += static_cast<double>(reduce<Acc>(sum[0] + sum[1]));
    means[j] += static_cast<double>(reduce<Acc>(mean[0] + mean[1]));
  }
  return true;
}

}  // namespace moe::MOE_ISA
