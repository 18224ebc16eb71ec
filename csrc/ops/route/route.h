// What every way of choosing experts does to one row of logits.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "microkernels/table.h"

namespace moe {

constexpr double kRouteEpsilon = 1e-20;  // as in reference.py
constexpr int64_t kTokensPerTask = 32;

template <class Acc>
constexpr Acc kNoChoice = -std::numeric_limits<Acc>::infinity();

// One token after another: its scores and what choosing goes by, whatever the strides of the logits.
template <class T>
class ScoredRows {
  using Acc = acc_t<T>;

 public:
  ScoredRows(const Tensor& logits, bool sigmoid, const Acc* bias, Scratch& scratch)
      : logits_(data<T>(logits)), token_stride_(logits.stride(0)), expert_stride_(logits.stride(1)),
        num_experts_(logits.size(1)), sigmoid_(sigmoid), bias_(bias), row_(scratch.take<T>(num_experts_)),
        scores_(scratch.take<Acc>(num_experts_)), choice_(scratch.take<Acc>(num_experts_)) {}

  // Whether the token can be routed; scores() and choice() are then its own, until the next call.
  bool read(int64_t token) {
    const T* row = logits_ + token * token_stride_;
    if (expert_stride_ != 1) {
      for (int64_t e = 0; e < num_experts_; ++e) row_[e] = row[e * expert_stride_];
      row = row_;
    }
    return microkernels<T>().scores(row, num_experts_, sigmoid_, bias_, scores_, choice_);
  }
  const Acc* scores() const { return scores_; }
  Acc* choice() { return choice_; }  // scores + bias, -inf where an expert is out

 private:
  const T* logits_;
  int64_t token_stride_, expert_stride_, num_experts_;
  bool sigmoid_;
  const Acc* bias_;
  T* row_;
  Acc *scores_, *choice_;
};

// The results of choosing, ids and weights [num_tokens, num_picks], filled by choose.template operator()<T>(ids, weights).
template <class F>
std::tuple<Tensor, Tensor> with_picks(const char* op, const Tensor& logits, int64_t num_picks, const F& choose) {
  const int64_t num_tokens = logits.size(0);
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  Tensor topk_ids = torch::stable::new_empty(logits, {num_tokens, num_picks}, ScalarType::Int);
  Tensor topk_weights =
      torch::stable::new_empty(logits, {num_tokens, num_picks}, is_double ? ScalarType::Double : ScalarType::Float);
  dispatch_float(op, logits.scalar_type(), [&]<class T>() {
    choose.template operator()<T>(mutable_data<int32_t>(topk_ids), mutable_data<acc_t<T>>(topk_weights));
  });
  return {topk_ids, topk_weights};
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
  std::fill(ids + found, ids + num_picks, -1);
  std::fill(weights + found, weights + num_picks, Acc{0});
}

}  // namespace moe
