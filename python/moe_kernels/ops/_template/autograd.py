"""Gradient of the template op."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.ops._template import native


class ScaleRows(torch.autograd.Function):
    """``grad_rows = weights * grad_out``. Saves the weights alone."""

    @staticmethod
    def forward(ctx, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return native.scale_rows(rows, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        (weights,) = ctx.saved_tensors
        return native.scale_rows(grad_out, weights), None
