"""Merging in plain PyTorch: the specification."""

import torch
from torch import Tensor

from moe_kernels.ops.merge.recipe import ALL, Expert, Recipe, Source, Undecided
from moe_kernels.ops.task_vector.reference import (
    accumulator,
    count_magnitudes,
    count_window,
    differences,
    end_of_ties,
    terms,
)

__all__ = [
    "accumulator",
    "count_magnitudes",
    "count_window",
    "decide_",
    "differences",
    "della_probabilities",
    "elected_signs",
    "end_of_ties",
    "kept_magnitudes",
    "merge",
    "random_bits",
]


def random_bits(key: int, count: int, device: torch.device, first: int = 0) -> Tensor:
    """[count] int64: the 32 random bits of each element from ``first`` on (Philox4x32-10, Salmon et al., SC 2011)."""
    blocks = torch.arange(first // 4, -(-(first + count) // 4), device=device)
    low, high = 0xFFFFFFFF, 32
    words = [blocks & low, blocks >> high, torch.zeros_like(blocks), torch.zeros_like(blocks)]
    key0, key1 = key & low, key >> high & low
    for _ in range(10):
        hi0, lo0 = _multiply(0xD2511F53, words[0])
        hi1, lo1 = _multiply(0xCD9E8D57, words[2])
        words = [hi1 ^ words[1] ^ key0, lo1, hi0 ^ words[3] ^ key1, lo0]
        key0, key1 = key0 + 0x9E3779B9 & low, key1 + 0xBB67AE85 & low
    return torch.stack(words, 1).view(-1)[first % 4 :][:count]


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product; of halves of ``b``, as int64 has no 64 bits without a sign."""
    upper = a * (b >> 16)
    lower = a * (b & 0xFFFF)
    low = ((upper & 0xFFFF) << 16) + lower
    return (upper >> 16) + (low >> 32), low & 0xFFFFFFFF


def _kept(base: Tensor | None, expert: Expert, source: Source) -> Tensor:
    """[numel]: ``t`` where it is kept, rescaled; 0 elsewhere."""
    if isinstance(expert, Tensor):
        acc = accumulator(expert.dtype)
        t = expert.reshape(-1).to(acc)
        if base is not None:
            t = t - base.reshape(-1).to(acc)
    else:
        acc = accumulator(base.dtype)
        t = terms(expert)[0].reshape(-1).to(acc) * torch.tensor(expert.scale, dtype=acc)
    magnitudes = t.float().view(torch.int32) & 0x7FFFFFFF
    index = torch.arange(t.numel(), device=t.device)
    keep = (magnitudes > source.lower) | ((magnitudes == source.lower) & (index < source.lower_end))
    keep &= (magnitudes < source.upper) | ((magnitudes == source.upper) & (index >= source.upper_end))
    if source.lower == 0 and source.upper == 2**31 - 1:
        keep = torch.ones_like(keep)  # no bounds: NaN stays
    if source.keep_below < ALL:
        keep &= random_bits(source.key, t.numel(), t.device) < source.keep_below
    return torch.where(keep, t, 0) / torch.tensor(source.rescale, dtype=acc)


def _like(base: Tensor | None, experts: list[Expert]) -> Tensor:
    """What the result is like: task vectors have no dtype of weights."""
    return experts[0] if base is None else base


def _terms(base: Tensor | None, experts: list[Expert], recipe: Recipe) -> list[Tensor]:
    acc = accumulator(_like(base, experts).dtype)
    pairs = zip(experts, recipe.sources, strict=True)
    return [_kept(base, expert, source) * torch.tensor(source.before, dtype=acc) for expert, source in pairs]


def merge(base: Tensor | None, experts: list[Expert], recipe: Recipe) -> tuple[Tensor, Undecided | None]:
    """And what of it waits for a ``zero_sign``."""
    like = _like(base, experts)
    acc = accumulator(like.dtype)
    entries = _terms(base, experts, recipe)
    total, count, elected = torch.zeros_like(entries[0]), torch.zeros_like(entries[0]), torch.zeros_like(entries[0])
    for term in entries:
        elected += term
    if recipe.election == "sign_of_sum":
        elected = torch.where(elected == 0, float(recipe.zero_sign), elected)
    plus = elected >= 0 if recipe.election == "sum_not_negative" else elected > 0
    for term, source in zip(entries, recipe.sources, strict=True):
        weighted = term * torch.tensor(source.after, dtype=acc)
        if recipe.election == "none":
            total += weighted
            continue
        agrees = (plus & (term > 0)) | ((elected < 0) & (term < 0))
        total += torch.where(agrees, weighted, torch.where(term.isnan(), term, 0))
        count += torch.where(agrees, torch.tensor(source.divisor, dtype=acc), 0)
    if recipe.divisor == "count":
        total = total / count.clamp_min(1)
    elif recipe.divisor == "weights":
        total = total / torch.where(count == 0, 1, count)
    elif recipe.divisor == "constant":
        total = total / torch.tensor(recipe.constant, dtype=acc)
    total = total * torch.tensor(recipe.lambda_, dtype=acc)
    if base is not None:
        total = base.reshape(-1).to(acc) + total
    merged, undecided = total.to(like.dtype).view(like.shape), None
    if recipe.election == "sign_of_sum" and recipe.zero_sign == 0:
        waits = (elected == 0) & torch.stack([term != 0 for term in entries]).any(0)
        if bool(waits.any()):
            undecided = Undecided(waits.view(like.shape), int(elected.sign().sum()))
    return merged, undecided


def decide_(merged: Tensor, undecided: Undecided, base: Tensor | None, experts: list[Expert], recipe: Recipe) -> None:
    merged.copy_(merge(base, experts, recipe)[0])


def elected_signs(base: Tensor | None, experts: list[Expert], recipe: Recipe) -> int:
    """The sum over all elements of the sign of the experts' sum."""
    elected = sum(_terms(base, experts, recipe))
    return int((elected > 0).sum()) - int((elected < 0).sum())


def kept_magnitudes(base: Tensor | None, experts: list[Expert], recipe: Recipe) -> Tensor:
    """[num_experts, 2] float64: the sums of \\|t\\| over all elements and over the kept ones, in float64."""
    sums = [
        (_kept(base, expert, Source()).double().abs().sum(), _kept(base, expert, source).double().abs().sum())
        for expert, source in zip(experts, recipe.sources, strict=True)
    ]
    return torch.stack([torch.stack(pair) for pair in sums])


def della_probabilities(magnitudes: Tensor, density: float, epsilon: float) -> Tensor:
    """[rows, n] float64: ``density - epsilon`` for the smallest of each row to ``density + epsilon`` for the largest.

    By rank, equal magnitudes by position. A row of one element has ``density``.
    """
    n = magnitudes.shape[1]
    ranks = magnitudes.argsort(dim=1, stable=True).argsort(dim=1).double()
    share = ranks / (n - 1) if n > 1 else torch.full_like(ranks, 0.5)
    return density - epsilon + 2 * epsilon * share
