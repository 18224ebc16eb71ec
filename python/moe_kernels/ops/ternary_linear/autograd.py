"""Gradients of a linear layer with task vectors, which are constants themselves."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.ops.ternary_linear import native


class TernaryLinear(torch.autograd.Function):
    """``grad_x = grad_out (W + sum_k a_k T_k)``, ``grad_a[t, k] = scale_k <grad_out[t], T_k x[t]>``,
    ``grad_weight = grad_out^T x``, ``grad_bias`` the sum of ``grad_out``.

    Saves x only where the gradient of the weight or of the deltas' weights is needed.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        delta_weights: Tensor | None,
        bias: Tensor | None,
        delta_ids: Tensor | None,
        values: list[float],
        *planes: Tensor,
    ) -> Tensor:
        keeps_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.values = values
        ctx.save_for_backward(x if keeps_x else None, weight, delta_weights, delta_ids, *planes)
        return native.ternary_linear(x, weight, list(planes), values, delta_ids, delta_weights, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        x, weight, delta_weights, delta_ids, *planes = ctx.saved_tensors
        need_x, need_weight, need_weights, need_bias = ctx.needs_input_grad[:4]
        grad_x = grad_weight = grad_weights = grad_bias = None
        if need_x:
            grad_x = native.ternary_linear_input_grad(grad_out, weight, planes, ctx.values, delta_ids, delta_weights)
        if need_weight:
            grad_weight = grad_out.T @ x
        if need_weights:
            grad_weights = native.ternary_linear_weights_grad(grad_out, x, planes, ctx.values, delta_ids)
            grad_weights = grad_weights.to(delta_weights.dtype)
        if need_bias:
            grad_bias = grad_out.sum(0)
        return grad_x, grad_weight, grad_weights, grad_bias, None, None, *[None] * len(planes)
