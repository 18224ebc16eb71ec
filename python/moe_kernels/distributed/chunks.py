"""A batch that travels in chunks, so that no rank holds more than a chunk of everybody's tokens at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels._checks import value_error
from moe_kernels.distributed.faults import announcing
from moe_kernels.distributed.sizes import Team
from moe_kernels.distributed.trip import Trip


def run_in_chunks(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    parameters: tuple[Tensor, ...],
    experts: Callable[..., Tensor],
    chunk_tokens: int,
    team: Team,
) -> Tensor:
    """:class:`Trip` of ``chunk_tokens`` tokens of each rank at a time.

    If all tokens of all ranks choose one expert, its rank receives ``world_size * chunk_tokens`` rows at a time instead
    of all. Three chunks are under way: while one runs through the experts, the next one's rows travel there and the
    last one's travel back. For backward only the arguments are kept; each chunk is sent and run again.

    Args:
        parameters: what ``experts`` takes behind rows, ids and weights, differentiable; the chunks' gradients are added
            in float32 (float64 for float64).
        experts: see :data:`.trip.Experts`.
        chunk_tokens: the same on all ranks; ranks with fewer chunks than others send empty ones.
    """
    if chunk_tokens < 1:
        raise value_error("ExpertParallel", "chunk_tokens", "at least 1, or None", chunk_tokens)

    def set_out(*chunk: Tensor) -> Trip:
        options = {"chunk_tokens": chunk_tokens, "num_tokens": hidden_states.shape[0]}
        return Trip(*chunk, team, **options)

    return _Chunks.apply(set_out, experts, chunk_tokens, team, hidden_states, topk_ids, topk_weights, *parameters)


class _Chunks(torch.autograd.Function):
    """Saves the arguments."""

    @staticmethod
    def forward(ctx, set_out, experts, chunk_tokens: int, team: Team, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.given = (set_out, experts, chunk_tokens, team)
        parameters = tensors[3:]
        outs, last = [], None
        for _, _, trip in _under_way(set_out, chunk_tokens, tensors[:3]):
            trip.run(lambda *rows: experts(*rows, *parameters))
            if last is not None:
                outs.append(last.finish())
            last = trip
        return torch.cat([*outs, last.finish()])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        set_out, experts, chunk_tokens, team = ctx.given
        tensors = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[4:], strict=True)
        ]
        batch, parameters = tensors[:3], tensors[3:]
        grads = [
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            if tensor.requires_grad
            else None
            for tensor in tensors
        ]
        with announcing(team.group, team.layer, backward=True), torch.enable_grad():
            for rows, chunk, trip in _under_way(set_out, chunk_tokens, batch):
                out = trip.run(lambda *rows: experts(*rows, *parameters)).finish()
                asked = [at for at, grad in enumerate(grads) if grad is not None]
                leaves = [(*chunk, *parameters)[at] for at in asked]
                for at, grad in zip(asked, torch.autograd.grad(out, leaves, grad_out[rows]), strict=True):
                    grads[at][rows if at < len(batch) else ...] += grad
        return (
            None,
            None,
            None,
            None,
            *(None if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors, strict=True)),
        )


def _under_way(
    set_out, chunk_tokens: int, batch: tuple[Tensor, ...]
) -> Iterator[tuple[slice, tuple[Tensor, ...], Trip]]:
    """(tokens, chunk, trip) of each chunk, when the next one's rows are already travelling."""

    def start(number: int) -> tuple[slice, tuple[Tensor, ...], Trip]:
        rows = slice(number * chunk_tokens, (number + 1) * chunk_tokens)
        chunk = tuple(tensor[rows].detach().requires_grad_(tensor.requires_grad) for tensor in batch)
        return rows, chunk, set_out(*chunk)

    current = start(0)
    num_chunks = max(-(-current[2].sizes.num_tokens // chunk_tokens), 1)  # of the rank that has most
    for number in range(num_chunks):
        following = start(number + 1) if number + 1 < num_chunks else None
        yield current
        current = following
