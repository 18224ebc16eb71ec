// The expert FFN on compute capability 9.0a, forward: plan, rows in expert order, gate and up with the activation, down,
// and each token's sum in the order of k.
#include "ops/grouped_gemm/rows_gemm_sm90.h"
#include "ops/permute/permute_cuda.h"

namespace moe {
namespace {

std::tuple<Tensor, Tensor> expert_ffn_cuda(const Tensor& hidden_states_in, const Tensor& topk_ids, const Tensor& topk_weights,
                                           const Tensor& gate_up_proj, const Tensor& down_proj,
                                           const std::optional<Tensor>& gate_up_bias, const std::optional<Tensor>& down_bias,
                                           int64_t kind, bool gated, double alpha, double limit, bool clamp_output,
                                           double up_offset, bool interleaved, int64_t gate_up_size,
                                           bool save_pre_activation) {
  constexpr const char* kOp = "expert_ffn";
  const Tensor hidden_states = with_contiguous_rows(hidden_states_in);
  const ScalarType dtype = hidden_states.scalar_type();
  MOE_CHECK(!save_pre_activation, kOp, ": the CUDA kernels save nothing for backward yet");
  MOE_CHECK((dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) && gate_up_proj.scalar_type() == dtype &&
                down_proj.scalar_type() == dtype && (!gate_up_bias || gate_up_bias->scalar_type() == dtype) &&
                (!down_bias || down_bias->scalar_type() == dtype),
            kOp, ": tensors must all be bfloat16 or all float16");
  MOE_CHECK(gate_up_proj.dim() == 3 && down_proj.dim() == 3 && gate_up_proj.size(0) == down_proj.size(0) &&
                gate_up_proj.size(1) == gate_up_size && gate_up_size == (gated ? 2 : 1) * down_proj.size(2) &&
                down_proj.size(1) == hidden_states.size(1) && kind >= 0 && kind <= 4 && (gated || !interleaved) &&
                topk_ids.dim() == 2 && topk_ids.size(0) == hidden_states.size(0),
            kOp, ": shapes do not fit");
  const DeviceScope scope(hidden_states);
  const auto [expert_offsets, source_rows, permuted_rows] = plan_dispatch_cuda(topk_ids, gate_up_proj.size(0));
  const int64_t num_rows = source_rows.size(0);
  const Activation activation{static_cast<ActivationKind>(kind), gated, alpha, limit, clamp_output, up_offset};
  // one tensor holds what has a row of hidden_size for each pair: first the input, then the output
  Tensor rows = permute_cuda(hidden_states, source_rows);
  Tensor act = torch::stable::new_empty(hidden_states, {num_rows, down_proj.size(2)});
  sm90::multiply_rows(kOp, scope, rows, gate_up_proj, gate_up_bias, expert_offsets, &activation, interleaved, act);
  sm90::multiply_rows(kOp, scope, act, down_proj, down_bias, expert_offsets, nullptr, false, rows);
  return {unpermute_cuda(rows, permuted_rows, topk_weights), torch::stable::new_empty(hidden_states, {0})};
}

}  // namespace
}  // namespace moe

MOE_CUDA_LIBRARY(m) { m.impl("expert_ffn", TORCH_BOX(&moe::expert_ffn_cuda)); }
