// Sums over the exponential tilt of a row: weights exp(base + alpha direction).
#pragma once

#include "microkernels/logits_backward.h"

namespace moe::MOE_ISA {

// base, direction: one block.
template <class Acc>
static TiltBlock tilt_block(const Acc* base, const Acc* direction, int64_t n, Acc alpha) {
  Acc weights[kLogitBlock];
  for (int64_t i = 0; i < n; ++i) weights[i] = base[i] + alpha * direction[i];
  const Acc top = largest(weights, n);
  exponentials(weights, n, top, weights);
  double first[kLogitBlock], second[kLogitBlock];
  for (int64_t i = 0; i < n; ++i) {
    first[i] = static_cast<double>(weights[i]) * static_cast<double>(direction[i]);
    second[i] = first[i] * static_cast<double>(direction[i]);
  }
  return {static_cast<double>(top), sum_in_double(weights, n), block_sum(first, n), block_sum(second, n)};
}

// sums[j] += sum_i w_ij and means[j] += sum_i w_ij direction_i with w_ij = start_i ratio_i^j, for j in [0, num_points).
// start = exp(base + low direction - first_top), ratio = exp(step direction - top_step): two exponentials a token, however
// many points. False, and nothing is added, where a power starts too small for what it grows to.
template <class Acc>
static bool tilt_grid(const Acc* base, const Acc* direction, int64_t n, const TiltGrid& grid, double* sums, double* means) {
  constexpr int kN = kLanes<Acc>;
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
    // below exp(-80) a float has lost digits; what ends below exp(-40) does not matter
    worst = start[i] < Acc{-80} && end > Acc{-40} ? Acc{1} : worst;
  }
  if (worst != 0) return false;
  exponentials(start, n, Acc{0}, start);
  exponentials(ratio, n, Acc{0}, ratio);
  int64_t count = n;
  for (; count % kN != 0; ++count) start[count] = ratio[count] = padded[count] = 0;
  for (int64_t j = 0; j < grid.num_points; ++j) {
    Vec<Acc> sum[2] = {}, mean[2] = {};
    for (int64_t i = 0; i < count; i += kN) {
      const Vec<Acc> weight = load(start + i);
      sum[i / kN % 2] += weight;
      mean[i / kN % 2] += weight * load(padded + i);
      store(start + i, weight * load(ratio + i));
    }
    sums[j] += static_cast<double>(reduce<Acc>(sum[0] + sum[1]));
    means[j] += static_cast<double>(reduce<Acc>(mean[0] + mean[1]));
  }
  return true;
}

}  // namespace moe::MOE_ISA
