"""Gradients of the grouped GEMM."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.ops.grouped_gemm import native


def kernels(backend: str):
    """The module whose functions run: native, or their Triton twins, which are imported when first asked for."""
    if backend == "native":
        return native
    from moe_kernels.ops.grouped_gemm import triton

    return triton


class GroupedGemm(torch.autograd.Function):
    """By expert, ``grad_rows = grad_out @ W[e]``, ``grad_W[e] = grad_out.T @ rows``, ``grad_bias[e] = sum grad_out``.

    Saves the rows only where the weights' gradient is needed, the weights only where the rows' is. ``quantized`` holds
    the weights whose bytes ``expert_weights`` are, where they are quantised: frozen, and dequantised for backward in
    the dtype of the rows.
    """

    @staticmethod
    def forward(
        ctx, rows: Tensor, expert_weights: Tensor, expert_offsets: Tensor, bias: Tensor | None, quantized, backend: str
    ) -> Tensor:
        ctx.save_for_backward(
            rows if ctx.needs_input_grad[1] else None,
            expert_weights if ctx.needs_input_grad[0] else None,
            expert_offsets,
        )
        ctx.transposed = quantized is None and native.is_transposed(expert_weights)
        ctx.quantized, ctx.backend = quantized, backend
        out_features = (expert_weights if quantized is None else quantized).shape[1]
        return kernels(backend).grouped_gemm(rows, expert_weights, expert_offsets, bias, out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        rows, expert_weights, expert_offsets = ctx.saved_tensors
        grad_rows = grad_weights = grad_bias = None
        op = kernels(ctx.backend)
        if expert_weights is not None:
            if ctx.quantized is not None:
                expert_weights = ctx.quantized.dequantize(grad_out.dtype)
            in_features = expert_weights.shape[2]
            grad_rows = op.grouped_gemm(grad_out, expert_weights.transpose(1, 2), expert_offsets, None, in_features)
        if rows is not None:
            grad_weights = op.grouped_gemm_weight_grad(grad_out, rows, expert_offsets, ctx.transposed)
        if ctx.needs_input_grad[3]:
            grad_bias = op.grouped_gemm_bias_grad(grad_out, expert_offsets)
        return grad_rows, grad_weights, None, grad_bias, None, None
