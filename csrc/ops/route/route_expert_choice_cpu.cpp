// Expert choice on the CPU: scores of all tokens, then each expert picks its tokens, then each token collects its experts.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/route/route.h"

namespace moe {
namespace {

std::tuple<Tensor, Tensor> route_expert_choice_cpu(const Tensor& logits, int64_t capacity, double scaling_factor) {
  MOE_CHECK(logits.dim() == 2, "route_expert_choice: logits must be of shape [num_tokens, num_experts]");
  MOE_CHECK(capacity >= 0, "route_expert_choice: capacity must be at least 0, got ", capacity);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  MOE_CHECK(num_tokens < (int64_t{1} << 31), "route_expert_choice: num_tokens must be below 2**31, got ", num_tokens);
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  Tensor topk_ids = torch::stable::new_empty(logits, {num_tokens, num_experts}, ScalarType::Int);
  Tensor topk_weights =
      torch::stable::new_empty(logits, {num_tokens, num_experts}, is_double ? ScalarType::Double : ScalarType::Float);
  dispatch_float("route_expert_choice", logits.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    int32_t* ids = mutable_data<int32_t>(topk_ids);
    Acc* weights = mutable_data<Acc>(topk_weights);
    Scratch scratch;
    Acc* by_expert = scratch.take<Acc>(num_experts * num_tokens);  // [num_experts, num_tokens]: an expert reads its row
    parallel_ranges(num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      Scratch task_scratch;
      LogitRows<T> rows(logits, task_scratch);
      Acc* values = task_scratch.take<Acc>(num_experts);
      Acc* scores = task_scratch.take<Acc>(num_experts);
      for (int64_t t = begin; t < end; ++t) {
        const T* row = rows(t);
        microkernels<T>().load_row(row, values, num_experts);
        const bool usable = routable(values, num_experts);
        if (usable) microkernels<T>().scores(row, num_experts, false, scores);
        for (int64_t e = 0; e < num_experts; ++e)
          by_expert[e * num_tokens + t] = usable && values[e] > kNoChoice<Acc> ? scores[e] : kNoChoice<Acc>;
      }
    });
    // what an expert does not take becomes -inf
    parallel_ranges(num_experts, 1, [&](int64_t e, int64_t) {
      Scratch task_scratch;
      Acc* scores = by_expert + e * num_tokens;
      int32_t* order = task_scratch.take<int32_t>(num_tokens);
      for (int64_t t = 0; t < num_tokens; ++t) order[t] = static_cast<int32_t>(t);
      if (capacity >= num_tokens) return;
      std::nth_element(order, order + capacity, order + num_tokens, [scores](int32_t a, int32_t b) {
        return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
      });
      for (int64_t i = capacity; i < num_tokens; ++i) scores[order[i]] = kNoChoice<Acc>;
    });
    parallel_ranges(num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        int32_t* row_ids = ids + t * num_experts;
        Acc* row_weights = weights + t * num_experts;
        int64_t found = 0;
        for (int64_t e = 0; e < num_experts; ++e) {
          const Acc score = by_expert[e * num_tokens + t];
          if (!(score > kNoChoice<Acc>)) continue;
          row_ids[found] = static_cast<int32_t>(e);
          row_weights[found++] = score * static_cast<Acc>(scaling_factor);
        }
        leave_empty(found, num_experts, row_ids, row_weights);
      }
    });
  });
  return {topk_ids, topk_weights};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("route_expert_choice", TORCH_BOX(&moe::route_expert_choice_cpu));
}
