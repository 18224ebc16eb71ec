"""Experts that take only so many tokens: :func:`limit_capacity` and :func:`expert_capacity`."""

import math

import torch
from torch import Tensor

from moe_kernels._checks import FLOAT_DTYPES, check_same_device, check_tensor, dtype_error, shape_error, value_error
from moe_kernels._dispatch import Backend, resolve
from moe_kernels.ops.route import native, reference
from moe_kernels.ops.route.api import check_ids

DROP_POLICIES = ("position", "probs")


def limit_capacity(
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    capacity: int,
    *,
    drop_policy: str = "position",
    first_choices_first: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Drops the token-expert pairs that exceed an expert's capacity.

    Each expert keeps its first ``capacity`` pairs in this order:

    * ``drop_policy="position"``: tokens in their order (Switch, Megatron, DeepSpeed's top-k); with
      ``first_choices_first`` every token's first column before any token's second (GShard).
    * ``drop_policy="probs"``: falling weight, the lowest token first among equals, NaN last.

    A dropped pair has id -1 and weight 0, and every kernel skips it. The weights of the others stay as they are; to
    renormalise over what was kept, as DeepSpeed's top-2 does, weigh again: :func:`route_weights`.

    Args:
        topk_ids: [num_tokens, top_k], int32 or int64; ids outside [0, num_experts) stay and take no place.
        topk_weights: [num_tokens, top_k], any float dtype.
        num_experts: number of experts.
        capacity: pairs for each expert, at least 0 (0 drops them all); see :func:`expert_capacity`.
        drop_policy: "position" or "probs".
        first_choices_first: the order of "position".
        backend: see :mod:`moe_kernels`.

    Returns:
        topk_ids int32 and topk_weights of the same shape, differentiable in ``topk_weights`` where they were kept.

    Sources: GShard, arXiv 2006.16668; Switch Transformer, arXiv 2101.03961; the drop policies carry Megatron's names.
    """
    check_ids("limit_capacity", topk_ids)
    check_tensor("limit_capacity", "topk_weights", topk_weights)
    if topk_weights.shape != topk_ids.shape:
        raise shape_error("limit_capacity", "topk_weights", f"{list(topk_ids.shape)} like topk_ids", topk_weights)
    if topk_weights.dtype not in FLOAT_DTYPES:
        raise dtype_error("limit_capacity", "topk_weights", FLOAT_DTYPES, topk_weights)
    check_same_device("limit_capacity", topk_ids=topk_ids, topk_weights=topk_weights)
    if not 0 <= num_experts < 2**31:
        raise value_error("limit_capacity", "num_experts", "in [0, 2**31)", num_experts)
    if capacity < 0:
        raise value_error("limit_capacity", "capacity", "at least 0", capacity)
    if drop_policy not in DROP_POLICIES:
        raise value_error("limit_capacity", "drop_policy", f"one of {', '.join(DROP_POLICIES)}", repr(drop_policy))
    if first_choices_first and drop_policy != "position":
        raise value_error("limit_capacity", "first_choices_first", "False where drop_policy is 'probs'", True)
    topk_ids = topk_ids.clamp(-1, 2**31 - 1).to(torch.int32)
    chosen = reference if resolve("limit_capacity", backend, topk_ids.device.type) == "reference" else native
    kept = chosen.limit_capacity(
        topk_ids, topk_weights.detach(), num_experts, capacity, drop_policy == "probs", first_choices_first
    )
    return kept, topk_weights.masked_fill(kept != topk_ids, 0)


def expert_capacity(
    num_tokens: int, num_experts: int, capacity_factor: float, *, top_k: int = 1, min_capacity: int = 0
) -> int:
    """``max(ceil(num_tokens * top_k / num_experts * capacity_factor), min_capacity)``.

    In that order of operations, DeepSpeed's and Megatron's: a factor of 1.1 must not round up where theirs does not.

    GShard and DeepSpeed leave ``top_k`` at 1 and have larger factors; Megatron multiplies by it; for
    :func:`route_expert_choice` the factor is the mean number of experts of a token.
    """
    if num_experts < 1:
        raise value_error("expert_capacity", "num_experts", "at least 1", num_experts)
    if not capacity_factor >= 0:
        raise value_error("expert_capacity", "capacity_factor", "at least 0", capacity_factor)
    return max(math.ceil(num_tokens * top_k / num_experts * capacity_factor), min_capacity)
