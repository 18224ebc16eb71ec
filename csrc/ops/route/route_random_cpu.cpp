// Random routing on the CPU: the experts with the largest random numbers, drawn by counter, so that any process that
// knows seed, step, layer and token draws the same.
#include <torch/csrc/stable/library.h>

#include "common/philox.h"
#include "ops/route/route.h"

namespace moe {
namespace {

Tensor route_random_cpu(const Tensor& token_ids_in, int64_t num_experts, int64_t top_k, int64_t seed, int64_t step,
                        int64_t layer) {
  MOE_CHECK(token_ids_in.dim() == 1 && token_ids_in.scalar_type() == ScalarType::Long,
            "route_random: token_ids must be int64 of shape [num_tokens]");
  MOE_CHECK(top_k >= 0 && top_k <= num_experts, "route_random: top_k must be in [0, num_experts=", num_experts,
            "], got ", top_k);
  const Tensor token_ids = torch::stable::contiguous(token_ids_in);
  const int64_t num_tokens = token_ids.size(0);
  Tensor topk_ids = torch::stable::new_empty(token_ids, {num_tokens, top_k}, ScalarType::Int);
  const int64_t* tokens = data<int64_t>(token_ids);
  int32_t* ids = mutable_data<int32_t>(topk_ids);
  const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(step);
  parallel_ranges(num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    double* draws = scratch.take<double>(num_experts);  // double holds every uint32
    double* best = scratch.take<double>(top_k);
    for (int64_t t = begin; t < end; ++t) {
      const uint64_t token = static_cast<uint64_t>(tokens[t]);
      for (int64_t first = 0; first < num_experts; first += 4) {
        const PhiloxBlock block =
            philox({{static_cast<uint32_t>(token), static_cast<uint32_t>(token >> 32),
                     static_cast<uint32_t>(first / 4), static_cast<uint32_t>(layer)}},
                   key0, key1);
        for (int64_t i = 0; i < 4 && first + i < num_experts; ++i) draws[first + i] = block.words[i];
      }
      microkernels<double>().largest(draws, num_experts, top_k, ids + t * top_k, best);
    }
  });
  return topk_ids;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("route_random", TORCH_BOX(&moe::route_random_cpu)); }
