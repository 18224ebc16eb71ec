"""Task vectors on sharded weights: :func:`apply_`, :func:`unapply_`."""

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from moe_kernels._checks import value_error
from moe_kernels.ops import task_vector
from moe_kernels.ops.task_vector import PackedDelta, TernaryDelta, Undo, decompress


def apply_(
    weight: DTensor,
    deltas: TernaryDelta | PackedDelta | Sequence[TernaryDelta | PackedDelta],
    coefficients: float | Sequence[float] = 1.0,
    *,
    undo: bool = False,
) -> Undo | None:
    """:func:`moe_kernels.apply_` on a sharded weight: each rank adds what falls on its shard, and nothing is sent.

    The shards have the bits that they would have if the whole weight had been changed and then sharded.

    Args:
        weight: any DTensor whose placements are shards or replicas.
        deltas: of the whole weight, the same on every rank. Each is unpacked to a byte an element for a moment.
        coefficients, undo: see :func:`moe_kernels.apply_`.

    Returns:
        This rank's :class:`Undo`, for :func:`unapply_`, or None.
    """
    _check("apply_", weight)
    deltas = [deltas] if isinstance(deltas, TernaryDelta | PackedDelta) else list(deltas)
    return task_vector.apply_(_local(weight), [shard(delta, weight) for delta in deltas], coefficients, undo=undo)


def unapply_(weight: DTensor, undo: Undo) -> None:
    """Takes back what :func:`apply_` added to this rank's shard, to the bit."""
    _check("unapply_", weight)
    task_vector.unapply_(_local(weight), undo)


def shard(delta: TernaryDelta | PackedDelta, weight: DTensor) -> TernaryDelta:
    """The part of a task vector that falls on this rank's shard of ``weight``."""
    delta = decompress(delta) if isinstance(delta, PackedDelta) else delta
    if delta.shape != weight.shape:
        raise value_error("apply_", "deltas", f"of the whole weight's shape {list(weight.shape)}", list(delta.shape))
    # without a source rank every rank cuts its own part out, and nothing is sent
    signs = distribute_tensor(delta.signs(), weight.device_mesh, weight.placements, src_data_rank=None)
    return TernaryDelta.from_signs(signs.to_local(), delta.scale)


def _local(weight: DTensor) -> torch.Tensor:
    with torch.no_grad():  # the shard itself, not a view for autograd: its version says whether undo still fits
        return weight.to_local()


def _check(op: str, weight: DTensor) -> None:
    if not isinstance(weight, DTensor):
        raise value_error(op, "weight", "a DTensor", type(weight).__name__, "use moe_kernels.apply_ on plain tensors")
    if any(isinstance(placement, Partial) for placement in weight.placements):
        raise value_error(op, "weight", "of shards or replicas", weight.placements, "redistribute it first")
