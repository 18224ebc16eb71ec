"""What a merge does to one tensor, in numbers: every method of thresholds, masks, weights and elections is one.

For each element, with ``t_k = expert_k - base`` in float32 (float64 for float64), over the experts in order::

    e_k   = before_k * (t_k / rescale_k where it is kept, else 0)
    S     = sum_k e_k                                                       # the election
    sign  = + where S > 0, - where S < 0; of S = 0: + (sum_not_negative), or zero_sign (sign_of_sum)
    num   = sum_k after_k * e_k  over e_k of that sign (all, where there is no election)
    den   = 1 (one), constant, or the sum of divisor_k over the same k (count: at least 1; weights: 0 becomes 1)
    out   = round(base + lambda * (num / den))

An entry is kept if the bits of float32(abs(t)) as an integer are above ``lower`` and below ``upper``, or just ``lower``
before index ``lower_end``, or just ``upper`` from index ``upper_end`` on; and if its random number is below
``keep_below``. That is word ``i % 4`` of Philox4x32-10 of counter ``i // 4`` under ``key`` for element i: neither the
order of tensors nor threads nor the device change it.
"""

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from moe_kernels.ops.task_vector.packed import PackedDelta
from moe_kernels.ops.task_vector.ternary import TernaryDelta

#: one expert's weights, or what it adds to the base's: t itself, which stays compressed
Expert = Tensor | TernaryDelta | PackedDelta
#: in the order of Election and Divisor in csrc/microkernels/merge_table.h
ELECTIONS = ("none", "sign_of_sum", "sum_not_negative")
DIVISORS = ("one", "count", "weights", "constant")
#: an index beyond every tensor
END = 2**62
ALL = 2**32


def held(expert: Expert) -> Tensor:
    """The tensor that kernels are given."""
    if isinstance(expert, PackedDelta):
        return expert.data
    return expert.planes if isinstance(expert, TernaryDelta) else expert


@dataclass
class Source:
    """One expert's part."""

    lower: int = 0
    lower_end: int = END
    upper: int = 2**31 - 1
    upper_end: int = 0
    keep_below: int = ALL
    key: int = 0
    rescale: float = 1.0
    before: float = 1.0
    after: float = 1.0
    divisor: float = 1.0

    @property
    def bounds(self) -> tuple[int, ...]:
        return self.lower, self.lower_end, self.upper, self.upper_end, self.keep_below

    @property
    def factors(self) -> tuple[float, ...]:
        return self.rescale, self.before, self.after, self.divisor


@dataclass
class Recipe:
    """All experts' parts, and how they become one."""

    sources: list[Source] = field(default_factory=list)
    election: str = "none"
    divisor: str = "one"
    constant: float = 1.0
    zero_sign: int = 0
    lambda_: float = 1.0


class Undecided(NamedTuple):
    """What a merge says of elements that wait for a ``zero_sign``: sums of zero of entries that are not all zero.

    Attributes:
        where: they are; what it holds is the backend's own.
        signs: the sum over all elements of the sign of the experts' sum.
    """

    where: Tensor
    signs: int


def random_key(seed: int, name: str, expert: int) -> int:
    """The key of an expert's random numbers in one tensor: BLAKE2b, 8 bytes, signed."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{expert}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
