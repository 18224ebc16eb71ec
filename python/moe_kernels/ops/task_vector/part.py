"""Of a task vector, what falls on a part of its weight: :func:`part_of_delta`."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from moe_kernels._dispatch import resolve
from moe_kernels.ops.task_vector import native, reference
from moe_kernels.ops.task_vector.api import decompress, read_packed
from moe_kernels.ops.task_vector.packed import DTYPES, PackedDelta
from moe_kernels.ops.task_vector.ternary import TernaryDelta


def part_of_delta(delta: TernaryDelta | PackedDelta, take: Callable[[Tensor], Tensor]) -> TernaryDelta | PackedDelta:
    """What :func:`moe_kernels.apply_` adds to a part of a weight as it adds ``delta`` to the whole, to the bit.

    Args:
        delta: unpacked for a moment: a byte an element, of values five.
        take: cuts the part out of a tensor of the weight's shape, of any dtype; called on ``delta``'s device.

    Returns:
        Signs as :class:`TernaryDelta`, values as :class:`PackedDelta`; of no known base.
    """
    if isinstance(delta, PackedDelta) and delta.values is not None:
        planes, t = read_packed(delta)
        signs, t = take(TernaryDelta(planes, delta.shape).signs()), take(t).cpu().contiguous()
        kernels = reference if resolve("apply_", "auto", "cpu") == "reference" else native
        mine = TernaryDelta.from_signs(signs).planes.cpu()
        how = (list(t.shape), 1.0, delta.sigma, 0, DTYPES[delta.values])  # t over a scale of 1: as it is
        part = PackedDelta.from_header(kernels.pack_values(mine, t, None, *how))
        return replace(part, data=part.data.to(delta.device), scale=delta.scale)
    delta = decompress(delta) if isinstance(delta, PackedDelta) else delta
    return TernaryDelta.from_signs(take(delta.signs()), delta.scale)
