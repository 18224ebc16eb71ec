// Rows of logits: weighted sums of several sources, maxima, sums of exponentials, thresholds.
//
// Every sum runs over one block of kLogitBlock tokens, lanes in one fixed tree; whoever calls adds the blocks in order.
#pragma once

#include <math.h>

#include "microkernels/elementwise.h"
#include "microkernels/logit_table.h"
#include "microkernels/vec.h"

namespace moe::MOE_ISA {

template <class Acc>
constexpr Acc kNegInf = -static_cast<Acc>(INFINITY);

// log(x) of x >= 0. x = 2^e m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s) with s = (m - 1) / (m + 1), |s| <= 0.172,
// whose series to s^9 leaves 1e-9. 0 gives -inf; denormals are scaled first. Branch-free, so that loops of it vectorise.
MOE_INLINE float log_of(float x) {
  const bool tiny = x < 1.17549435e-38f;
  const float scaled = tiny ? x * 8388608.0f : x;  // 2^23
  uint32_t bits;
  std::memcpy(&bits, &scaled, 4);
  const uint32_t from_root = bits - 0x3f3504f3;  // bits of sqrt(1/2): the exponent field now counts from there
  const int32_t exponent = static_cast<int32_t>(from_root) >> 23;
  const uint32_t mantissa_bits = (from_root & 0x007fffff) + 0x3f3504f3;
  float m;
  std::memcpy(&m, &mantissa_bits, 4);
  const float e = static_cast<float>(exponent) - (tiny ? 23.0f : 0.0f);
  const float s = (m - 1.0f) / (m + 1.0f);
  const float s2 = s * s;
  const float series = 2.0f + s2 * (2.0f / 3 + s2 * (2.0f / 5 + s2 * (2.0f / 7 + s2 * (2.0f / 9))));
  const float result = e * 0.693145751953125f + (s * series + e * 1.42860682030941723e-6f);
  return x > 0 ? result : x == 0 ? -INFINITY : NAN;
}
MOE_INLINE double log_of(double x) { return ::log(x); }

template <class F>
MOE_INLINE void with_logit_dtype(LogitDtype dtype, const F& f) {
  switch (dtype) {
    case LogitDtype::f32: return f.template operator()<float>();
    case LogitDtype::b16: return f.template operator()<bf16>();
    case LogitDtype::f16: return f.template operator()<fp16>();
    case LogitDtype::f64: return f.template operator()<double>();
  }
}

// Whether each of x[0, n) is below +inf (and a number).
template <class Acc>
MOE_INLINE bool all_below_inf(const Acc* x, int64_t n) {
  constexpr int kN = kLanes<Acc>;
  const Vec<Acc> limit = broadcast(static_cast<Acc>(INFINITY));
  auto below = limit > Vec<Acc>{};
  int64_t i = 0;
  for (; i + kN <= n; i += kN) below &= load(x + i) < limit;
  bool all = true;
  for (int lane = 0; lane < kN; ++lane) all &= below[lane] != 0;
  for (; i < n; ++i) all &= x[i] < static_cast<Acc>(INFINITY);
  return all;
}

template <class Acc>
static bool load_logits(const LogitSource<Acc>& source, int64_t begin, int64_t n, Acc* out) {
  with_logit_dtype(source.dtype, [&]<class T>() {
    if constexpr (__is_same(acc_t<T>, Acc)) convert(static_cast<const T*>(source.row) + begin, out, n);
  });
  return all_below_inf(out, n);
}

template <class Acc>
MOE_INLINE bool gather_logits(const LogitSource<Acc>& source, const int32_t* tokens, int64_t begin, int64_t n, Acc* out) {
  if (tokens == nullptr) return load_logits(source, begin, n, out);
  with_logit_dtype(source.dtype, [&]<class T>() {
    if constexpr (__is_same(acc_t<T>, Acc))
      for (int64_t i = 0; i < n; ++i) out[i] = to_acc(static_cast<const T*>(source.row)[tokens[begin + i]]);
  });
  return all_below_inf(out, n);
}

// z[i] += weight * source, or = where it is the first; what is -inf under a negative weight makes z -inf. False
// where a logit is not below +inf.
template <bool kFirst, bool kNegative, class T, class Acc = acc_t<T>>
MOE_INLINE bool add_source(const LogitSource<Acc>& source, int64_t begin, int64_t n, Acc* z) {
  constexpr int kN = kLanes<Acc>;
  const T* row = static_cast<const T*>(source.row) + begin;
  const Vec<Acc> limit = broadcast(static_cast<Acc>(INFINITY)), none = broadcast(kNegInf<Acc>);
  const Vec<Acc> weight = broadcast(source.weight), floor = broadcast(source.floor);
  auto below = limit > none;
  int64_t i = 0;
  for (; i + kN <= n; i += kN) {
    Vec<Acc> x = load_converted(row + i);
    below &= x < limit;
    if constexpr (kNegative) x = x < floor ? floor : x;
    Vec<Acc> sum = kFirst ? weight * x : load(z + i) + weight * x;
    if constexpr (kNegative) sum = x == none ? none : sum;
    store(z + i, sum);
  }
  bool all = true;
  for (int lane = 0; lane < kN; ++lane) all &= below[lane] != 0;
  for (; i < n; ++i) {
    Acc x = to_acc(row[i]);
    all &= x < static_cast<Acc>(INFINITY);
    if (kNegative && x < source.floor) x = source.floor;
    const Acc sum = kFirst ? source.weight * x : z[i] + source.weight * x;
    z[i] = kNegative && x == kNegInf<Acc> ? kNegInf<Acc> : sum;
  }
  return all;
}

// All tokens of a block, source by source: products and sums in Acc, one rounding each.
template <class Acc>
MOE_INLINE bool combine_dense(const FusedRow<Acc>& row, int64_t begin, int64_t n, Acc* z) {
  bool usable = true;
  for (const LogitSource<Acc>*source = row.sources, *end = source + row.num_sources; source < end; ++source)
    with_logit_dtype(source->dtype, [&]<class T>() {
      if constexpr (__is_same(acc_t<T>, Acc)) {
        const bool is_first = source == row.sources, is_negative = source->weight < 0;
        if (is_first)
          usable &= is_negative ? add_source<true, true, T>(*source, begin, n, z)
                                : add_source<true, false, T>(*source, begin, n, z);
        else
          usable &= is_negative ? add_source<false, true, T>(*source, begin, n, z)
                                : add_source<false, false, T>(*source, begin, n, z);
      }
    });
  if (row.num_sources == 0)
    for (int64_t i = 0; i < n; ++i) z[i] = 0;
  if (row.temperature != 1)
    for (int64_t i = 0; i < n; ++i) z[i] /= row.temperature;
  return usable;
}

// Chosen tokens, and the anchor's rule: products are exact and added in double, what is left after large parts cancel is
// rounded once.
template <class Acc>
MOE_INLINE bool combine_exact(const FusedRow<Acc>& row, const int32_t* tokens, int64_t begin, int64_t n, Acc* z) {
  constexpr double kNone = kNegInf<double>;
  Acc x[kLogitBlock];
  double sum[kLogitBlock], undefined[kLogitBlock];
  bool usable = true;
  for (int64_t i = 0; i < n; ++i) sum[i] = 0;
  if (row.anchored)
    for (int64_t i = 0; i < n; ++i) undefined[i] = 0;
  for (const LogitSource<Acc>*source = row.sources, *end = source + row.num_sources; source < end; ++source) {
    usable &= gather_logits(*source, tokens, begin, n, x);
    const double weight = static_cast<double>(source->weight), floor = static_cast<double>(source->floor);
    if (weight > 0) {
      for (int64_t i = 0; i < n; ++i) sum[i] += weight * static_cast<double>(x[i]);
    } else if (row.anchored && source != row.anchor) {
      for (int64_t i = 0; i < n; ++i) {
        const double logit = static_cast<double>(x[i]), raised = logit < floor ? floor : logit;
        undefined[i] = raised == kNone ? 1.0 : undefined[i];
        sum[i] = raised == kNone ? sum[i] : sum[i] + weight * raised;
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const double logit = static_cast<double>(x[i]), raised = logit < floor ? floor : logit;
        sum[i] = raised == kNone ? kNone : sum[i] + weight * raised;
      }
    }
  }
  if (row.anchored) {
    if (row.anchor != nullptr)
      gather_logits(*row.anchor, tokens, begin, n, x);
    else
      for (int64_t i = 0; i < n; ++i) x[i] = 0;
    const double weight = static_cast<double>(row.weight_sum);
    // a source of positive weight at -inf has made the sum -inf, and it stays so
    for (int64_t i = 0; i < n; ++i)
      sum[i] = undefined[i] != 0 && sum[i] > kNone ? weight * static_cast<double>(x[i]) : sum[i];
  }
  if (row.temperature != 1)
    for (int64_t i = 0; i < n; ++i) sum[i] /= static_cast<double>(row.temperature);
  for (int64_t i = 0; i < n; ++i) z[i] = static_cast<Acc>(sum[i] - static_cast<double>(row.shift));
  return usable;
}

template <class Acc>
MOE_INLINE bool combine_mixture(const FusedRow<Acc>& row, const int32_t* tokens, int64_t begin, int64_t n, Acc* z) {
  Acc x[kLogitBlock], top[kLogitBlock], sum[kLogitBlock];
  bool usable = true;
  for (int64_t i = 0; i < n; ++i) top[i] = kNegInf<Acc>;
  for (int64_t i = 0; i < n; ++i) sum[i] = 0;
  const LogitSource<Acc>* end = row.sources + row.num_sources;
  for (const LogitSource<Acc>* source = row.sources; source < end; ++source) {
    usable &= gather_logits(*source, tokens, begin, n, x);
    for (int64_t i = 0; i < n; ++i) {
      const Acc term = (x[i] - source->top) + source->shift;
      top[i] = term > top[i] ? term : top[i];
    }
  }
  for (int64_t i = 0; i < n; ++i) z[i] = top[i] > kNegInf<Acc> ? top[i] : Acc{0};
  for (const LogitSource<Acc>* source = row.sources; source < end; ++source) {
    gather_logits(*source, tokens, begin, n, x);
    for (int64_t i = 0; i < n; ++i) sum[i] += exp_of((x[i] - source->top) + source->shift - z[i]);
  }
  for (int64_t i = 0; i < n; ++i)
    z[i] = (top[i] > kNegInf<Acc> ? top[i] + log_of(sum[i]) : kNegInf<Acc>) / row.temperature - row.shift;
  return usable;
}

template <class Acc>
static bool combine(const FusedRow<Acc>& row, const int32_t* tokens, int64_t begin, int64_t n, Acc* z) {
  if (row.mixture) return combine_mixture(row, tokens, begin, n, z);
  return tokens == nullptr && !row.anchored ? combine_dense(row, begin, n, z) : combine_exact(row, tokens, begin, n, z);
}

template <class Acc>
static Acc largest(const Acc* z, int64_t n) {
  constexpr int kN = kLanes<Acc>;
  const Vec<Acc> none = broadcast(kNegInf<Acc>);
  Vec<Acc> tops[4] = {none, none, none, none};  // a chain of its own each: a maximum takes four cycles
  int64_t i = 0;
  for (; i + 4 * kN <= n; i += 4 * kN)
    for (int chain = 0; chain < 4; ++chain) {
      const Vec<Acc> x = load(z + i + chain * kN);
      tops[chain] = x > tops[chain] ? x : tops[chain];
    }
  Acc result = kNegInf<Acc>;
  for (const Vec<Acc>& top : tops)
    for (int lane = 0; lane < kN; ++lane) result = top[lane] > result ? top[lane] : result;
  for (; i < n; ++i) result = z[i] > result ? z[i] : result;
  return result;
}

template <class Acc>
static Acc smallest_finite(const Acc* z, int64_t n) {
  Acc result = static_cast<Acc>(INFINITY);
  for (int64_t i = 0; i < n; ++i) result = z[i] > kNegInf<Acc> && z[i] < result ? z[i] : result;
  return result;
}

template <class Acc>
static void exponentials(const Acc* z, int64_t n, Acc shift, Acc* exps) {
  for (int64_t i = 0; i < n; ++i) exps[i] = exp_of(z[i] - shift);
}

// The sum of one block.
template <class Acc>
MOE_INLINE Acc block_sum(const Acc* x, int64_t n) {
  constexpr int kN = kLanes<Acc>;
  Vec<Acc> sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kN <= n; i += 2 * kN) {
    sums[0] += load(x + i);
    sums[1] += load(x + i + kN);
  }
  Acc sum = reduce<Acc>(sums[0] + sums[1]);
  for (; i < n; ++i) sum += x[i];
  return sum;
}

template <class Acc>
static Acc exp_sum(const Acc* z, int64_t n, Acc shift) {
  Acc exps[kLogitBlock];
  exponentials(z, n, shift, exps);
  return block_sum(exps, n);
}

template <class Acc>
static void subtract(Acc* z, int64_t n, Acc first, Acc second) {
  for (int64_t i = 0; i < n; ++i) z[i] = (z[i] - first) - second;
}

template <class Acc>
static int64_t at_least(const Acc* z, int64_t n, Acc bound, int32_t first, int32_t* tokens) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    tokens[count] = first + static_cast<int32_t>(i);
    count += z[i] >= bound;
  }
  return count;
}

// The bucket of a value above -inf.
template <class Acc>
MOE_INLINE int64_t bucket_of(Acc value, Acc largest) {
  const Acc distance = (largest - value) * static_cast<Acc>(kLogitBucketsPerNat);
  return distance < static_cast<Acc>(kLogitBuckets - 1) ? static_cast<int64_t>(distance) : kLogitBuckets - 1;
}

template <class Acc>
static void histogram(const Acc* z, int64_t n, Acc largest, int64_t* counts, double* masses) {
  Acc exps[kLogitBlock];
  for (int64_t begin = 0; begin < n; begin += kLogitBlock) {
    const int64_t size = n - begin < kLogitBlock ? n - begin : kLogitBlock;
    if (masses != nullptr) exponentials(z + begin, size, largest, exps);
    for (int64_t i = 0; i < size; ++i) {
      if (!(z[begin + i] > kNegInf<Acc>)) continue;
      const int64_t bucket = bucket_of(z[begin + i], largest);
      ++counts[bucket];
      if (masses != nullptr) masses[bucket] += static_cast<double>(exps[i]);
    }
  }
}

template <class Acc>
static int64_t bucket_values(const Acc* z, int64_t n, Acc largest, int64_t bucket, Acc* values) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i)
    if (z[i] > kNegInf<Acc> && bucket_of(z[i], largest) == bucket) values[count++] = z[i];
  return count;
}

}  // namespace moe::MOE_ISA
