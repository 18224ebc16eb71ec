// Routing on the CPU: scores, choice and weights of one token at a time; nothing of size [num_tokens, num_experts] is
// written.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "microkernels/convert.h"
#include "microkernels/table.h"

namespace moe {
namespace {

constexpr double kEpsilon = 1e-20;  // as in reference.py
constexpr int64_t kTokensPerTask = 32;

// Indices of the `count` largest values, largest first, lowest index first among equals; values at -inf are left out.
// Returns how many there were. One pass keeps a sorted list of the best: most values fail its first comparison.
template <class Acc>
int64_t largest(const Acc* values, int64_t n, int64_t count, int32_t* indices, Acc* best) {
  int64_t found = 0;
  if (count == 0) return 0;
  for (int64_t i = 0; i < n; ++i) {
    const Acc value = values[i];
    if (!(value > -std::numeric_limits<Acc>::infinity()) || (found == count && !(value > best[count - 1]))) continue;
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

// Puts -inf where the expert's group is not among the topk_groups best.
template <class Acc>
void keep_best_groups(Acc* choice, int64_t num_experts, int64_t num_groups, int64_t topk_groups, bool top2_sum,
                      Acc* group_scores, int32_t* groups, Acc* best) {
  constexpr Acc kNone = -std::numeric_limits<Acc>::infinity();
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
    group_scores[group] = top2_sum && size > 1 ? first + second : first;
  }
  int64_t kept = largest(group_scores, num_groups, topk_groups, groups, best);
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
                                     int64_t topk_groups, int64_t group_score) {
  MOE_CHECK(logits.dim() == 2, "route: logits must be of shape [num_tokens, num_experts]");
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  MOE_CHECK(top_k >= 0 && top_k <= num_experts, "route: top_k must be in [0, num_experts=", num_experts, "], got ", top_k);
  MOE_CHECK(num_groups >= 1 && num_experts % num_groups == 0 && topk_groups >= 1 && topk_groups <= num_groups,
            "route: num_groups must divide num_experts and topk_groups be in [1, num_groups]");
  MOE_CHECK(!expert_bias || expert_bias->numel() == num_experts, "route: expert_bias must be of shape [num_experts]");
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  Tensor topk_ids = torch::stable::new_empty(logits, {num_tokens, top_k}, ScalarType::Int);
  Tensor topk_weights =
      torch::stable::new_empty(logits, {num_tokens, top_k}, is_double ? ScalarType::Double : ScalarType::Float);
  dispatch_float("route", logits.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    constexpr Acc kNone = -std::numeric_limits<Acc>::infinity();
    Scratch scratch;
    Acc* bias = nullptr;
    if (expert_bias) read_floats(*expert_bias, bias = scratch.take<Acc>(num_experts));
    const T* in = data<T>(logits);
    const int64_t token_stride = logits.stride(0), expert_stride = logits.stride(1);
    int32_t* ids = mutable_data<int32_t>(topk_ids);
    Acc* weights = mutable_data<Acc>(topk_weights);
    parallel_ranges(num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      Scratch task_scratch;
      T* row = task_scratch.take<T>(num_experts);
      Acc* values = task_scratch.take<Acc>(num_experts);
      Acc* scores = task_scratch.take<Acc>(num_experts);
      Acc* group_scores = task_scratch.take<Acc>(num_groups);
      int32_t* groups = task_scratch.take<int32_t>(num_groups);
      Acc* best = task_scratch.take<Acc>(std::max(top_k, topk_groups));
      for (int64_t t = begin; t < end; ++t) {
        const T* logits_row = in + t * token_stride;
        if (expert_stride != 1) {
          for (int64_t e = 0; e < num_experts; ++e) row[e] = logits_row[e * expert_stride];
          logits_row = row;
        }
        microkernels<T>().load_row(logits_row, values, num_experts);
        bool routable = false;
        for (int64_t e = 0; e < num_experts; ++e) {
          if (!(values[e] < std::numeric_limits<Acc>::infinity())) {  // NaN or +inf
            routable = false;
            break;
          }
          routable |= values[e] > kNone;
        }
        int32_t* row_ids = ids + t * top_k;
        Acc* row_weights = weights + t * top_k;
        int64_t found = 0;
        if (routable) {
          microkernels<T>().scores(logits_row, num_experts, score == 1, scores);
          for (int64_t e = 0; e < num_experts; ++e)  // values becomes the choice
            values[e] = values[e] > kNone && !(bias != nullptr && bias[e] != bias[e])
                            ? scores[e] + (bias == nullptr ? Acc{0} : bias[e])
                            : kNone;
          if (topk_groups < num_groups)
            keep_best_groups(values, num_experts, num_groups, topk_groups, group_score == 1, group_scores, groups, best);
          found = largest(values, num_experts, top_k, row_ids, best);
        }
        Acc sum = 0;
        for (int64_t k = 0; k < found; ++k) sum += row_weights[k] = scores[row_ids[k]];
        const Acc factor = static_cast<Acc>(scaling_factor);
        for (int64_t k = 0; k < found; ++k)
          row_weights[k] = (renormalize ? row_weights[k] / (sum + static_cast<Acc>(kEpsilon)) : row_weights[k]) * factor;
        for (int64_t k = found; k < top_k; ++k) {
          row_ids[k] = -1;
          row_weights[k] = 0;
        }
      }
    });
  });
  return {topk_ids, topk_weights};
}

// autograd.py has the equations.
Tensor route_backward_cpu(const Tensor& grad_weights_in, const Tensor& logits_in, const Tensor& topk_ids, int64_t score,
                          bool renormalize, double scaling_factor) {
  const Tensor grad_weights = torch::stable::contiguous(grad_weights_in);
  const Tensor logits = with_contiguous_rows(logits_in);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1), top_k = topk_ids.size(1);
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  MOE_CHECK(topk_ids.size(0) == num_tokens && grad_weights.numel() == num_tokens * top_k &&
                topk_ids.scalar_type() == ScalarType::Int &&
                grad_weights.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
            "route: the gradient must have the shape and dtype of topk_weights");
  Tensor grad_logits = torch::stable::new_empty(logits, {num_tokens, num_experts});
  dispatch_float("route", logits.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    const T* in = data<T>(logits);
    const int64_t token_stride = logits.stride(0);
    const int32_t* ids = data<int32_t>(topk_ids);
    const Acc* grad = data<Acc>(grad_weights);
    T* out = mutable_data<T>(grad_logits);
    parallel_ranges(num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      Acc* scores = scratch.take<Acc>(num_experts);
      Acc* grad_scores = scratch.take<Acc>(num_experts);
      for (int64_t t = begin; t < end; ++t) {
        const int32_t* row_ids = ids + t * top_k;
        const Acc* row_grad = grad + t * top_k;
        for (int64_t e = 0; e < num_experts; ++e) grad_scores[e] = 0;
        Acc sum = 0, weighted = 0;
        bool chosen = false;
        for (int64_t k = 0; k < top_k; ++k) chosen |= row_ids[k] >= 0 && row_ids[k] < num_experts;
        if (chosen) {
          microkernels<T>().scores(in + t * token_stride, num_experts, score == 1, scores);
          for (int64_t k = 0; k < top_k; ++k) {
            if (row_ids[k] < 0 || row_ids[k] >= num_experts) continue;
            sum += scores[row_ids[k]];
            weighted += row_grad[k] * scores[row_ids[k]];
          }
          sum += static_cast<Acc>(kEpsilon);
          Acc inner = 0;
          for (int64_t k = 0; k < top_k; ++k) {
            if (row_ids[k] < 0 || row_ids[k] >= num_experts) continue;
            const Acc g = renormalize ? (row_grad[k] - weighted / sum) / sum : row_grad[k];
            grad_scores[row_ids[k]] += g * static_cast<Acc>(scaling_factor);
            inner += g * static_cast<Acc>(scaling_factor) * scores[row_ids[k]];
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
  m.impl("route_backward", TORCH_BOX(&moe::route_backward_cpu));
}
