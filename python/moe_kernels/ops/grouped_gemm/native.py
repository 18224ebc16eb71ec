"""Schemas, fakes and handles of the compiled grouped GEMM ops (csrc/ops/grouped_gemm)."""

import torch
from torch import Tensor

torch.library.define(
    "moe_kernels::grouped_gemm",
    "(Tensor rows, Tensor expert_weights, Tensor expert_offsets, Tensor? bias, SymInt out_features) -> Tensor",
)
torch.library.define(
    "moe_kernels::grouped_gemm_weight_grad",
    "(Tensor grad_out, Tensor rows, Tensor expert_offsets, bool transposed) -> Tensor",
)
torch.library.define("moe_kernels::grouped_gemm_bias_grad", "(Tensor grad_out, Tensor expert_offsets) -> Tensor")
torch.library.define("moe_kernels::prepack", "(Tensor expert_weights, int num_splits, bool interleaved) -> Tensor")

grouped_gemm = torch.ops.moe_kernels.grouped_gemm.default
grouped_gemm_weight_grad = torch.ops.moe_kernels.grouped_gemm_weight_grad.default
grouped_gemm_bias_grad = torch.ops.moe_kernels.grouped_gemm_bias_grad.default
prepack = torch.ops.moe_kernels.prepack.default


def is_transposed(expert_weights: Tensor) -> bool:
    """Whether [num_experts, out, in] weights lie in memory as [num_experts, in, out]; their gradient then does too."""
    return expert_weights.stride(1) == 1 and expert_weights.stride(2) != 1


def new_weight_grad(like: Tensor, num_experts: int, out_features: int, in_features: int, transposed: bool) -> Tensor:
    """For fakes: an expert-weight gradient in the memory order that the kernels give it."""
    if transposed:
        return like.new_empty(num_experts, in_features, out_features).transpose(1, 2)
    return like.new_empty(num_experts, out_features, in_features)


@torch.library.register_fake("moe_kernels::grouped_gemm")
def _(rows: Tensor, expert_weights: Tensor, expert_offsets: Tensor, bias: Tensor | None, out_features: int):
    return rows.new_empty(rows.shape[0], out_features)


@torch.library.register_fake("moe_kernels::grouped_gemm_weight_grad")
def _(grad_out: Tensor, rows: Tensor, expert_offsets: Tensor, transposed: bool):
    return new_weight_grad(rows, expert_offsets.shape[0] - 1, grad_out.shape[1], rows.shape[1], transposed)


@torch.library.register_fake("moe_kernels::grouped_gemm_bias_grad")
def _(grad_out: Tensor, expert_offsets: Tensor):
    return grad_out.new_empty(expert_offsets.shape[0] - 1, grad_out.shape[1])
