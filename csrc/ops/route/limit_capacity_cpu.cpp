// Expert capacity on the CPU: which token-expert pairs fit.
#include <torch/csrc/stable/library.h>

#include "microkernels/convert.h"
#include "ops/permute/permute.h"
#include "ops/route/route.h"

namespace moe {
namespace {

Tensor limit_capacity_cpu(const Tensor& topk_ids_in, const Tensor& topk_weights, int64_t num_experts, int64_t capacity,
                          bool by_weight, bool first_choices_first) {
  const Tensor topk_ids = torch::stable::contiguous(topk_ids_in);
  MOE_CHECK(topk_ids.dim() == 2 && topk_ids.scalar_type() == ScalarType::Int,
            "limit_capacity: topk_ids must be int32 of shape [num_tokens, top_k]");
  MOE_CHECK(topk_weights.numel() == topk_ids.numel(), "limit_capacity: topk_weights must have the shape of topk_ids");
  MOE_CHECK(num_experts >= 0 && capacity >= 0, "limit_capacity: num_experts and capacity must be at least 0");
  const int64_t num_tokens = topk_ids.size(0), top_k = topk_ids.size(1), num_pairs = num_tokens * top_k;
  MOE_CHECK(num_pairs < (int64_t{1} << 31), "limit_capacity: num_tokens * top_k must be below 2**31, got ", num_pairs);
  Tensor kept_ids = torch::stable::new_empty(topk_ids, {num_tokens, top_k}, ScalarType::Int);
  const int32_t* ids = data<int32_t>(topk_ids);
  int32_t* kept = mutable_data<int32_t>(kept_ids);
  for (int64_t pair = 0; pair < num_pairs; ++pair) kept[pair] = ids[pair];

  Scratch scratch;
  if (!by_weight) {
    int64_t* used = scratch.take<int64_t>(num_experts);
    fill_zero(used, num_experts);
    const auto take_place = [&](int64_t pair) {
      const int32_t e = ids[pair];
      if (e >= 0 && e < num_experts && ++used[e] > capacity) kept[pair] = -1;
    };
    if (first_choices_first) {
      for (int64_t k = 0; k < top_k; ++k)
        for (int64_t t = 0; t < num_tokens; ++t) take_place(t * top_k + k);
    } else {
      for (int64_t pair = 0; pair < num_pairs; ++pair) take_place(pair);
    }
    return kept_ids;
  }

  double* weights = scratch.take<double>(num_pairs);
  read_floats(topk_weights, weights);
  for (int64_t pair = 0; pair < num_pairs; ++pair)
    if (weights[pair] != weights[pair]) weights[pair] = kNoChoice<double>;  // NaN goes first
  int32_t* offsets = scratch.take<int32_t>(num_experts + 1);
  int32_t* pairs = scratch.take<int32_t>(num_pairs);
  sort_pairs(ids, top_k, 1, num_tokens, top_k, num_experts, offsets, pairs, nullptr);
  parallel_ranges(num_experts, 1, [&](int64_t e, int64_t) {
    int32_t *begin = pairs + offsets[e], *end = pairs + offsets[e + 1];
    if (end - begin <= capacity) return;
    std::nth_element(begin, begin + capacity, end, [weights](int32_t a, int32_t b) {
      return weights[a] > weights[b] || (weights[a] == weights[b] && a < b);
    });
    for (int32_t* pair = begin + capacity; pair < end; ++pair) kept[*pair] = -1;
  });
  return kept_ids;
}

}  // namespace
}  // namespace moe

STABLE_TORCH_LIBRARY_IMPL(moe_kernels, CPU, m) { m.impl("limit_capacity", TORCH_BOX(&moe::limit_capacity_cpu)); }
