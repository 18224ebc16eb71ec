// Top-p routing on the CPU: each token takes experts from the best down until their probabilities exceed top_p.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/route/route.h"

namespace moe {
namespace {

std::tuple<Tensor, Tensor> route_top_p_cpu(const Tensor& logits, double top_p, int64_t max_experts, bool renormalize,
                                           double scaling_factor) {
  MOE_CHECK(logits.dim() == 2, "route_top_p: logits must be of shape [num_tokens, num_experts]");
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  MOE_CHECK(max_experts >= 0 && max_experts <= num_experts, "route_top_p: max_experts must be in [0, num_experts=",
            num_experts, "], got ", max_experts);
  const bool is_double = logits.scalar_type() == ScalarType::Double;
  Tensor topk_ids = torch::stable::new_empty(logits, {num_tokens, max_experts}, ScalarType::Int);
  Tensor topk_weights =
      torch::stable::new_empty(logits, {num_tokens, max_experts}, is_double ? ScalarType::Double : ScalarType::Float);
  dispatch_float("route_top_p", logits.scalar_type(), [&]<class T>() {
    using Acc = acc_t<T>;
    int32_t* ids = mutable_data<int32_t>(topk_ids);
    Acc* weights = mutable_data<Acc>(topk_weights);
    parallel_ranges(num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      LogitRows<T> rows(logits, scratch);
      Acc* values = scratch.take<Acc>(num_experts);
      Acc* scores = scratch.take<Acc>(num_experts);
      int32_t* heap = scratch.take<int32_t>(num_experts);
      const auto is_worse = [scores](int32_t a, int32_t b) {
        return scores[a] < scores[b] || (scores[a] == scores[b] && a > b);
      };
      for (int64_t t = begin; t < end; ++t) {
        const T* row = rows(t);
        microkernels<T>().load_row(row, values, num_experts);
        int32_t* row_ids = ids + t * max_experts;
        int64_t found = 0;
        if (routable(values, num_experts)) {
          microkernels<T>().scores(row, num_experts, false, scores);
          int32_t* heap_end = heap;
          for (int64_t e = 0; e < num_experts; ++e)
            if (values[e] > kNoChoice<Acc>) *heap_end++ = static_cast<int32_t>(e);
          // a heap, not a sort: most tokens stop after a few experts
          std::make_heap(heap, heap_end, is_worse);
          double before = 0;  // sum of the probabilities above this rank; double, so that it adds no rounding of its own
          while (found < max_experts && heap_end != heap && (top_p >= 1 || before <= top_p)) {
            std::pop_heap(heap, heap_end--, is_worse);
            before += static_cast<double>(scores[*heap_end]);
            row_ids[found++] = *heap_end;
          }
        }
        weigh(scores, num_experts, row_ids, found, renormalize, scaling_factor, weights + t * max_experts);
        leave_empty(found, max_experts, row_ids, weights + t * max_experts);
      }
    });
  });
  return {topk_ids, topk_weights};
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("route_top_p", TORCH_BOX(&moe::route_top_p_cpu)); }
