// What every way of choosing experts does to one row of logits.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "microkernels/table.h"

namespace moe {

constexpr double kRouteEpsilon = 1e-20;  // as in reference.py
constexpr int64_t kTokensPerTask = 32;

template <class Acc>
constexpr Acc kNoChoice = -std::numeric_limits<Acc>::infinity();

// Reads the logits of one token at a time, whatever their strides.
template <class T>
class LogitRows {
 public:
  LogitRows(const Tensor& logits, Scratch& scratch)
      : logits_(data<T>(logits)), token_stride_(logits.stride(0)), expert_stride_(logits.stride(1)),
        num_experts_(logits.size(1)), row_(scratch.take<T>(num_experts_)) {}

  // Valid until the next call.
  const T* operator()(int64_t token) {
    const T* row = logits_ + token * token_stride_;
    if (expert_stride_ == 1) return row;
    for (int64_t e = 0; e < num_experts_; ++e) row_[e] = row[e * expert_stride_];
    return row_;
  }

 private:
  const T* logits_;
  int64_t token_stride_, expert_stride_, num_experts_;
  T* row_;
};

// Whether a row can be routed at all: some logit above -inf, and neither NaN nor +inf.
template <class Acc>
bool routable(const Acc* logits, int64_t num_experts) {
  bool any = false;
  for (int64_t e = 0; e < num_experts; ++e) {
    if (!(logits[e] < std::numeric_limits<Acc>::infinity())) return false;
    any |= logits[e] > kNoChoice<Acc>;
  }
  return any;
}

// Indices of the `count` largest values, largest first, lowest index first among equals; values at -inf are left out.
// Returns how many there were. One pass keeps a sorted list of the best: most values fail its first comparison.
template <class Acc>
int64_t largest(const Acc* values, int64_t n, int64_t count, int32_t* indices, Acc* best) {
  int64_t found = 0;
  if (count == 0) return 0;
  for (int64_t i = 0; i < n; ++i) {
    const Acc value = values[i];
    if (!(value > kNoChoice<Acc>) || (found == count && !(value > best[count - 1]))) continue;
    int64_t at = found < count ? found++ : count - 1;
    for (; at > 0 && best[at - 1] < value; --at) {
      best[at] = best[at - 1];
      indices[at] = indices[at - 1];
    }
    best[at] = value;
    indices[at] = static_cast<int32_t>(i);
  }
  return found;
}

// Turns the scores of one token's picks into its weights: ids outside [0, num_experts) weigh nothing.
template <class Acc>
void weigh(const Acc* scores, int64_t num_experts, const int32_t* ids, int64_t num_picks, bool renormalize,
           double scaling_factor, Acc* weights) {
  Acc sum = 0;
  for (int64_t k = 0; k < num_picks; ++k)
    sum += weights[k] = ids[k] >= 0 && ids[k] < num_experts ? scores[ids[k]] : Acc{0};
  const Acc factor = static_cast<Acc>(scaling_factor);
  for (int64_t k = 0; k < num_picks; ++k)
    weights[k] = (renormalize ? weights[k] / (sum + static_cast<Acc>(kRouteEpsilon)) : weights[k]) * factor;
}

// Marks the slots from `found` on as empty.
template <class Acc>
void leave_empty(int64_t found, int64_t num_picks, int32_t* ids, Acc* weights) {
  for (int64_t k = found; k < num_picks; ++k) {
    ids[k] = -1;
    weights[k] = 0;
  }
}

}  // namespace moe
