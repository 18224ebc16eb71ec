"""A batch's way to the ranks of its experts and back: :class:`Trip`."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_kernels._checks import FLOAT_DTYPES, ID_DTYPES, check_same_device, dtype_error, shape_error
from moe_kernels.distributed.all_to_all import Exchange
from moe_kernels.distributed.rank_plan import RankPlan, plan_ranks
from moe_kernels.distributed.sizes import Sizes, Team, exchange_sizes, tell_failure
from moe_kernels.ops.permute import permute, unpermute

#: from rows [num_rows, hidden_size], ids [num_rows, top_k] int32 of a rank's own experts (-1: none) and weights
#: [num_rows, top_k] to [num_rows, hidden_size]; differentiable in rows and weights
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


class Trip:
    """Runs each token through its experts, wherever they are, in three steps that leave room for other work.

    ::

        trip = Trip(hidden_states, topk_ids, topk_weights, team)
        ...                             # work that needs nothing of it
        trip.run(experts)
        ...
        out = trip.finish()

        rows      = hidden_states of every token, once for each rank that owns one of its experts  -> to that rank
        out[rank] = experts(rows, ids, weights) there, a weighted sum over the token's experts of that rank
        out       = sum of out[rank], in rising order of the ranks

    Where several ranks own an expert together (``team.tensor_ranks``), each has a slice of its intermediate dimension
    and returns that part of the sum: the reduction over tensor-parallel ranks is the one that adds the experts anyway.

    Sent by a layer, and no byte more: a row for each (token, rank) and an int32 and a weight for each (token, expert)
    there; back, a row for each (token, rank). Backward sends as many rows and weights the other way, no ints. Before
    them go the sizes, :data:`.sizes.NUMBERS` int64 to each rank.

    Args:
        hidden_states: [num_tokens, hidden_size]; each rank has tokens of its own, any number, also none.
        topk_ids, topk_weights: [num_tokens, top_k].
        team: all of its ranks must take the trip, forward and backward.
        chunk_tokens, num_tokens: of a batch that travels in chunks, see :mod:`.chunks`.
    """

    def __init__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        team: Team,
        *,
        chunk_tokens: int = 0,
        num_tokens: int = 0,
    ):
        group, layer = team.group, team.layer
        try:
            check_batch(layer, hidden_states, topk_ids, topk_weights)
            plan = plan_ranks(topk_ids, topk_weights, team.num_experts, group.size(), team.tensor_ranks)
        except Exception as error:
            tell_failure(error, hidden_states.device, group, layer)
            raise
        counts = (plan.tokens.expert_offsets.diff(), plan.pairs.expert_offsets.diff())
        self.sizes = sizes = exchange_sizes(*counts, num_tokens, hidden_states, topk_weights, chunk_tokens, team)
        self.token_plan = plan.tokens.cut(sum(sizes.rows_sent))
        self.there = Exchange(sizes.rows_sent, sizes.rows_received, group, layer)
        self.back = Exchange(sizes.rows_received, sizes.rows_sent, group, layer)
        self.ticket = self.there.start(permute(hidden_states, self.token_plan))
        self.pairs = _Pairs(plan, sizes, team)

    def run(self, experts: Experts) -> "Trip":
        """Waits for the rows, runs them and starts them back."""
        ids, weights = self.pairs.wait()
        self.ticket = self.back.start(experts(self.there.wait(self.ticket), ids, weights))
        return self

    def finish(self) -> Tensor:
        """[num_tokens, hidden_size], dtype of what ``experts`` returned."""
        return unpermute(self.back.wait(self.ticket), self.token_plan)


def check_batch(layer: str, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
    """Raises where the arguments are no batch, whatever the other ranks have."""
    op = f"ExpertParallel: {layer}"
    if hidden_states.dim() != 2:
        raise shape_error(op, "hidden_states", "[num_tokens, hidden_size]", hidden_states)
    if topk_ids.dim() != 2 or topk_ids.shape[0] != hidden_states.shape[0]:
        raise shape_error(op, "topk_ids", f"[num_tokens={hidden_states.shape[0]}, top_k]", topk_ids)
    if topk_weights.shape != topk_ids.shape:
        raise shape_error(op, "topk_weights", f"{list(topk_ids.shape)} like topk_ids", topk_weights)
    if topk_ids.dtype not in ID_DTYPES:
        raise dtype_error(op, "topk_ids", ID_DTYPES, topk_ids, "cast with .to(torch.int32)")
    for name, tensor in (("hidden_states", hidden_states), ("topk_weights", topk_weights)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise dtype_error(op, name, FLOAT_DTYPES, tensor)
    check_same_device(op, hidden_states=hidden_states, topk_ids=topk_ids, topk_weights=topk_weights)


class _Pairs:
    """Tells each rank which of its experts the rows are for, and with what weights."""

    def __init__(self, plan: RankPlan, sizes: Sizes, team: Team):
        self.sizes = sizes
        sent, received = sizes.pairs_sent, sizes.pairs_received
        self.codes, self.weights = (Exchange(sent, received, team.group, team.layer) for _ in range(2))
        pair_plan = plan.pairs.cut(sum(sizes.pairs_sent))
        self.codes_ticket = self.codes.start(plan.codes[pair_plan.source_rows.long()])
        self.weights_ticket = self.weights.start(permute(plan.topk_weights.reshape(-1, 1), pair_plan))

    def wait(self) -> tuple[Tensor, Tensor]:
        """ids, weights [num_rows, top_k] of the rows that this rank receives."""
        codes, weights = self.codes.wait(self.codes_ticket), self.weights.wait(self.weights_ticket)
        positions = torch.arange(codes.shape[0], device=codes.device)
        first = codes % 2 == 1
        row = first.cumsum(0) - 1
        # a pair's place behind the first of its row; no shape depends on the data, so the host need not wait
        column = positions - positions.where(first, 0).cummax(0).values
        cells = row * self.sizes.top_k + column
        shape = (sum(self.sizes.rows_received), self.sizes.top_k)
        ids = codes.new_full(shape, -1).flatten().scatter(0, cells, codes // 2).view(shape)
        return ids, weights.new_zeros(shape).flatten().scatter(0, cells, weights.flatten()).view(shape)
