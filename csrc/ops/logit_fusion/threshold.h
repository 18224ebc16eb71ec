// The smallest logit that a TokenFilter keeps (python/moe_kernels/ops/logit_fusion/token_filter.py has the rule), without
// sorting the row: values are counted in buckets by their distance from the largest, and one bucket is sorted.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "common/check.h"
#include "common/workspace.h"
#include "microkernels/logit_table.h"

namespace moe {

struct TokenFilter {
  int64_t top_k = 0;
  double top_p = 1, min_p = 0;
  int64_t min_keep = 1;
  bool keeps_all = true;

  // numbers: empty, or top_k, top_p, min_p, min_keep
  explicit TokenFilter(const std::vector<double>& numbers) {
    if (numbers.empty()) return;
    MOE_CHECK(numbers.size() == 4 && numbers[3] >= 1, "fuse_logits: a filter must be empty or of 4 numbers");
    top_k = static_cast<int64_t>(numbers[0]);
    top_p = numbers[1];
    min_p = numbers[2];
    min_keep = static_cast<int64_t>(numbers[3]);
    keeps_all = false;
  }
};

template <class Acc>
class Threshold {
 public:
  // z: [n], `top` its largest value
  Threshold(const Acc* z, int64_t n, Acc top, Scratch& scratch)
      : z_(z), n_(n), top_(top), counts_(scratch.take<int64_t>(kLogitBuckets)),
        masses_(scratch.take<double>(kLogitBuckets)), values_(scratch.take<Acc>(n)) {}

  Acc operator()(const TokenFilter& filter) {
    Acc bound = -std::numeric_limits<Acc>::infinity();
    if (filter.keeps_all || !(top_ > bound)) return bound;
    fill_zero(counts_, kLogitBuckets);
    fill_zero(masses_, kLogitBuckets);
    const bool needs_masses = filter.top_p < 1;
    if (filter.top_k > 0 || needs_masses || filter.min_keep > 1)
      logit_kernels<Acc>().histogram(z_, n_, top_, counts_, needs_masses ? masses_ : nullptr);
    if (filter.top_k > 0) bound = kth_largest(filter.top_k);
    if (needs_masses) bound = std::max(bound, nucleus(filter.top_p, bound));
    if (filter.min_p > 0) bound = std::max(bound, top_ + static_cast<Acc>(std::log(filter.min_p)));
    return std::min(bound, filter.min_keep > 1 ? kth_largest(filter.min_keep) : top_);
  }

 private:
  // -inf where there are fewer than k values
  Acc kth_largest(int64_t k) {
    int64_t before = 0;
    for (int64_t bucket = 0; bucket < kLogitBuckets; before += counts_[bucket++]) {
      if (before + counts_[bucket] < k) continue;
      const int64_t count = logit_kernels<Acc>().bucket_values(z_, n_, top_, bucket, values_);
      Acc* wanted = values_ + (k - 1 - before);
      std::nth_element(values_, wanted, values_ + count, std::greater<Acc>());
      return *wanted;
    }
    return -std::numeric_limits<Acc>::infinity();
  }

  // The smallest value at or above `lowest` above which less than top_p of the mass at or above `lowest` lies.
  Acc nucleus(double top_p, Acc lowest) {
    double total = 0;
    int64_t last = -1;  // the last bucket with a value at or above lowest
    for (int64_t bucket = 0; bucket < kLogitBuckets; ++bucket) {
      if (counts_[bucket] == 0) continue;
      const int64_t count = may_reach_below(bucket, lowest) ? sorted(bucket, lowest) : -1;
      if (count == 0) break;
      if (count > 0) masses_[bucket] = mass(count);
      total += masses_[bucket];
      last = bucket;
    }
    const double target = top_p * total;
    double before = 0;
    int64_t crossing = 0;  // the last bucket whose first value is inside
    double before_crossing = 0;
    for (int64_t bucket = 0; bucket <= last; ++bucket) {
      if (counts_[bucket] == 0) continue;
      if (!(before < target)) break;
      crossing = bucket;
      before_crossing = before;
      before += masses_[bucket];
    }
    const int64_t count = sorted(crossing, lowest);
    Acc bound = values_[0];
    double above = before_crossing, inside = above;
    for (int64_t i = 0; i < count; ++i) {
      if (i > 0 && values_[i] < values_[i - 1]) above = inside;
      if (!(above < target)) break;
      bound = values_[i];
      inside += exp_from_top(values_[i]);
    }
    return bound;
  }

  // Whether a bucket may hold values below `lowest`.
  bool may_reach_below(int64_t bucket, Acc lowest) const {
    return static_cast<double>(top_ - lowest) * kLogitBucketsPerNat < static_cast<double>(bucket + 2);
  }

  // The bucket's values at or above `lowest`, largest first, in values_.
  int64_t sorted(int64_t bucket, Acc lowest) {
    const int64_t count = logit_kernels<Acc>().bucket_values(z_, n_, top_, bucket, values_);
    std::sort(values_, values_ + count, std::greater<Acc>());
    int64_t kept = 0;
    while (kept < count && values_[kept] >= lowest) ++kept;
    return kept;
  }

  double mass(int64_t count) const {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += exp_from_top(values_[i]);
    return sum;
  }

  double exp_from_top(Acc value) const { return std::exp(static_cast<double>(value - top_)); }

  const Acc* z_;
  int64_t n_;
  Acc top_;
  int64_t* counts_;
  double* masses_;
  Acc* values_;
};

}  // namespace moe
