"""Task vectors and patches on sharded weights: :func:`apply_`, :func:`unapply_`, :func:`apply_patch_`, …"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from moe_kernels._checks import shape_error, value_error
from moe_kernels.ops import task_vector
from moe_kernels.ops.task_vector import PackedDelta, Patch, TernaryDelta, Undo, part_of_delta, part_of_patch


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
        deltas: of the whole weight, of signs or of values, the same on every rank. Each is unpacked for a moment, to a
            byte an element or, of values, five.
        coefficients, undo: see :func:`moe_kernels.apply_`.

    Returns:
        This rank's :class:`Undo`, for :func:`unapply_`, or None.
    """
    _check("apply_", weight)
    deltas = [deltas] if isinstance(deltas, TernaryDelta | PackedDelta | Patch) else list(deltas)
    for delta in deltas:
        if not isinstance(delta, TernaryDelta | PackedDelta):
            actual = f"{type(delta).__name__}; a Patch is for apply_patch_"
            raise TypeError(f"apply_: deltas must be TernaryDelta or PackedDelta, got {actual}")
        _check_shape("apply_", "deltas", delta, weight)
    parts = [part_of_delta(delta, partial(_take, weight)) for delta in deltas]
    return task_vector.apply_(_local(weight), parts, coefficients, undo=undo)


def unapply_(weight: DTensor, undo: Undo) -> None:
    """Takes back what :func:`apply_` added to this rank's shard, to the bit."""
    _check("unapply_", weight)
    task_vector.unapply_(_local(weight), undo)


def apply_patch_(weight: DTensor, patch: Patch) -> None:
    """:func:`moe_kernels.apply_patch_` on a sharded weight: each rank moves its shard, and nothing is sent.

    Args:
        weight: any DTensor whose placements are shards or replicas. Whether it is the one that the patch starts from is
            the caller's to ask, of the whole: ``patch.fits(weight.full_tensor())``.
        patch: of the whole weight, the same on every rank. It is unpacked for a moment, twice as large as the whole.
    """
    task_vector.apply_patch_(_local(weight), _part("apply_patch_", patch, weight))


def unapply_patch_(weight: DTensor, patch: Patch) -> None:
    """Takes back :func:`apply_patch_`, to the last bit. Nothing but the patch is needed for it."""
    task_vector.unapply_patch_(_local(weight), _part("unapply_patch_", patch, weight))


def _part(op: str, patch: Patch, weight: DTensor) -> Patch:
    _check(op, weight)
    if not isinstance(patch, Patch):
        raise TypeError(f"{op}: patch must be a Patch, got {type(patch).__name__}; call make_patch")
    _check_shape(op, "patch", patch, weight)
    return part_of_patch(patch, partial(_take, weight))


def _take(weight: DTensor, whole: Tensor) -> Tensor:
    """This rank's shard of ``whole``."""
    # without a source rank every rank cuts its own part out, and nothing is sent
    return distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None).to_local()


def _local(weight: DTensor) -> Tensor:
    with torch.no_grad():  # the shard itself, not a view for autograd: its version says whether undo still fits
        return weight.to_local()


def _check(op: str, weight: DTensor) -> None:
    if not isinstance(weight, DTensor):
        raise value_error(op, "weight", "a DTensor", type(weight).__name__, f"use moe_kernels.{op} on plain tensors")
    if any(isinstance(placement, Partial) for placement in weight.placements):
        raise value_error(op, "weight", "of shards or replicas", weight.placements, "redistribute it first")


def _check_shape(op: str, argument: str, delta: TernaryDelta | PackedDelta | Patch, weight: DTensor) -> None:
    if delta.shape != weight.shape:
        raise shape_error(op, argument, f"{list(weight.shape)} like the whole weight", delta)
