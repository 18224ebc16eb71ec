"""Gradients of the two halves of a LoRA product: each is made of the other."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.ops.routed_lora import native


def _factor_grad(v: Tensor, x: Tensor, like: Tensor, rank_starts: Tensor | None, ranks, adapter_ids: Tensor) -> Tensor:
    if like.dim() == 3:
        return native.lora_factor_grad(v, x, None, ranks, adapter_ids, like.shape[0], None)
    return native.lora_factor_grad(v, x, rank_starts, ranks, adapter_ids, rank_starts.shape[0], like.shape[0])


class LoraShrink(torch.autograd.Function):
    """``grad_x = sum_k sum_j grad_v[k, j] * row_j``, ``grad_row_j = sum grad_v[j] * x``.

    Saves the input only where the factor's gradient is needed.
    """

    @staticmethod
    def forward(ctx, x: Tensor, factor: Tensor, rank_starts, ranks, adapter_ids: Tensor, max_rank: int) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, factor, rank_starts, ranks, adapter_ids)
        return native.lora_shrink(x, factor, rank_starts, ranks, adapter_ids, max_rank)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_v: Tensor):
        x, factor, rank_starts, ranks, adapter_ids = ctx.saved_tensors
        grad_x = grad_factor = None
        if ctx.needs_input_grad[0]:
            grad_x = native.lora_expand(grad_v, factor, rank_starts, ranks, adapter_ids, None, None, None)
        if ctx.needs_input_grad[1]:
            grad_factor = _factor_grad(grad_v, x, factor, rank_starts, ranks, adapter_ids)
        return grad_x, grad_factor, None, None, None, None


class LoraExpand(torch.autograd.Function):
    """With ``c = adapter_weights * scaling`` and ``g[k, j] = <grad_out, row_j>``, all of the rank's length:

    ``grad_v = c * g``, ``grad_row_j = sum c * v[j] * grad_out``, ``grad_adapter_weights[k] = scaling * <g[k], v[k]>``,
    ``grad_scaling[e] = sum adapter_weights * <g, v>`` over the pairs of e. No row of the output's width is made a pair.
    """

    @staticmethod
    def forward(
        ctx,
        v: Tensor,
        factor: Tensor,
        rank_starts: Tensor | None,
        ranks: Tensor | None,
        adapter_ids: Tensor,
        adapter_weights: Tensor | None,
        scaling: Tensor | None,
        base: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(v, factor, rank_starts, ranks, adapter_ids, adapter_weights, scaling)
        return native.lora_expand(v, factor, rank_starts, ranks, adapter_ids, adapter_weights, scaling, base)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        v, factor, rank_starts, ranks, adapter_ids, adapter_weights, scaling = ctx.saved_tensors
        need_v, need_factor, _, _, _, need_weights, need_scaling, need_base = ctx.needs_input_grad
        ids = adapter_ids.clamp_min(0).long()
        pair_scaling = None if scaling is None else scaling.to(v.dtype)[ids]
        coefficient = pair_scaling
        if adapter_weights is not None:
            coefficient = adapter_weights.to(v.dtype) * (1 if pair_scaling is None else pair_scaling)
        grad_v = grad_factor = grad_weights = grad_scaling = None
        if need_v or need_weights or need_scaling:
            products = native.lora_shrink(grad_out, factor, rank_starts, ranks, adapter_ids, v.shape[2])
            inner = (products * v).sum(-1)
            if need_weights:
                grad_weights = (inner if pair_scaling is None else inner * pair_scaling).to(adapter_weights.dtype)
            if need_scaling:
                of_pairs = inner if adapter_weights is None else inner * adapter_weights.to(v.dtype)
                # by a product, since index_add adds in no fixed order on a GPU
                chosen = torch.nn.functional.one_hot(ids.flatten(), scaling.shape[0]).to(v.dtype)
                grad_scaling = (of_pairs.flatten() @ chosen).to(scaling.dtype)
            if need_v:
                grad_v = products if coefficient is None else products * coefficient[..., None]
        if need_factor:
            weighted = v if coefficient is None else v * coefficient[..., None]
            grad_factor = _factor_grad(weighted, grad_out, factor, rank_starts, ranks, adapter_ids)
        return grad_v, grad_factor, None, None, None, grad_weights, grad_scaling, grad_out if need_base else None
