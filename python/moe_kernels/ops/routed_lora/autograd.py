"""Gradients of a LoRA product: of its two halves, each made of the other, and of both in one op."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.ops.routed_lora import native


def kernels(backend: str):
    """The module whose functions run: native, or their Triton twins, which are imported when first asked for."""
    if backend == "native":
        return native
    from moe_kernels.ops.routed_lora import triton

    return triton


def dropped(backend: str, x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """x, or what dropout leaves of it, not rescaled. Made again wherever it is needed."""
    return x if seed is None else kernels(backend).lora_dropout(x, dropout, seed)


def _factor_grad(
    backend: str, v: Tensor, x: Tensor, like: Tensor, rank_starts: Tensor | None, ranks, adapter_ids: Tensor
) -> Tensor:
    if like.dim() == 3:
        return kernels(backend).lora_factor_grad(v, x, None, ranks, adapter_ids, like.shape[0], None)
    num_adapters = rank_starts.shape[0]
    return kernels(backend).lora_factor_grad(v, x, rank_starts, ranks, adapter_ids, num_adapters, like.shape[0])


class _Pairs:
    """What each pair is multiplied by, and the gradients of weights and scaling from ``inner`` [num_tokens, top_k]."""

    def __init__(self, like: Tensor, adapter_ids: Tensor, adapter_weights: Tensor | None, scaling: Tensor | None):
        # a GPU refuses no id: one outside is multiplied with products that are zero
        last = None if scaling is None else max(scaling.shape[0] - 1, 0)
        self.ids, self.scaling = adapter_ids.clamp(0, last).long(), scaling
        self.weights = adapter_weights
        self.of_weights = None if adapter_weights is None else adapter_weights.to(like.dtype)
        self.of_scaling = None if scaling is None else scaling.to(like.dtype)[self.ids]

    def times(self, v: Tensor) -> Tensor:
        for factor in (self.of_weights, self.of_scaling):
            v = v if factor is None else v * factor[..., None]
        return v

    def grad_weights(self, inner: Tensor) -> Tensor:
        return (inner if self.of_scaling is None else inner * self.of_scaling).to(self.weights.dtype)

    def grad_scaling(self, inner: Tensor) -> Tensor:
        of_pairs = inner if self.of_weights is None else inner * self.of_weights
        # by a product, since index_add adds in no fixed order on a GPU
        chosen = torch.nn.functional.one_hot(self.ids.flatten(), self.scaling.shape[0]).to(inner.dtype)
        return (of_pairs.flatten() @ chosen).to(self.scaling.dtype)


class LoraShrink(torch.autograd.Function):
    """``grad_x = sum_k sum_j grad_v[k, j] * row_j``, ``grad_row_j = sum grad_v[j] * x``.

    Saves the input only where the factor's gradient is needed, and of a dropout its rate and seed.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        factor: Tensor,
        rank_starts: Tensor | None,
        ranks: Tensor | None,
        adapter_ids: Tensor,
        max_rank: int,
        dropout: float,
        seed: Tensor | None,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, factor, rank_starts, ranks, adapter_ids, seed)
        ctx.dropout, ctx.backend = dropout, backend
        x = dropped(backend, x, dropout, seed)
        return kernels(backend).lora_shrink(x, factor, rank_starts, ranks, adapter_ids, max_rank)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_v: Tensor):
        x, factor, rank_starts, ranks, adapter_ids, seed = ctx.saved_tensors
        grad_x = grad_factor = None
        if ctx.needs_input_grad[0]:
            expand = kernels(ctx.backend).lora_expand
            grad_x = expand(grad_v, factor, rank_starts, ranks, adapter_ids, None, None, None)
            grad_x = dropped(ctx.backend, grad_x, ctx.dropout, seed)
        if ctx.needs_input_grad[1]:
            x = dropped(ctx.backend, x, ctx.dropout, seed)
            grad_factor = _factor_grad(ctx.backend, grad_v, x, factor, rank_starts, ranks, adapter_ids)
        return grad_x, grad_factor, None, None, None, None, None, None, None


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
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(v, factor, rank_starts, ranks, adapter_ids, adapter_weights, scaling)
        ctx.backend = backend
        return kernels(backend).lora_expand(v, factor, rank_starts, ranks, adapter_ids, adapter_weights, scaling, base)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        v, factor, rank_starts, ranks, adapter_ids, adapter_weights, scaling = ctx.saved_tensors
        need_v, need_factor, _, _, _, need_weights, need_scaling, need_base, _ = ctx.needs_input_grad
        pairs = _Pairs(v, adapter_ids, adapter_weights, scaling)
        grad_v = grad_factor = grad_weights = grad_scaling = None
        if need_v or need_weights or need_scaling:
            shrink = kernels(ctx.backend).lora_shrink
            products = shrink(grad_out, factor, rank_starts, ranks, adapter_ids, v.shape[2])
            inner = (products * v).sum(-1)
            grad_weights = pairs.grad_weights(inner) if need_weights else None
            grad_scaling = pairs.grad_scaling(inner) if need_scaling else None
            grad_v = pairs.times(products) if need_v else None
        if need_factor:
            grad_factor = _factor_grad(ctx.backend, pairs.times(v), grad_out, factor, rank_starts, ranks, adapter_ids)
        grad_base = grad_out if need_base else None
        return grad_v, grad_factor, None, None, None, grad_weights, grad_scaling, grad_base, None


class RoutedLora(torch.autograd.Function):
    """Both halves in one op, and in another call the same product with the factors exchanged:

    ``grad_x[t] = sum_k c * A_e^T u[t, k]`` with ``u[t, k] = B_e^T grad_out[t]``; then ``grad_A_j = sum c * u[j] * x``,
    ``grad_B_j = sum c * v[j] * grad_out``, and the weights' and scaling's gradients from ``<u, v>``.

    Saves the input where A's gradient is needed, and v [num_tokens, top_k, max_rank] where B's, the weights' or the
    scaling's is.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        rank_starts: Tensor | None,
        ranks: Tensor | None,
        adapter_ids: Tensor,
        adapter_weights: Tensor | None,
        scaling: Tensor | None,
        base: Tensor | None,
        max_rank: int,
        dropout: float,
        seed: Tensor | None,
        backend: str,
    ) -> Tensor:
        _, need_a, need_b, _, _, _, need_weights, need_scaling, *_ = ctx.needs_input_grad
        save = need_b or need_weights or need_scaling
        routing = (rank_starts, ranks, adapter_ids, adapter_weights, scaling)
        kept = dropped(backend, x, dropout, seed)
        out, v = kernels(backend).routed_lora(kept, lora_a, lora_b, *routing, base, max_rank, save)
        ctx.save_for_backward(x if need_a else None, lora_a, lora_b, *routing, v if save else None, seed)
        ctx.max_rank, ctx.dropout, ctx.backend = max_rank, dropout, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        x, lora_a, lora_b, rank_starts, ranks, adapter_ids, adapter_weights, scaling, v, seed = ctx.saved_tensors
        need_x, need_a, need_b, _, _, _, need_weights, need_scaling, need_base, *_ = ctx.needs_input_grad
        table = (rank_starts, ranks, adapter_ids)
        run, of_factor = kernels(ctx.backend), (grad_out, lora_b, *table)
        grad_x = grad_a = grad_b = grad_weights = grad_scaling = u = None
        need_u = need_a or need_weights or need_scaling
        if need_x:
            grad_x, u = run.routed_lora(
                grad_out, lora_b, lora_a, *table, adapter_weights, scaling, None, ctx.max_rank, need_u
            )
            grad_x = dropped(ctx.backend, grad_x, ctx.dropout, seed)
        elif need_u:
            u = run.lora_shrink(*of_factor, ctx.max_rank)
        like = u if v is None else v
        pairs = None if like is None else _Pairs(like, adapter_ids, adapter_weights, scaling)
        if need_weights or need_scaling:
            inner = (u * v).sum(-1)
            grad_weights = pairs.grad_weights(inner) if need_weights else None
            grad_scaling = pairs.grad_scaling(inner) if need_scaling else None
        if need_a:
            x = dropped(ctx.backend, x, ctx.dropout, seed)
            grad_a = _factor_grad(ctx.backend, pairs.times(u), x, lora_a, *table)
        if need_b:
            grad_b = _factor_grad(ctx.backend, pairs.times(v), grad_out, lora_b, *table)
        grad_base = grad_out if need_base else None
        return grad_x, grad_a, grad_b, None, None, None, grad_weights, grad_scaling, grad_base, None, None, None, None
