"""Which rows go to which rank, and how a rank learns what to do with those it gets."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_kernels.distributed.all_to_all import Exchange
from moe_kernels.distributed.sizes import Sizes, exchange_sizes
from moe_kernels.ops.permute import DispatchPlan, permute, plan_dispatch, unpermute


class RankPlan(NamedTuple):
    """A token's way to the ranks that own its experts.

    Attributes:
        tokens: plan of (token, rank) pairs, with ranks in the place of experts: a token's row is sent once to each rank
            that owns one of its experts, however many it owns.
        pairs: plan of the token-expert pairs by rank, each pair a row of its own; within a rank by token, and of one
            token by expert.
        codes: [num_tokens * top_k] int32, what a rank is told of each pair: twice the expert's number among the rank's
            own, plus 1 in the first pair of a row.
        topk_weights: [num_tokens, top_k], in the order of the pairs' experts.
    """

    tokens: DispatchPlan
    pairs: DispatchPlan
    codes: Tensor
    topk_weights: Tensor


def plan_ranks(topk_ids: Tensor, topk_weights: Tensor, num_experts: int, world_size: int) -> RankPlan:
    """Plans the exchange; nothing waits for the device.

    Args:
        topk_ids: [num_tokens, top_k] integers; pairs outside [0, num_experts) travel nowhere.
        topk_weights: [num_tokens, top_k], differentiable.
        num_experts: of the whole layer, a multiple of ``world_size``; rank r owns the r-th block of them.
    """
    num_tokens, top_k = topk_ids.shape
    experts_per_rank = max(num_experts // world_size, 1)
    outside = (topk_ids < 0) | (topk_ids >= num_experts)
    # in rising order of experts, so that the pairs of one rank stand together; skipped pairs last
    ids, order = topk_ids.long().masked_fill(outside, experts_per_rank * world_size).sort(dim=1, stable=True)
    owners = ids // experts_per_rank
    first = torch.ones_like(owners, dtype=torch.bool)
    first[:, 1:] = owners[:, 1:] != owners[:, :-1]
    # a token's distinct owners in its first columns, -1 behind; the last column is the skipped pairs' overflow
    columns = min(top_k, world_size)
    ranks = torch.full((num_tokens, columns + 1), -1, device=ids.device)
    ranks.scatter_(1, first.cumsum(1) - 1, owners.masked_fill(owners == world_size, -1))
    return RankPlan(
        tokens=plan_dispatch(ranks[:, :columns], world_size),
        pairs=plan_dispatch(owners.view(-1, 1), world_size),
        codes=(2 * (ids - owners * experts_per_rank) + first).int().flatten(),
        topk_weights=topk_weights.gather(1, order),
    )


def exchange(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    group: ProcessGroup,
    layer: str,
) -> Tensor:
    """Runs each token through its experts, wherever they are.

    ::

        rows      = hidden_states of every token, once for each rank that owns one of its experts  -> to that rank
        out[rank] = experts(rows, ids, weights) there, a weighted sum over the token's experts of that rank
        out       = sum of out[rank], in rising order of the ranks

    Sent by a layer, and no byte more: a row for each (token, rank) and an int32 and a weight for each (token, expert)
    there; back, a row for each (token, rank). Backward sends as many rows and weights the other way, no ints.

    Args:
        hidden_states: [num_tokens, hidden_size]; each rank has tokens of its own, any number, also none.
        topk_ids, topk_weights: [num_tokens, top_k].
        num_experts: of the whole layer.
        experts: from rows [num_rows, hidden_size], ids [num_rows, top_k] int32 of this rank's own experts (-1: none)
            and weights [num_rows, top_k] to [num_rows, hidden_size]; differentiable in rows and weights.
        group: the ranks among which the experts are split; all of them must call, forward and backward.
        layer: name for errors.

    Returns:
        [num_tokens, hidden_size], dtype of what ``experts`` returns.
    """
    plan = plan_ranks(topk_ids, topk_weights, num_experts, group.size())
    counts = (plan.tokens.expert_offsets.diff(), plan.pairs.expert_offsets.diff())
    sizes = exchange_sizes(*counts, hidden_states, topk_weights, num_experts, group, layer)
    token_plan = plan.tokens.cut(sum(sizes.rows_sent))
    there = Exchange(sizes.rows_sent, sizes.rows_received, group, layer)
    back = Exchange(sizes.rows_received, sizes.rows_sent, group, layer)

    ticket = there.start(permute(hidden_states, token_plan))
    ids, weights = _send_pairs(plan, sizes, group, layer)
    out = experts(there.wait(ticket), ids, weights)
    return unpermute(back.wait(back.start(out)), token_plan)


def _send_pairs(plan: RankPlan, sizes: Sizes, group: ProcessGroup, layer: str) -> tuple[Tensor, Tensor]:
    """ids, weights [num_rows, top_k] of the rows that this rank receives."""
    of_codes, of_weights = (Exchange(sizes.pairs_sent, sizes.pairs_received, group, layer) for _ in range(2))
    pair_plan = plan.pairs.cut(sum(sizes.pairs_sent))
    codes_ticket = of_codes.start(plan.codes[pair_plan.source_rows.long()])
    weights_ticket = of_weights.start(permute(plan.topk_weights.reshape(-1, 1), pair_plan))
    codes, weights = of_codes.wait(codes_ticket), of_weights.wait(weights_ticket)

    positions = torch.arange(codes.shape[0], device=codes.device)
    first = codes % 2 == 1
    row = first.cumsum(0) - 1
    # a pair's place behind the first of its row; no shape depends on the data, so the host need not wait
    column = positions - positions.where(first, 0).cummax(0).values
    cells = row * sizes.top_k + column
    shape = (sum(sizes.rows_received), sizes.top_k)
    ids = codes.new_full(shape, -1).flatten().scatter(0, cells, codes // 2).view(shape)
    return ids, weights.new_zeros(shape).flatten().scatter(0, cells, weights.flatten()).view(shape)
