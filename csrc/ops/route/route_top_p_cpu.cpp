// Top-p routing on the CPU: each token takes experts from the best down until their probabilities exceed top_p.
#include <torch/csrc/stable/library.h>

#include "ops/route/route.h"

namespace moe {
namespace {

// Most tokens stop after a few experts: these come sorted at once, the others from a heap.
constexpr int64_t kFirstPicks = 16;

std::tuple<Tensor, Tensor> route_top_p_cpu(const Tensor& logits, double top_p, int64_t max_experts, bool renormalize,
                                           double scaling_factor) {
  MOE_CHECK(logits.dim() == 2, "route_top_p: logits must be of shape [num_tokens, num_experts]");
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  MOE_CHECK(max_experts >= 0 && max_experts <= num_experts, "route_top_p: max_experts must be in [0, num_experts=",
            num_experts, "], got ", max_experts);
  return with_picks("route_top_p", logits, max_experts, [&]<class T>(int32_t* ids, acc_t<T>* weights) {
    using Acc = acc_t<T>;
    const int64_t num_first = std::min(max_experts, kFirstPicks);
    parallel_ranges(num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      ScoredRows<T> rows(logits, false, nullptr, scratch);
      const Acc* scores = rows.scores();
      Acc* best = scratch.take<Acc>(num_first);
      int32_t* heap = scratch.take<int32_t>(num_experts);
      const auto is_worse = [scores](int32_t a, int32_t b) {
        return scores[a] < scores[b] || (scores[a] == scores[b] && a > b);
      };
      for (int64_t t = begin; t < end; ++t) {
        int32_t* row_ids = ids + t * max_experts;
        int64_t found = 0;
        double before = 0;  // sum of the probabilities above this rank; double, so that it adds no rounding of its own
        const auto wants_more = [&] { return found < max_experts && (top_p >= 1 || before <= top_p); };
        if (rows.read(t)) {
          const int64_t sorted = microkernels<T>().largest(rows.choice(), num_experts, num_first, row_ids, best);
          while (found < sorted && wants_more()) before += static_cast<double>(scores[row_ids[found++]]);
          if (found == kFirstPicks && wants_more()) {
            int32_t* heap_end = heap;
            for (int32_t e = 0; e < num_experts; ++e)
              if (rows.choice()[e] > kNoChoice<Acc> && is_worse(e, row_ids[found - 1])) *heap_end++ = e;
            std::make_heap(heap, heap_end, is_worse);
            while (heap_end != heap && wants_more()) {
              std::pop_heap(heap, heap_end--, is_worse);
              before += static_cast<double>(scores[*heap_end]);
              row_ids[found++] = *heap_end;
            }
          }
        }
        weigh(scores, num_experts, row_ids, found, renormalize, scaling_factor, weights + t * max_experts);
        leave_empty(found, max_experts, row_ids, weights + t * max_experts);
      }
    });
  });
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("route_top_p", TORCH_BOX(&moe::route_top_p_cpu)); }
