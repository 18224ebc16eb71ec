"""Which rows go to which rank: :func:`plan_ranks`."""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels.ops.permute import DispatchPlan, plan_dispatch


class RankPlan(NamedTuple):
    """A token's way to the ranks that own its experts.

    Attributes:
        tokens: plan of (token, rank) pairs, with ranks in the place of experts: a token's row is sent once to each rank
            that owns one of its experts, however many it owns.
        pairs: plan of the token-expert pairs by rank, each pair a row for each rank of its expert; within a rank by
            token, and of one token by expert.
        codes: [num_tokens * top_k] int32, what a rank is told of each pair: twice the expert's number among the rank's
            own, plus 1 in the first pair of a row.
        topk_weights: [num_tokens, top_k], in the order of the pairs' experts.
    """

    tokens: DispatchPlan
    pairs: DispatchPlan
    codes: Tensor
    topk_weights: Tensor


def plan_ranks(
    topk_ids: Tensor, topk_weights: Tensor, num_experts: int, world_size: int, tensor_ranks: int = 1
) -> RankPlan:
    """Plans the exchange; nothing waits for the device.

    Args:
        topk_ids: [num_tokens, top_k] integers; pairs outside [0, num_experts) travel nowhere.
        topk_weights: [num_tokens, top_k], differentiable.
        num_experts: of the whole layer, a multiple of the blocks.
        world_size: ranks; ``tensor_ranks`` neighbours own a block of experts together, and a token goes to all of them.
    """
    num_tokens, top_k = topk_ids.shape
    num_blocks = world_size // tensor_ranks
    experts_per_rank = max(num_experts // num_blocks, 1)
    outside = (topk_ids < 0) | (topk_ids >= num_experts)
    # in rising order of experts, so that the pairs of one rank stand together; skipped pairs last
    ids, order = topk_ids.long().masked_fill(outside, experts_per_rank * num_blocks).sort(dim=1, stable=True)
    owners = ids // experts_per_rank
    first = torch.ones_like(owners, dtype=torch.bool)
    first[:, 1:] = owners[:, 1:] != owners[:, :-1]
    # a token's distinct owners in its first columns, -1 behind; the last column is the skipped pairs' overflow
    columns = min(top_k, num_blocks)
    blocks = torch.full((num_tokens, columns + 1), -1, device=ids.device)
    blocks.scatter_(1, first.cumsum(1) - 1, owners.masked_fill(owners == num_blocks, -1))

    def ranks_of(blocks: Tensor) -> Tensor:  # [n, c] to [n, c * tensor_ranks], rising; outside stays outside
        each = torch.arange(tensor_ranks, device=blocks.device)
        return (blocks[..., None] * tensor_ranks + each).flatten(1)

    return RankPlan(
        tokens=plan_dispatch(ranks_of(blocks[:, :columns]), world_size),
        pairs=plan_dispatch(ranks_of(owners.view(-1, 1)), world_size),
        codes=(2 * (ids - owners * experts_per_rank) + first).int().flatten(),
        topk_weights=topk_weights.gather(1, order),
    )
