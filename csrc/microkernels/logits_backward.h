// Gradients of fused rows of logits.
#pragma once

#include "microkernels/logits.h"

namespace moe::MOE_ISA {

template <class Acc>
MOE_INLINE double sum_in_double(const Acc* x, int64_t n) {
  double terms[kLogitBlock];
  for (int64_t i = 0; i < n; ++i) terms[i] = static_cast<double>(x[i]);
  return block_sum(terms, n);
}

template <class Acc>
static double inner_of_nonzero(const Acc* a, const Acc* b, int64_t n) {
  double terms[kLogitBlock];
  for (int64_t i = 0; i < n; ++i) terms[i] = a[i] == 0 ? 0.0 : static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return block_sum(terms, n);
}

template <class Acc>
static GradSums grad_sums(LogitOut out, const Acc* grad, const Acc* fused, int64_t n) {
  if (out == LogitOut::probs) return {inner_of_nonzero(fused, grad, n), sum_in_double(fused, n)};
  Acc terms[kLogitBlock];
  for (int64_t i = 0; i < n; ++i) terms[i] = fused[i] > kNegInf<Acc> ? grad[i] : Acc{0};
  const double grad_sum = sum_in_double(terms, n);
  exponentials(fused, n, Acc{0}, terms);
  return {grad_sum, sum_in_double(terms, n)};
}

// The saved probabilities sum to one only up to a rounding that all share. Divided by what they do sum to, and in double up
// to dz, they make dz sum to zero, and the constants of the sources drop out of the gradients of weights and temperature.
template <class Acc>
static void score_grad(LogitOut out, const Acc* grad, const Acc* fused, GradSums total, int64_t n, Acc* dz) {
  if (out == LogitOut::logits) {
    for (int64_t i = 0; i < n; ++i) dz[i] = fused[i] > kNegInf<Acc> ? grad[i] : Acc{0};
    return;
  }
  const double inverse = total.mass > 0 ? 1 / total.mass : 0, mean = total.grad * inverse;
  double g[kLogitBlock];
  for (int64_t i = 0; i < n; ++i) g[i] = static_cast<double>(grad[i]);
  if (out == LogitOut::probs) {
    for (int64_t i = 0; i < n; ++i)
      dz[i] = fused[i] == 0 ? Acc{0} : static_cast<Acc>(static_cast<double>(fused[i]) * inverse * (g[i] - mean));
    return;
  }
  exponentials(fused, n, Acc{0}, dz);
  for (int64_t i = 0; i < n; ++i)
    dz[i] = fused[i] > kNegInf<Acc> ? static_cast<Acc>(g[i] - static_cast<double>(dz[i]) * mean) : Acc{0};
}

template <class Acc>
static double anchored(const FusedRow<Acc>& row, int64_t begin, int64_t n, const Acc* dz, Acc* flags) {
  Acc x[kLogitBlock];
  for (int64_t i = 0; i < n; ++i) flags[i] = 0;
  for (const LogitSource<Acc>*source = row.sources, *end = source + row.num_sources; source < end; ++source) {
    if (source->weight > 0 || source == row.anchor) continue;
    load_logits(*source, begin, n, x);
    for (int64_t i = 0; i < n; ++i) flags[i] = (x[i] < source->floor ? source->floor : x[i]) == kNegInf<Acc> ? Acc{1} : flags[i];
  }
  if (row.anchor == nullptr) return 0;
  load_logits(*row.anchor, begin, n, x);
  Acc alone[kLogitBlock];
  for (int64_t i = 0; i < n; ++i) alone[i] = flags[i] * dz[i];
  return inner_of_nonzero(alone, x, n);
}

template <class Acc>
MOE_INLINE void store_grad(LogitDtype dtype, const Acc* values, int64_t n, void* grad, int64_t begin) {
  with_logit_dtype(dtype, [&]<class T>() {
    if constexpr (__is_same(acc_t<T>, Acc)) convert_back(values, static_cast<T*>(grad) + begin, n);
  });
}

template <class Acc>
static double linear_grad(const FusedRow<Acc>& row, const LogitSource<Acc>& source, int64_t begin, int64_t n, const Acc* dz,
                       const Acc* flags, void* grad) {
  Acc x[kLogitBlock], d[kLogitBlock], dl[kLogitBlock];
  load_logits(source, begin, n, x);
  const bool is_anchor = &source == row.anchor;
  const Acc floor = source.weight < 0 && !is_anchor ? source.floor : kNegInf<Acc>;
  const Acc scale = source.weight / row.temperature;
  for (int64_t i = 0; i < n; ++i) d[i] = flags != nullptr && flags[i] != 0 ? Acc{0} : dz[i];
  for (int64_t i = 0; i < n; ++i) dl[i] = x[i] < floor ? Acc{0} : scale * d[i];
  if (flags != nullptr && is_anchor) {
    const Acc alone = row.weight_sum / row.temperature;
    for (int64_t i = 0; i < n; ++i) dl[i] = flags[i] != 0 ? alone * dz[i] : dl[i];
  }
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] < floor ? floor : x[i];
  store_grad(source.dtype, dl, n, grad, begin);
  return inner_of_nonzero(d, x, n);
}

template <class Acc>
static double mixture_grad(const FusedRow<Acc>& row, const LogitSource<Acc>& source, int64_t begin, int64_t n, const Acc* dz,
                        const Acc* z, Acc sum, void* grad) {
  Acc x[kLogitBlock], terms[kLogitBlock];
  load_logits(source, begin, n, x);
  for (int64_t i = 0; i < n; ++i) terms[i] = dz[i] == 0 ? Acc{0} : exp_of((x[i] - source.top) + source.shift - z[i]) * dz[i];
  if (grad != nullptr) {
    for (int64_t i = 0; i < n; ++i)
      x[i] = (terms[i] - exp_of((x[i] - source.top) - source.log_sum) * sum) / row.temperature;
    store_grad(source.dtype, x, n, grad, begin);
  }
  return sum_in_double(terms, n);
}

}  // namespace moe::MOE_ISA
