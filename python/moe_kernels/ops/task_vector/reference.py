"""Task vectors in plain PyTorch: the specification."""

import torch
from torch import Tensor

from moe_kernels.ops.task_vector.ternary import TernaryDelta

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of task vectors on a weight of ``dtype`` run in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns, as signed integers of the same size."""
    return tensor.view(_BITS[tensor.dtype.itemsize])


def sum_deltas(deltas: list[TernaryDelta], values: list[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``s = sum_i value_i t_i`` in order, and where any t is not zero."""
    total = torch.zeros(deltas[0].shape, dtype=dtype, device=deltas[0].device)
    touched = torch.zeros_like(total, dtype=torch.bool)
    for delta, value in zip(deltas, values, strict=True):
        signs = delta.signs()
        total += signs * torch.tensor(value, dtype=dtype)  # the product is exact
        touched |= signs != 0
    return total, touched


def apply_(weight: Tensor, deltas: list[TernaryDelta], values: list[float]) -> None:
    total, touched = sum_deltas(deltas, values, accumulator(weight.dtype))
    changed = (weight.to(total.dtype) + total).to(weight.dtype)
    weight.copy_(torch.where(touched & ~weight.isnan(), changed, weight))


def apply_undoable_(weight: Tensor, deltas: list[TernaryDelta], values: list[float]) -> tuple[Tensor, Tensor]:
    """And what takes it back: per touched element in order of position, 0 where the bits of W are those of
    C = round(W' - s), 1 or -1 where they are one more or less, 2 where they are the next of the second tensor."""
    before = weight.clone()
    apply_(weight, deltas, values)
    total, touched = sum_deltas(deltas, values, accumulator(weight.dtype))
    back = (weight.to(total.dtype) - total).to(weight.dtype)
    steps = bits(before)[touched].long() - bits(back)[touched].long()
    steps[before[touched].isnan()] = 0
    codes = torch.where((steps >= -1) & (steps <= 1), steps, 2).to(torch.int8)  # abs of the least integer is itself
    return codes, before[touched][codes == 2]


def unapply_(weight: Tensor, deltas: list[TernaryDelta], values: list[float], codes: Tensor, kept: Tensor) -> None:
    total, touched = sum_deltas(deltas, values, accumulator(weight.dtype))
    back = (weight.to(total.dtype) - total).to(weight.dtype)[touched]
    restored = (bits(back) + torch.where(codes == 2, 0, codes)).view(weight.dtype)
    restored[codes == 2] = kept
    restored = torch.where(weight[touched].isnan(), weight[touched], restored)
    weight[touched] = restored
