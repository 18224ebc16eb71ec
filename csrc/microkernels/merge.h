// Several fine-tunes of one tensor become one, block by block: differences, what of them is kept, election, mean.
//
// Loops over arrays of a block that the compiler turns into vectors; every element's sums run over the experts in order.
#pragma once

#include <bit>
#include <limits>

#include "microkernels/merge_table.h"
#include "microkernels/random.h"
#include "microkernels/vec.h"

namespace moe::MOE_ISA {

template <class T>
MOE_INLINE T round_once(acc_t<T> x) {
  if constexpr (__is_same(T, bf16)) {  // vec.h's turns denormals into zero, as the processor's instruction does
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40)};
  } else {
    return from_acc<T>(x);
  }
}

// 0 where source does not keep t; the others are rescaled.
template <class T>
MOE_INLINE void keep_some(int64_t first, int64_t n, const MergeSource<acc_t<T>>& source, acc_t<T>* t) {
  using Acc = acc_t<T>;
  if (source.lower > 0 || source.upper < INT32_MAX) {
    const int32_t lower = static_cast<int32_t>(source.lower), upper = static_cast<int32_t>(source.upper);
    const int64_t lower_end = source.lower_end - first, upper_end = source.upper_end - first;
    if (lower_end >= n && upper_end <= 0) {  // all, or none, of those that are just at a bound: no index to look at
      for (int64_t i = 0; i < n; ++i) {
        const float narrow = static_cast<float>(t[i]);
        int32_t bits;
        std::memcpy(&bits, &narrow, sizeof bits);
        bits &= 0x7fffffff;
        t[i] = (bits >= lower) & (bits <= upper) ? t[i] : Acc(0);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const float narrow = static_cast<float>(t[i]);
        int32_t bits;
        std::memcpy(&bits, &narrow, sizeof bits);
        bits &= 0x7fffffff;
        const bool keep = (bits > lower || (bits == lower && i < lower_end)) &&
                          (bits < upper || (bits == upper && i >= upper_end));
        t[i] = keep ? t[i] : Acc(0);
      }
    }
  }
  if (source.keep_below < (uint64_t{1} << 32)) {
    uint32_t bits[kMergeBlock];
    random_bits(source.key, 0, first, n, bits);
    const uint32_t below = static_cast<uint32_t>(source.keep_below);
    for (int64_t i = 0; i < n; ++i) t[i] = bits[i] < below ? t[i] : Acc(0);
  }
  if (source.rescale != Acc(1))
    for (int64_t i = 0; i < n; ++i) t[i] = t[i] / source.rescale;
}

// t = expert - base, or what is given, of the kept elements, 0 elsewhere. `first` is a multiple of 4.
template <class T>
MOE_INLINE void kept_differences(const T* base, const MergeExpert<T>& expert_in, int64_t first, int64_t n,
                                 const MergeSource<acc_t<T>>& source, acc_t<T>* t) {
  using Acc = acc_t<T>;
  if (expert_in.given != nullptr) {
    std::memcpy(t, expert_in.given, static_cast<size_t>(n) * sizeof(Acc));
    keep_some<T>(first, n, source, t);
    return;
  }
  const T* expert = expert_in.values + first;
  // a block is half a page of each of many streams: too short for the processor to see that more will follow
  for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(expert + n + i, 0, 2);
  for (int64_t i = 0; i < n; ++i) t[i] = to_acc(expert[i]);
  if (base != nullptr)
    for (int64_t i = 0; i < n; ++i) t[i] -= to_acc(base[i]);
  keep_some<T>(first, n, source, t);
}

// sum += t, and any |= the bits of t, which says where there is a term: beside the sum it costs no second pass.
template <class Acc>
MOE_INLINE void add_and_see(const Acc* t, int64_t n, Acc* sum, Index<Acc>* any) {
  for (int64_t i = 0; i < n; ++i) {
    sum[i] += t[i];
    any[i] |= std::bit_cast<Index<Acc>>(t[i]);
  }
}

// Elements whose sum is zero although a term is not (of either sign).
template <class Acc>
MOE_INLINE int64_t count_undecided(const Acc* sum, const Index<Acc>* any, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += (sum[i] == 0) & ((any[i] & std::numeric_limits<Index<Acc>>::max()) != 0);
  return count;
}

template <class T>
static int64_t merge(const T* base, const MergeExpert<T>* experts, int64_t first, int64_t n, const MergeSource<acc_t<T>>* sources,
                     int64_t num_sources, const MergeRule<acc_t<T>>& rule, acc_t<T>* deltas, T* out, int64_t* signs) {
  using Acc = acc_t<T>;
  Acc sum[kMergeBlock] = {}, total[kMergeBlock] = {};
  Index<Acc> any[kMergeBlock] = {};
  const bool sees = rule.election == Election::sign_of_sum && rule.zero_sign == 0;
  const T* from = base == nullptr ? nullptr : base + first;
  for (int64_t k = 0; k < num_sources; ++k) {
    Acc* t = deltas + k * kMergeBlock;
    kept_differences(from, experts[k], first, n, sources[k], t);
    if (sources[k].before != Acc(1))
      for (int64_t i = 0; i < n; ++i) t[i] = t[i] * sources[k].before;
    if (sees)
      add_and_see(t, n, sum, any);
    else if (rule.election != Election::none)
      for (int64_t i = 0; i < n; ++i) sum[i] += t[i];
  }
  int64_t result = 0;
  if (signs != nullptr) {
    int32_t here = 0;
    for (int64_t i = 0; i < n; ++i) here += (sum[i] > 0) - (sum[i] < 0);
    *signs += here;
  }
  if (out == nullptr) return 0;
  if (rule.election == Election::sign_of_sum) {
    if (sees) result = count_undecided(sum, any, n);
    for (int64_t i = 0; i < n; ++i) sum[i] = sum[i] == 0 ? rule.zero_sign : sum[i];
  }
  Acc count[kMergeBlock] = {};
  for (int64_t k = 0; k < num_sources; ++k) {
    const Acc* t = deltas + k * kMergeBlock;
    const Acc after = sources[k].after, divisor = sources[k].divisor;
    if (rule.election == Election::none) {
      for (int64_t i = 0; i < n; ++i) total[i] += t[i] * after;
      continue;
    }
    // a sum of zero elects plus where the rule is sum_not_negative, and nothing where sign_of_sum has no sign for it
    const bool zero_is_plus = rule.election == Election::sum_not_negative;
    for (int64_t i = 0; i < n; ++i) {
      const bool plus = zero_is_plus ? sum[i] >= 0 : sum[i] > 0, minus = sum[i] < 0;
      const bool agrees = (plus & (t[i] > 0)) | (minus & (t[i] < 0));
      const Acc weighted = t[i] * after;
      total[i] += agrees ? weighted : t[i] == t[i] ? Acc(0) : t[i];  // NaN is not lost
      count[i] += agrees ? divisor : Acc(0);
    }
  }
  if (rule.divisor == Divisor::count)
    for (int64_t i = 0; i < n; ++i) total[i] = total[i] / (count[i] < 1 ? Acc(1) : count[i]);
  else if (rule.divisor == Divisor::weights)
    for (int64_t i = 0; i < n; ++i) total[i] = total[i] / (count[i] == 0 ? Acc(1) : count[i]);
  else if (rule.divisor == Divisor::constant)
    for (int64_t i = 0; i < n; ++i) total[i] = total[i] / rule.constant;
  if (rule.lambda != Acc(1))
    for (int64_t i = 0; i < n; ++i) total[i] = total[i] * rule.lambda;
  if (from != nullptr)
    for (int64_t i = 0; i < n; ++i) total[i] = to_acc(from[i]) + total[i];
  for (int64_t i = 0; i < n; ++i) out[first + i] = round_once<T>(total[i]);
  return result;
}

template <class T>
static void magnitudes(const T* base, const MergeExpert<T>& expert, int64_t first, int64_t n, const MergeSource<acc_t<T>>& source,
                       double* sums) {
  using Acc = acc_t<T>;
  MergeSource<Acc> all{.lower = 0,
                       .lower_end = INT64_MAX,
                       .upper = INT32_MAX,
                       .upper_end = 0,
                       .keep_below = uint64_t{1} << 32,
                       .key = 0,
                       .rescale = 1,
                       .before = 1,
                       .after = 1,
                       .divisor = 1};
  Acc t[kMergeBlock];
  const T* from = base == nullptr ? nullptr : base + first;
  for (int pass = 0; pass < 2; ++pass) {
    kept_differences(from, expert, first, n, pass == 0 ? all : source, t);
    double lanes[8] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i % 8] += static_cast<double>(t[i] < 0 ? -t[i] : t[i]);
    for (const double lane : lanes) sums[pass] += lane;
  }
}

}  // namespace moe::MOE_ISA
