"""Routing to groups and then inside them: :func:`route_two_level`."""

import torch
from torch import Tensor

from moe_kernels._checks import shape_error, value_error
from moe_kernels._dispatch import Backend
from moe_kernels.ops.route.api import check_logits, route


def route_two_level(
    group_logits: Tensor,
    expert_logits: Tensor,
    top_groups: int,
    top_k: int,
    *,
    renormalize_groups: bool = True,
    renormalize_experts: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Chooses groups of experts by one router and, inside each chosen group, experts by another.

    With the experts in equal, contiguous groups::

        g, u = route(group_logits, top_groups, renormalize=renormalize_groups)
        e, v = route(expert_logits of group g, top_k, renormalize=renormalize_experts)        for each chosen group
        weight of expert e of group g = u * v

    The scores of a group's experts are a softmax over that group alone. With ``top_groups=1`` and ``top_k`` the group's
    size this is DMoERM's routing: a task is chosen, its experts are mixed.

    Args:
        group_logits: [num_tokens, num_groups], float32, bfloat16, float16 or float64. For known tasks: 0 at the task's
            group and -inf elsewhere.
        expert_logits: [num_tokens, num_experts], likewise; num_groups divides num_experts.
        top_groups: groups for each token, 0 to num_groups.
        top_k: experts in each chosen group, 0 to the group's size.
        renormalize_groups, renormalize_experts: whether the weights of a level sum to 1.
        backend: see :mod:`moe_kernels`.

    Returns:
        topk_ids [num_tokens, top_groups * top_k] int32 and topk_weights of that shape, differentiable in both logits.

    Source: DMoERM, arXiv 2403.01197.
    """
    check_logits("route_two_level", group_logits)
    check_logits("route_two_level", expert_logits)
    num_tokens, num_groups = group_logits.shape
    num_experts = expert_logits.shape[1]
    if expert_logits.shape[0] != num_tokens:
        raise shape_error("route_two_level", "expert_logits", f"[num_tokens={num_tokens}, num_experts]", expert_logits)
    if num_groups < 1 or num_experts % num_groups:
        raise value_error("route_two_level", "num_groups", f"a divisor of num_experts={num_experts}", num_groups)
    group_size = num_experts // num_groups
    if not 0 <= top_groups <= num_groups:
        raise value_error("route_two_level", "top_groups", f"in [0, num_groups={num_groups}]", top_groups)
    if not 0 <= top_k <= group_size:
        raise value_error("route_two_level", "top_k", f"in [0, group size={group_size}]", top_k)

    groups, group_weights = route(group_logits, top_groups, renormalize=renormalize_groups, backend=backend)
    columns = groups.clamp(min=0).long()[..., None] * group_size + torch.arange(group_size, device=groups.device)
    inner_logits = expert_logits.gather(1, columns.flatten(1)).view(num_tokens * top_groups, group_size)
    inner, inner_weights = route(inner_logits, top_k, renormalize=renormalize_experts, backend=backend)

    groups, group_weights = groups[..., None], group_weights[..., None]
    inner = inner.view(num_tokens, top_groups, top_k)
    skipped = (groups < 0) | (inner < 0)
    topk_ids = (groups * group_size + inner).masked_fill(skipped, -1)
    topk_weights = (group_weights * inner_weights.view(num_tokens, top_groups, top_k)).masked_fill(skipped, 0)
    return topk_ids.flatten(1), topk_weights.flatten(1)
