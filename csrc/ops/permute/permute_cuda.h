// The permutation's ops on CUDA, for the rooms that are made of them.
#pragma once

#include <optional>
#include <tuple>

#include "common/cuda_launch.cuh"

namespace moe {

std::tuple<Tensor, Tensor, Tensor> plan_dispatch_cuda(const Tensor& topk_ids, int64_t num_experts);
Tensor permute_cuda(const Tensor& hidden_states, const Tensor& source_rows);
Tensor unpermute_cuda(const Tensor& rows, const Tensor& permuted_rows, const std::optional<Tensor>& topk_weights);

}  // namespace moe
