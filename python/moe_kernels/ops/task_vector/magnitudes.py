"""Magnitudes as whole numbers: the bits of abs(t) in float32, which order like abs(t) itself, and ranks among them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: bits of infinity: above every magnitude
INFINITY = 0x7F800000
#: of the 31 bits, those that the second histogram counts; the first counts the others
LOW_BITS = 15


def rank(counts: Tensor, keep: int) -> tuple[int, int]:
    """Of a histogram: the bin of the ``keep``-th largest, and how many are in higher bins."""
    from_above = counts.flip(0).cumsum(0)
    at = int(torch.searchsorted(from_above, keep))
    return counts.numel() - 1 - at, int(from_above[at] - counts[counts.numel() - 1 - at])


class Threshold(NamedTuple):
    """The bits of the ``keep``-th largest magnitude of a tensor.

    Attributes:
        wanted: how many of those with just these bits belong to the ``keep`` largest.
        ties: how many have just these bits.
    """

    bits: int
    wanted: int
    ties: int


def threshold(kernels, tensor: Tensor, base: Tensor | None, keep: int) -> Threshold:
    """Of ``tensor - base``, ``0 < keep <= numel``; exact. ``kernels`` is a room's native or reference module.

    Where the threshold will be is guessed from a sample of a large tensor, and counted there alone, which is quicker
    than a whole histogram; a guess that was wrong is found, and the histogram made.

    Raises:
        ValueError: NaN or infinities.
    """
    counts = None
    window = _guess(tensor, base, keep) if tensor.numel() >= _LARGE else None
    if window is not None:
        counts = kernels.count_window(tensor, base, *window).cpu()
        if not window[0] <= rank(counts, keep)[0] <= window[1]:
            counts = None
    if counts is None:
        counts = kernels.count_magnitudes(tensor, base, -1).cpu()
    if counts[INFINITY >> LOW_BITS :].any():
        raise ValueError("NaN or an infinity")
    prefix, above = rank(counts, keep)
    low = kernels.count_magnitudes(tensor, base, prefix).cpu()
    suffix, above_low = rank(low, keep - above)
    return Threshold(prefix << LOW_BITS | suffix, keep - above - above_low, int(low[suffix]))


_LARGE, _SAMPLE = 1 << 20, 1 << 16


def _guess(tensor: Tensor, base: Tensor | None, keep: int) -> tuple[int, int] | None:
    """High halves between which the threshold is, but for one case in thousands if the elements are in no order."""
    step = tensor.numel() // _SAMPLE
    sample = tensor.view(-1)[::step].double()
    if base is not None:
        sample = sample - base.view(-1)[::step].double()
    magnitudes = sample.float().abs()
    count, share = magnitudes.numel(), keep / tensor.numel()
    spread = 4 * math.sqrt(count * share * (1 - share)) + 4
    # the sample's ranks from the smallest up
    low, high = (round(count * (1 - share) + sign * spread) for sign in (-1, 1))
    bounds = [
        int(magnitudes.kthvalue(min(max(at, 1), count)).values.view(torch.int32)) >> LOW_BITS for at in (low, high)
    ]
    return (bounds[0], bounds[1]) if bounds[1] + 1 < INFINITY >> LOW_BITS else None
