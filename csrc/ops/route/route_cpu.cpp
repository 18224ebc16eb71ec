// Routing on the CPU: scores, choice and weights of one token at a time; nothing of size [num_tokens, num_experts] is
// written.
#include <torch/csrc/stable/library.h>

#include "microkernels/convert.h"
#include "ops/route/route.h"

namespace moe {
namespace {

// Puts -inf where the expert's group is not among the topk_groups best.
template <class Acc>
void keep_best_groups(Acc* choice, int64_t num_experts, int64_t num_groups, int64_t topk_groups, bool top2_sum,
                      Acc* group_scores, int32_t* groups, Acc* best) {
  constexpr Acc kNone = kNoChoice<Acc>;
  const int64_t size = num_experts / num_groups;
  for (int64_t group = 0; group < num_groups; ++group) {
    Acc first = kNone, second = kNone;
    for (const Acc *x = choice + group * size, *end = x + size; x < end; ++x) {
      if (*x > first) {
        second = first;
        first = *x;
      } else if (*x > second) {
        second = *x;
      }
    }
    // an expert that is forced by a bias of +inf forces its group, whatever stands beside it
    const bool forced = first == std::numeric_limits<Acc>::infinity();
    group_scores[group] = top2_sum && size > 1 && !forced ? first + second : first;
  }
  int64_t kept = microkernels<Acc>().largest(group_scores, num_groups, topk_groups, groups, best);
  // groups at -inf (fewer than two experts left for top2_sum) fill up, lowest first
  for (int64_t group = 0; group < num_groups && kept < topk_groups; ++group)
    if (!(group_scores[group] > kNone)) groups[kept++] = static_cast<int32_t>(group);
  for (int64_t group = 0; group < num_groups; ++group) {
    bool keep = false;
    for (int64_t i = 0; i < kept; ++i) keep |= groups[i] == group;
    if (!keep)
      for (int64_t e = group * size; e < (group + 1) * size; ++e) choice[e] = kNone;
  }
}

std::tuple<Tensor, Tensor> route_cpu(const Tensor& logits, const std::optional<Tensor>& expert_bias, int64_t top_k,
                                     int64_t score, bool renormalize, double scaling_factor, int64_t num_groups,
                                     int64_t topk_groups, int64_t group_score, int64_t num_null_experts) {
  MOE_CHECK(logits.dim() == 2, "route: logits must be of shape [num_tokens, num_experts]");
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  MOE_CHECK(top_k >= 0 && top_k <= num_experts, "route: top_k must be in [0, num_experts=", num_experts, "], got ", top_k);
  MOE_CHECK(num_groups >= 1 && num_experts % num_groups == 0 && topk_groups >= 1 && topk_groups <= num_groups,
            "route: num_groups must divide num_experts and topk_groups be in [1, num_groups]");
  MOE_CHECK(!expert_bias || expert_bias->numel() == num_experts, "route: expert_bias must be of shape [num_experts]");
  return with_picks("route", logits, top_k, [&]<class T>(int32_t* ids, acc_t<T>* weights) {
    using Acc = acc_t<T>;
    Scratch scratch;
    Acc* bias = nullptr;
    if (expert_bias) read_floats(*expert_bias, bias = scratch.take<Acc>(num_experts));
    parallel_ranges(num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      Scratch task_scratch;
      ScoredRows<T> rows(logits, score == 1, bias, task_scratch);
      Acc* group_scores = task_scratch.take<Acc>(num_groups);
      int32_t* groups = task_scratch.take<int32_t>(num_groups);
      Acc* best = task_scratch.take<Acc>(std::max(top_k, topk_groups));
      for (int64_t t = begin; t < end; ++t) {
        int32_t* row_ids = ids + t * top_k;
        int64_t found = 0;
        if (rows.read(t)) {
          if (topk_groups < num_groups)
            keep_best_groups(rows.choice(), num_experts, num_groups, topk_groups, group_score == 1, group_scores, groups,
                             best);
          found = microkernels<T>().largest(rows.choice(), num_experts, top_k, row_ids, best);
        }
        weigh(rows.scores(), num_experts - num_null_experts, row_ids, found, renormalize, scaling_factor,
              weights + t * top_k);
        leave_empty(found, top_k, row_ids, weights + t * top_k);
      }
    });
  });
}

// Weights of experts that something else chose.
Tensor route_weights_cpu(const Tensor& logits, const Tensor& topk_ids_in, int64_t score, bool renormalize,
                         double scaling_factor) {
  const Tensor topk_ids = torch::stable::contiguous(topk_ids_in);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1), top_k = topk_ids.size(1);
  MOE_CHECK(topk_ids.size(0) == num_tokens && topk_ids.scalar_type() == ScalarType::Int,
            "route_weights: topk_ids must be int32 of shape [num_tokens=", num_tokens, ", top_k]");
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  Tensor topk_weights =
      torch::stable::new_empty(logits, {num_tokens, top_k}, is_double ? ScalarType::Double : ScalarType::Float);
  dispatch_float("route_weights", logits.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    const int32_t* ids = data<int32_t>(topk_ids);
    Acc* weights = mutable_data<Acc>(topk_weights);
    parallel_ranges(num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      ScoredRows<T> rows(logits, score == 1, nullptr, scratch);
      for (int64_t t = begin; t < end; ++t) {
        const bool usable = rows.read(t);
        weigh(rows.scores(), usable ? num_experts : 0, ids + t * top_k, top_k, renormalize, scaling_factor, weights + t * top_k);
      }
    });
  });
  return topk_weights;
}

// The gradient of every choice above and of the other files of this folder; autograd.py has the equations.
Tensor route_backward_cpu(const Tensor& grad_weights_in, const Tensor& logits, const Tensor& topk_ids_in, int64_t score,
                          bool renormalize, double scaling_factor, int64_t num_null_experts) {
  const Tensor grad_weights = torch::stable::contiguous(grad_weights_in);
  const Tensor topk_ids = torch::stable::contiguous(topk_ids_in);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1), top_k = topk_ids.size(1);
  const int64_t num_weighed = num_experts - num_null_experts;
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  MOE_CHECK(topk_ids.size(0) == num_tokens && grad_weights.numel() == num_tokens * top_k && num_weighed >= 0 &&
                topk_ids.scalar_type() == ScalarType::Int &&
                grad_weights.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
            "route: the gradient must have the shape and dtype of topk_weights");
  Tensor grad_logits = torch::stable::new_empty(logits, {num_tokens, num_experts});
  dispatch_float("route", logits.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    const int32_t* ids = data<int32_t>(topk_ids);
    const Acc* grad = data<Acc>(grad_weights);
    T* out = mutable_data<T>(grad_logits);
    parallel_ranges(num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      ScoredRows<T> rows(logits, score == 1, nullptr, scratch);
      const Acc* scores = rows.scores();
      Acc* grad_scores = scratch.take<Acc>(num_experts);
      for (int64_t t = begin; t < end; ++t) {
        const int32_t* row_ids = ids + t * top_k;
        const Acc* row_grad = grad + t * top_k;
        bool weighed = false;
        for (int64_t k = 0; k < top_k; ++k) weighed |= row_ids[k] >= 0 && row_ids[k] < num_weighed;
        weighed = weighed && rows.read(t);
        for (int64_t e = 0; e < num_experts; ++e) grad_scores[e] = 0;
        if (weighed) {
          Acc sum = 0, inner_weights = 0;
          for (int64_t k = 0; k < top_k; ++k) {
            if (row_ids[k] < 0 || row_ids[k] >= num_weighed) continue;
            sum += scores[row_ids[k]];
            inner_weights += row_grad[k] * scores[row_ids[k]];
          }
          sum += static_cast<Acc>(kRouteEpsilon);
          Acc inner = 0;
          for (int64_t k = 0; k < top_k; ++k) {
            if (row_ids[k] < 0 || row_ids[k] >= num_weighed) continue;
            const Acc unscaled = renormalize ? (row_grad[k] - inner_weights / sum) / sum : row_grad[k];
            const Acc g = unscaled * static_cast<Acc>(scaling_factor);
            grad_scores[row_ids[k]] += g;
            inner += g * scores[row_ids[k]];
          }
          for (int64_t e = 0; e < num_experts; ++e)
            grad_scores[e] = score == 1 ? grad_scores[e] * scores[e] * (Acc{1} - scores[e])
                                        : scores[e] * (grad_scores[e] - inner);
        }
        microkernels<T>().store_row(grad_scores, nullptr, out + t * num_experts, num_experts);
      }
    });
  });
  return grad_logits;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("route", TORCH_BOX(&moe::route_cpu));
  m.impl("route_weights", TORCH_BOX(&moe::route_weights_cpu));
  m.impl("route_backward", TORCH_BOX(&moe::route_backward_cpu));
}
