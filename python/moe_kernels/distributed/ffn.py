"""The expert FFN over ranks: :func:`expert_parallel_ffn`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_kernels._checks import value_error
from moe_kernels._dispatch import autocast, autocast_enabled
from moe_kernels.activation import Activation
from moe_kernels.distributed.chunks import run_in_chunks
from moe_kernels.distributed.faults import announcing
from moe_kernels.distributed.sizes import Team, tell_failure
from moe_kernels.distributed.trip import Trip
from moe_kernels.nn.expert_lora import expert_ffn_with_lora
from moe_kernels.ops.expert_ffn import expert_ffn
from moe_kernels.ops.quantize import QuantizedWeights

_SILU = Activation()


def expert_parallel_ffn(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    group: ProcessGroup,
    layer: str = "expert_parallel_ffn",
    activation: Activation = _SILU,
    chunk_tokens: int | None = None,
    tensor_ranks: int = 1,
) -> Tensor:
    """:func:`moe_kernels.expert_ffn` where each rank has tokens of its own and its share of the experts.

    A token's row travels once to each rank that owns one of its experts, and one row comes back from each; see
    :class:`moe_kernels.distributed.trip.Trip` for what is sent. On each rank :func:`expert_ffn` runs.

    Args:
        hidden_states: [num_tokens, hidden_size], as many on each rank as it likes, also none.
        topk_ids: [num_tokens, top_k], int32 or int64, in [0, num_experts) over all ranks; others are skipped.
        topk_weights: [num_tokens, top_k].
        gate_up_proj, down_proj: this rank's experts, [num_experts / world_size, ...], as many on each rank: rank r has
            the r-th block. With ``tensor_ranks``: the r // tensor_ranks-th of fewer and larger blocks, and of each
            expert the gate rows, the up rows and the columns of ``down_proj`` that are the
            r % tensor_ranks-th slice of the intermediate dimension.
        group: the ranks; all of them must call, and run backward where a gradient is needed.
        layer: name for errors.
        activation: see :func:`expert_ffn`.
        chunk_tokens: how many tokens of each rank travel at a time; None for all. It bounds the memory, also that kept
            for backward, where all tokens go to one rank; see :mod:`moe_kernels.distributed.chunks` for its price.
        tensor_ranks: how many neighbours share each expert (tensor parallelism inside an expert). A token's row goes to
            all of them, and each returns its slice's part of the sum.

    Returns:
        [num_tokens, hidden_size], dtype of ``hidden_states`` (autocast as in :func:`expert_ffn`; rows then travel in
        the autocast dtype).

        Differentiable as :func:`expert_ffn`. A rank's sum over its experts is rounded to the dtype of the rows before
        it travels, and the sums are added in rising order of ranks. So a token's output has the same bits whichever
        rank it starts on and whatever tokens stand beside it or elsewhere; it equals a single process to rounding, and
        to the bit where all experts of a token are, whole, on one rank. The gradient of the experts adds rows in order
        of ranks, then tokens: it is that of one process which has the ranks' tokens one after another, to the bit.

    Raises:
        ValueError: on every rank, where the ranks' layers or dtypes differ; it names layer and rank.
        RuntimeError: on the others, where a rank met an error or did not come; it names layer and rank, as far as they
            are known (see docs/distributed.md).
    """
    if tensor_ranks < 1 or group.size() % tensor_ranks:
        expected = f"a divisor of the {group.size()} ranks"
        error = value_error(f"ExpertParallel: {layer}", "tensor_ranks", expected, tensor_ranks)
        tell_failure(error, hidden_states.device, group, layer)
        raise error
    team = Team(group, layer, gate_up_proj.shape[0] * (group.size() // tensor_ranks), tensor_ranks)
    weights = (gate_up_proj, down_proj)
    return run_ffn(hidden_states, topk_ids, topk_weights, weights, activation, chunk_tokens, team)[0]


@torch.compiler.disable  # sizes that only the host knows break the graph anyway
def run_ffn(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: Sequence[Tensor | QuantizedWeights],
    activation: Activation,
    chunk_tokens: int | None,
    team: Team,
    *,
    scaling: float | None = None,
    beside: Callable[[], Tensor | None] = lambda: None,
) -> tuple[Tensor, Tensor | None]:
    """The experts' sum, and what ``beside`` returns, which runs while rows travel.

    Args:
        weights: this rank's gate_up_proj and down_proj, then the factors of adapters.
        scaling: of the adapters; None where there are none.
    """
    device_type = hidden_states.device.type
    if autocast_enabled(device_type):
        hidden_states, *weights = autocast(device_type, hidden_states, *weights)
    # gradients flow to tensors alone
    tensors = tuple(weight for weight in weights if isinstance(weight, Tensor))

    def run(rows: Tensor, ids: Tensor, row_weights: Tensor, *given: Tensor) -> Tensor:
        following = iter(given)
        gate_up, down, *factors = (next(following) if isinstance(weight, Tensor) else weight for weight in weights)
        arguments = (rows, ids, row_weights, gate_up, down)
        if scaling is None:
            return expert_ffn(*arguments, activation=activation)
        return expert_ffn_with_lora(*arguments, factors, activation=activation, scaling=scaling)

    batch = (hidden_states, topk_ids, topk_weights)
    with announcing(team.group, team.layer):
        if chunk_tokens is not None:
            return run_in_chunks(*batch, tensors, run, chunk_tokens, team), beside()
        trip = Trip(*batch, team)
        found = beside()
        return trip.run(lambda *rows: run(*rows, *tensors)).finish(), found
