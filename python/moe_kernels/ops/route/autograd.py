"""Gradient of the routing weights in the logits."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.ops.route import native


class Route(torch.autograd.Function):
    """Saves the logits and the chosen ids; the scores are recomputed.

    With w the unscaled weights, g their gradient times scaling_factor and s the scores::

        renormalised:   ds_k = (g_k - sum_j g_j w_j) / (sum_j s_j + 1e-20)      otherwise ds_k = g_k
        softmax:        dlogits = s * (ds - sum_j ds_j s_j)
        sigmoid:        dlogits = ds * s * (1 - s)
    """

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
    ) -> tuple[Tensor, Tensor]:
        topk_ids, topk_weights = native.route(
            logits, expert_bias, top_k, score, renormalize, scaling_factor, num_groups, topk_groups, group_score
        )
        ctx.save_for_backward(logits, topk_ids)
        ctx.arguments = (score, renormalize, scaling_factor)
        ctx.mark_non_differentiable(topk_ids)
        return topk_ids, topk_weights

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad_weights: Tensor):
        logits, topk_ids = ctx.saved_tensors
        return native.route_backward(grad_weights, logits, topk_ids, *ctx.arguments), *(None,) * 8
