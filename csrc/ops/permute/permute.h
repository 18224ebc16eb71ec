// The pair list: token-expert pairs in expert order (python/moe_kernels/ops/permute/plan.py).
#pragma once

#include <cstdint>

namespace moe {

// Stable counting sort of num_tokens * top_k pairs. An id outside [0, num_experts) skips its pair.
//   expert_offsets [num_experts + 1]; source_pairs [num_tokens * top_k]: permuted row -> pair, filled up to
//   expert_offsets[num_experts]; permuted_rows [num_tokens * top_k] (may be null): pair -> permuted row or -1.
// Ids are read with strides (topk_ids may be any view).
template <class Id>
void sort_pairs(const Id* topk_ids, int64_t token_stride, int64_t slot_stride, int64_t num_tokens, int64_t top_k,
                int64_t num_experts, int32_t* expert_offsets, int32_t* source_pairs, int32_t* permuted_rows) {
  const auto expert_of = [&](int64_t token, int64_t slot) {
    const Id id = topk_ids[token * token_stride + slot * slot_stride];
    return id >= 0 && id < num_experts ? static_cast<int64_t>(id) : int64_t{-1};
  };
  for (int64_t e = 0; e <= num_experts; ++e) expert_offsets[e] = 0;
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t e = expert_of(t, k);
      if (e >= 0) ++expert_offsets[e + 1];
    }
  for (int64_t e = 0; e < num_experts; ++e) expert_offsets[e + 1] += expert_offsets[e];
  // expert_offsets[e] walks from the start of expert e to its end, which is the start of e + 1: shifting back restores it
  for (int64_t t = 0, pair = 0; t < num_tokens; ++t)
    for (int64_t k = 0; k < top_k; ++k, ++pair) {
      const int64_t e = expert_of(t, k);
      const int32_t row = e >= 0 ? expert_offsets[e]++ : -1;
      if (row >= 0) source_pairs[row] = static_cast<int32_t>(pair);
      if (permuted_rows != nullptr) permuted_rows[pair] = row;
    }
  for (int64_t e = num_experts; e > 0; --e) expert_offsets[e] = expert_offsets[e - 1];
  if (num_experts > 0) expert_offsets[0] = 0;
}

}  // namespace moe
