// Host side of rows_gemm_sm90.cuh.
#pragma once

#include <optional>

#include "common/activation.h"
#include "common/cuda_launch.cuh"

namespace moe::sm90 {

// out[r] = weights[e] @ x[r] + bias[e] for the rows r of each expert e, or an activation of that: a gated one takes gate and
// up from the two halves of the weights' rows, or from every other row where they are interleaved. Rows of nobody are not
// written.
//   x [num_rows, depth]; weights [num_experts, rows, depth]; bias null or [num_experts, rows]; expert_offsets
//   [num_experts + 1] int32; activation null or one; out [num_rows, num_columns] contiguous
void multiply_rows(const char* op, const DeviceScope& scope, const Tensor& x, const Tensor& weights,
                   const std::optional<Tensor>& bias, const Tensor& expert_offsets, const Activation* activation,
                   bool interleaved, Tensor& out);

}  // namespace moe::sm90
