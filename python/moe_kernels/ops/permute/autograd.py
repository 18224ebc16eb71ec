"""Gradients of permute and unpermute: each is the other's transpose."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.ops.permute import native


class Permute(torch.autograd.Function):
    """Saves only the plan."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, source_rows: Tensor, permuted_rows: Tensor) -> Tensor:
        ctx.save_for_backward(permuted_rows)
        return native.permute(hidden_states, source_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows: Tensor):
        (permuted_rows,) = ctx.saved_tensors
        return native.unpermute(grad_rows, permuted_rows, None), None, None


class Unpermute(torch.autograd.Function):
    """Saves the plan and, when there are weights, the rows (for the weights' gradient)."""

    @staticmethod
    def forward(ctx, rows: Tensor, topk_weights: Tensor | None, source_rows: Tensor, permuted_rows: Tensor) -> Tensor:
        if topk_weights is None:
            ctx.save_for_backward(source_rows)
        else:
            ctx.save_for_backward(rows, topk_weights, source_rows, permuted_rows)
        return native.unpermute(rows, permuted_rows, topk_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        saved = ctx.saved_tensors  # read once: under checkpointing each read recomputes
        if len(saved) == 1:
            return native.permute(grad_out, saved[0]), None, None, None
        grad_rows, grad_weights = native.unpermute_backward(grad_out, *saved)
        return grad_rows, grad_weights, None, None
