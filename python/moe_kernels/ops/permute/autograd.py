"""Gradients of permute and unpermute: each is the other's transpose."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.ops.permute import native


def kernels(backend: str):
    """The module whose functions run: native, or their Triton twins, which are imported when first asked for."""
    if backend == "native":
        return native
    from moe_kernels.ops.permute import triton

    return triton


class Permute(torch.autograd.Function):
    """Saves only the plan."""

    @staticmethod
    def forward(ctx, hidden_states: Tensor, source_rows: Tensor, permuted_rows: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(permuted_rows)
        ctx.backend = backend
        return kernels(backend).permute(hidden_states, source_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows: Tensor):
        (permuted_rows,) = ctx.saved_tensors
        return kernels(ctx.backend).unpermute(grad_rows, permuted_rows, None), None, None, None


class Unpermute(torch.autograd.Function):
    """Saves the plan and, when there are weights, the rows (for the weights' gradient)."""

    @staticmethod
    def forward(
        ctx, rows: Tensor, topk_weights: Tensor | None, source_rows: Tensor, permuted_rows: Tensor, backend: str
    ) -> Tensor:
        ctx.backend = backend
        if topk_weights is None:
            ctx.save_for_backward(source_rows)
        else:
            ctx.save_for_backward(rows, topk_weights, source_rows, permuted_rows)
        return kernels(backend).unpermute(rows, permuted_rows, topk_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        saved = ctx.saved_tensors  # read once: under checkpointing each read recomputes
        if len(saved) == 1:
            return kernels(ctx.backend).permute(grad_out, saved[0]), None, None, None, None
        grad_rows, grad_weights = kernels(ctx.backend).unpermute_backward(grad_out, *saved)
        return grad_rows, grad_weights, None, None, None
