"""Ternary task vectors in memory: two bit planes."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_kernels._checks import dtype_error, shape_error, value_error

#: elements of a group, the two words of which hold one bit of each
GROUP = 64


@dataclass(frozen=True)
class TernaryDelta:
    """``scale * t`` with ``t`` in {-1, 0, 1}: what a fine-tune changed, at two bits a parameter.

    Element ``i`` of the flattened tensor has bit ``i % 64`` (the lowest first) of both words of group ``i // 64``::

        planes[g, 0]   whether t is not zero
        planes[g, 1]   whether t is -1; never set where the first is not

    One load of 16 bytes serves 64 weights, and an operation on t is one on words: overlap, sign conflicts, negation.
    Bits past the last element are zero.

    Attributes:
        planes: [ceil(numel / 64), 2] int64, contiguous.
        shape: of the tensor.
        scale: what one step of t is worth; coefficients given to :func:`moe_kernels.apply_` multiply it. Python float.
    """

    planes: Tensor
    shape: torch.Size
    scale: float = 1.0

    def __post_init__(self):
        op = "TernaryDelta"
        object.__setattr__(self, "shape", torch.Size(self.shape))
        if self.planes.dtype != torch.int64:
            raise dtype_error(op, "planes", torch.int64, self.planes)
        groups = -(-self.numel // GROUP)
        if self.planes.shape != (groups, 2) or not self.planes.is_contiguous():
            raise shape_error(op, "planes", f"[{groups}, 2], contiguous", self.planes)
        if not math.isfinite(self.scale):
            raise value_error(op, "scale", "a finite number", self.scale)

    @staticmethod
    def from_signs(signs: Tensor, scale: float = 1.0) -> "TernaryDelta":
        """The planes of ``sign(signs)``, of any shape, dtype and strides. NaN is refused."""
        flat = signs.reshape(-1)
        if flat.is_floating_point() and bool(flat.isnan().any()):
            raise value_error("TernaryDelta", "signs", "numbers", "NaN")
        planes = torch.stack((_words(flat != 0), _words(flat < 0)), 1)
        return TernaryDelta(planes, signs.shape, scale)

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def device(self) -> torch.device:
        return self.planes.device

    @property
    def nnz(self) -> int:
        """How many elements are not zero."""
        return int(popcount(self.planes[:, 0]).sum())

    @property
    def density(self) -> float:
        """The part of elements that is not zero; of an empty tensor 0."""
        return self.nnz / self.numel if self.numel else 0.0

    @property
    def nbytes(self) -> int:
        return self.planes.numel() * 8

    def signs(self) -> Tensor:
        """t itself: int8 in the tensor's shape."""
        nonzero, negative = _bits(self.planes[:, 0], self.numel), _bits(self.planes[:, 1], self.numel)
        return (nonzero - 2 * negative).view(self.shape)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``scale * t`` in ``dtype``, rounded once."""
        return (self.signs().double() * self.scale).to(dtype)

    def to(self, device: torch.device | str) -> "TernaryDelta":
        """The same task vector on a device."""
        return replace(self, planes=self.planes.to(device))

    def __neg__(self) -> "TernaryDelta":
        nonzero, negative = self.planes.unbind(1)
        return replace(self, planes=torch.stack((nonzero, nonzero ^ negative), 1))


def popcount(words: Tensor) -> Tensor:
    """Bits that are set in each int64: int64 of the same shape. Sums of pairs, of fours, of bytes, as in Hacker's
    Delight (Warren, 2nd edition, 5-1)."""
    pairs = words - ((words >> 1) & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((eights * 0x0101010101010101) >> 56) & 0xFF


def _words(bits: Tensor) -> Tensor:
    """[n] bool to [ceil(n / 64)] int64."""
    padded = bits.new_zeros(-(-bits.numel() // GROUP) * GROUP, dtype=torch.uint8)
    padded[: bits.numel()] = bits
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8).view(torch.int64)


def _bits(words: Tensor, count: int) -> Tensor:
    """[g] int64 to the first ``count`` bits, int8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    octets = words.new_empty(words.shape).copy_(words).view(torch.uint8)  # one word may have any stride
    return ((octets[:, None] >> shifts) & 1).view(-1)[:count].to(torch.int8)
