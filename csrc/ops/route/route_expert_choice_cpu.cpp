// Expert choice on the CPU: scores of all tokens, then each expert picks its tokens, then each token collects its experts.
#include <torch/csrc/stable/library.h>

#include "ops/route/route.h"

namespace moe {
namespace {

std::tuple<Tensor, Tensor> route_expert_choice_cpu(const Tensor& logits, int64_t capacity, double scaling_factor) {
  MOE_CHECK(logits.dim() == 2, "route_expert_choice: logits must be of shape [num_tokens, num_experts]");
  MOE_CHECK(capacity >= 0, "route_expert_choice: capacity must be at least 0, got ", capacity);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  MOE_CHECK(num_tokens < (int64_t{1} << 31), "route_expert_choice: num_tokens must be below 2**31, got ", num_tokens);
  return with_picks("route_expert_choice", logits, num_experts, [&]<class T>(int32_t* ids, acc_t<T>* weights) {
    using Acc = acc_t<T>;
    Scratch scratch;
    // the scores of an expert side by side; the rows apart by no power of two, which would put them into the same cache sets
    const int64_t expert_stride = (num_tokens + 31) / 16 * 16 + 16;
    Acc* by_expert = scratch.take<Acc>(num_experts * expert_stride);
    Acc* thresholds = scratch.take<Acc>(num_experts);
    // weights hold the scores until the experts have chosen
    parallel_ranges(num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      Scratch task_scratch;
      ScoredRows<T> rows(logits, false, nullptr, task_scratch);
      for (int64_t t = begin; t < end; ++t) {
        Acc* row = weights + t * num_experts;
        if (rows.read(t))
          std::copy_n(rows.choice(), num_experts, row);
        else
          std::fill_n(row, num_experts, kNoChoice<Acc>);
      }
      microkernels<T>().transpose_rows(weights + begin * num_experts, num_experts, end - begin, num_experts,
                                       by_expert + begin, expert_stride);
    });
    parallel_ranges(num_experts, 1, [&](int64_t e, int64_t) {
      const Acc* scores = by_expert + e * expert_stride;
      if (capacity == 0 || num_tokens == 0) {
        thresholds[e] = std::numeric_limits<Acc>::infinity();
        return;
      }
      int64_t num_equal;
      thresholds[e] = microkernels<T>().threshold(scores, num_tokens, std::min(capacity, num_tokens), &num_equal);
      if (num_equal == num_tokens) return;
      for (int64_t t = 0; t < num_tokens; ++t)  // the last of equal tokens do not fit
        if (scores[t] == thresholds[e] && --num_equal < 0) weights[t * num_experts + e] = kNoChoice<Acc>;
    });
    parallel_ranges(num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        int32_t* row_ids = ids + t * num_experts;
        Acc* row = weights + t * num_experts;
        const int64_t found = microkernels<T>().reaching(row, thresholds, num_experts, static_cast<Acc>(scaling_factor),
                                                         row_ids, row);
        leave_empty(found, num_experts, row_ids, row);
      }
    });
  });
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) {
  m.impl("route_expert_choice", TORCH_BOX(&moe::route_expert_choice_cpu));
}
