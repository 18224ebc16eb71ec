"""What ranks tell each other before tokens travel: how many rows, and of what kind."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_kernels._checks import FLOAT_DTYPES
from moe_kernels.distributed.all_to_all import finish, launch
from moe_kernels.distributed.faults import describe, known, read, tell

#: what must be the same on all ranks, or the exchange would read rows at a wrong size or wait for ever
_KIND = (
    "hidden_size",
    "dtype of hidden_states",
    "dtype of topk_weights",
    "who needs a gradient",
    "num_experts",
    "chunk_tokens",
    "ranks of each expert",
)
#: int64 numbers that each rank sends to each other
NUMBERS = 4 + len(_KIND)
_GRADIENTS = ("neither", "hidden_states", "topk_weights", "hidden_states and topk_weights")


class Team(NamedTuple):
    """The ranks that share a layer's experts.

    Attributes:
        group: all of them.
        layer: name for errors.
        num_experts: of the whole layer; each of ``group.size() / tensor_ranks`` blocks of ranks has as many.
        tensor_ranks: neighbours that share each expert, every one with a slice of its intermediate dimension.
    """

    group: ProcessGroup
    layer: str
    num_experts: int
    tensor_ranks: int = 1


class Sizes(NamedTuple):
    """How much this rank sends to, and receives from, each rank of the group.

    Attributes:
        rows_sent, rows_received: token rows.
        pairs_sent, pairs_received: token-expert pairs.
        top_k, num_tokens: the largest of all ranks.
    """

    rows_sent: list[int]
    rows_received: list[int]
    pairs_sent: list[int]
    pairs_received: list[int]
    top_k: int
    num_tokens: int


def exchange_sizes(
    rows: Tensor,
    pairs: Tensor,
    num_tokens: int,
    hidden_states: Tensor,
    topk_weights: Tensor,
    chunk_tokens: int,
    team: Team,
) -> Sizes:
    """One all-to-all of a few integers, and the only wait of the host for the device in a layer.

    The host has to know the sizes, as the collectives take them from there. What else has to agree travels along, so
    that ranks which do not fit together all raise here, and none is left waiting.

    Args:
        rows, pairs: [world_size] integers, how many this rank sends to each.
        num_tokens: of this rank, in all chunks.
        hidden_states, topk_weights: what is to be sent.
        chunk_tokens: tokens of a chunk, 0 without chunks.

    Raises:
        ValueError: on every rank, where ranks disagree; it names the layer, the ranks and what differs.
        RuntimeError: another rank called :func:`tell_failure`.
    """
    gradients = (hidden_states.requires_grad + 2 * topk_weights.requires_grad) if torch.is_grad_enabled() else 0
    dtypes = [FLOAT_DTYPES.index(tensor.dtype) for tensor in (hidden_states, topk_weights)]
    kind = (hidden_states.shape[1], *dtypes, gradients, team.num_experts, chunk_tokens, team.tensor_ranks)
    world_size, top_k = rows.shape[0], topk_weights.shape[1]
    # filled on the device: a copy from the host would be another wait
    told = [torch.full_like(rows, number, dtype=torch.int64) for number in (top_k, num_tokens, *kind)]
    sent = torch.stack([rows.long(), pairs.long(), *told], 1)
    once = [1] * world_size
    received = finish(launch(sent, once, once, team.group), team.group, team.layer)
    sent, received = torch.stack([sent, received]).tolist()
    failed = [rank for rank, peer in enumerate(received) if peer[0] < 0]
    if failed:
        reasons = "".join(f"; rank {rank}: {text}" for rank in failed if (text := read(team.group, f"told/{rank}")))
        raise known(
            RuntimeError(
                f"ExpertParallel: {team.layer}: all ranks of the expert group must reach this exchange, but ranks "
                f"{failed} met an error before it{reasons or '; see their own errors'}"
            )
        )
    _check_agreement([peer[4:] for peer in received], team.layer)
    return Sizes(
        rows_sent=[peer[0] for peer in sent],
        rows_received=[peer[0] for peer in received],
        pairs_sent=[peer[1] for peer in sent],
        pairs_received=[peer[1] for peer in received],
        top_k=max(peer[2] for peer in received),
        num_tokens=max(peer[3] for peer in received),
    )


def tell_failure(error: Exception, device: torch.device, group: ProcessGroup, layer: str) -> None:
    """Takes part in the exchange of sizes for a rank that cannot go on, so that none waits for it."""
    if getattr(error, "known_to_all_ranks", False):
        return
    tell(group, f"told/{group.rank()}", describe(error))
    once = [1] * group.size()
    finish(launch(torch.full((group.size(), NUMBERS), -1, device=device), once, once, group), group, layer)
    known(error)


def _check_agreement(kinds: list[list[int]], layer: str) -> None:
    for position, name in enumerate(_KIND):
        values = [kind[position] for kind in kinds]
        if len(set(values)) > 1:
            if name.startswith("dtype"):
                values = [FLOAT_DTYPES[value] for value in values]
            elif name.startswith("who"):
                values = [_GRADIENTS[value] for value in values]
            raise_disagreement(layer, name, values)


def raise_disagreement(layer: str, name: str, values: list) -> None:
    """Raises with the value of each rank of the group: the first rank's, and who has another."""
    others = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values) if value != values[0])
    raise known(
        ValueError(
            f"ExpertParallel: {layer}: {name} must be the same on all ranks of the expert group, got {values[0]} on "
            f"rank 0 and {others}; give every rank the same layer, dtype and frozen parameters"
        )
    )
