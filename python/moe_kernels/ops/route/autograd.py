"""Gradient of the routing weights in the logits: one, whatever chose the experts."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.ops.route import native


def kernels(backend: str):
    """The module whose functions run: native, or their Triton twins, which are imported when first asked for."""
    if backend == "native":
        return native
    from moe_kernels.ops.route import triton

    return triton


class Routing(torch.autograd.Function):
    """Saves the logits and the chosen ids; the scores are recomputed.

    With w the unscaled weights, g their gradient times scaling_factor and s the scores, over the picks that weigh::

        renormalised:   ds_k = (g_k - sum_j g_j w_j) / (sum_j s_j + 1e-20)      otherwise ds_k = g_k
        softmax:        dlogits = s * (ds - sum_j ds_j s_j)
        sigmoid:        dlogits = ds * s * (1 - s)
    """

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        logits, topk_ids = ctx.saved_tensors
        grad_logits = kernels(ctx.backend).route_backward(grads[-1], logits, topk_ids, *ctx.arguments)
        return grad_logits, *(None,) * (len(ctx.needs_input_grad) - 1)


def _save(
    ctx,
    backend: str,
    logits: Tensor,
    topk_ids: Tensor,
    score: int,
    renormalize: bool,
    scaling_factor: float,
    num_null_experts: int = 0,
):
    ctx.save_for_backward(logits, topk_ids)
    ctx.backend = backend
    ctx.arguments = (score, renormalize, scaling_factor, num_null_experts)


class Route(Routing):
    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        expert_bias: Tensor | None,
        top_k: int,
        score: int,
        renormalize: bool,
        scaling_factor: float,
        num_groups: int,
        topk_groups: int,
        group_score: int,
        num_null_experts: int,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        groups = (num_groups, topk_groups, group_score)
        topk_ids, topk_weights = kernels(backend).route(
            logits, expert_bias, top_k, score, renormalize, scaling_factor, *groups, num_null_experts
        )
        _save(ctx, backend, logits, topk_ids, score, renormalize, scaling_factor, num_null_experts)
        ctx.mark_non_differentiable(topk_ids)
        return topk_ids, topk_weights


class RouteWeights(Routing):
    @staticmethod
    def forward(
        ctx, logits: Tensor, topk_ids: Tensor, score: int, renormalize: bool, scaling_factor: float, backend: str
    ) -> Tensor:
        _save(ctx, backend, logits, topk_ids, score, renormalize, scaling_factor)
        return kernels(backend).route_weights(logits, topk_ids, score, renormalize, scaling_factor)


class RouteTopP(Routing):
    @staticmethod
    def forward(
        ctx, logits: Tensor, top_p: float, max_experts: int, renormalize: bool, scaling_factor: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        topk_ids, topk_weights = kernels(backend).route_top_p(logits, top_p, max_experts, renormalize, scaling_factor)
        _save(ctx, backend, logits, topk_ids, 0, renormalize, scaling_factor)
        ctx.mark_non_differentiable(topk_ids)
        return topk_ids, topk_weights


class RouteExpertChoice(Routing):
    @staticmethod
    def forward(ctx, logits: Tensor, capacity: int, scaling_factor: float, backend: str) -> tuple[Tensor, Tensor]:
        topk_ids, topk_weights = kernels(backend).route_expert_choice(logits, capacity, scaling_factor)
        _save(ctx, backend, logits, topk_ids, 0, False, scaling_factor)
        ctx.mark_non_differentiable(topk_ids)
        return topk_ids, topk_weights
