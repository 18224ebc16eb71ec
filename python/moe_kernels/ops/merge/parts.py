"""Methods that look at whole rows, or at all experts before one is known: passes over a tensor, part by part."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moe_kernels._checks import value_error
from moe_kernels.ops.merge import reference
from moe_kernels.ops.merge.recipe import ALL, Recipe, Source
from moe_kernels.ops.task_vector.magnitudes import LOW_BITS, rank

#: elements of a part, unless one row has more
_ELEMENTS = 1 << 20


class Parts:
    """The differences of one tensor's experts, a part at a time: they are never there as a whole."""

    def __init__(self, op: str, name: str, base: Tensor, experts: list[Tensor], kernels, merge: Callable):
        self.op, self.name, self.base, self.experts = op, name, base, experts
        self.kernels, self.merge_part = kernels, merge
        self.acc = reference.accumulator(base.dtype)

    def slices(self, row: int = 1) -> Iterator[slice]:
        """Of the flat tensor, whole rows of ``row`` elements."""
        step = max(_ELEMENTS // max(row, 1), 1) * row
        return (slice(at, min(at + step, self.base.numel())) for at in range(0, self.base.numel(), max(step, 1)))

    def differences(self, part: slice) -> list[Tensor]:
        base = self.base.view(-1)[part].to(self.acc)
        found = [expert.view(-1)[part].to(self.acc) - base for expert in self.experts]
        if not all(bool(t.isfinite().all()) for t in found):
            raise value_error(self.op, self.name or "experts", "finite", "NaN or an infinity")
        return found

    def merge(self, row: int, keep: Callable[[slice, list[Tensor]], list[Tensor]], recipe: Recipe) -> Tensor:
        """``round(base + merged)`` of what ``keep`` makes of each part's differences, by a recipe without a base."""
        out = torch.empty_like(self.base)
        for part in self.slices(row):
            merged, _ = self.merge_part(None, keep(part, self.differences(part)), recipe)
            out.view(-1)[part] = (self.base.view(-1)[part].to(self.acc) + merged).to(out.dtype)
        return out


def breadcrumbs(parts: Parts, density: float, gamma: float, recipe: Recipe) -> Tensor:
    """Of each row of the last dimension: the top ``int(gamma n)`` go, of the rest the top ``int(density n)`` stay."""
    row = parts.base.shape[-1] if parts.base.dim() else 1
    top, keep = int(gamma * row), int(density * row)

    def middle(t: Tensor) -> Tensor:
        rows = t.view(-1, row)
        order = rows.abs().argsort(dim=1, descending=True, stable=True)[:, top : top + keep]
        return torch.zeros_like(rows).scatter(1, order, rows.gather(1, order)).view(-1)

    return parts.merge(row, lambda part, deltas: [middle(t) for t in deltas], recipe)


def della(parts: Parts, density: float, epsilon: float, keys: list[int], recipe: Recipe) -> Tensor:
    """Of each row (a vector is one; the first dimension counts rows): kept by rank, to the same sum of magnitudes."""
    numel = parts.base.numel()
    row = numel if parts.base.dim() < 2 or not numel else numel // parts.base.shape[0]
    if density >= 1 or not numel:
        return parts.merge(row, lambda part, deltas: deltas, recipe)
    if density <= 0:
        return parts.merge(row, lambda part, deltas: [torch.zeros_like(t) for t in deltas], recipe)

    def kept(part: slice, t: Tensor, key: int) -> Tensor:
        below = reference.della_probabilities(t.view(-1, row).abs(), density, epsilon).mul(ALL).round()
        numbers = reference.random_bits(key, t.numel(), t.device, first=part.start)
        return torch.where(numbers < below.view(-1), t, 0)

    sums = [[] for _ in keys]  # of magnitudes, before and after
    for part in parts.slices(row):
        for found, key, t in zip(sums, keys, parts.differences(part), strict=True):
            found.append([float(one.double().abs().sum()) for one in (t, kept(part, t, key))])
    totals = [tuple(map(math.fsum, zip(*found, strict=True))) for found in sums]
    rescale = [after / before if before and after else 1.0 for before, after in totals]

    def rescaled(part: slice, deltas: list[Tensor]) -> list[Tensor]:
        return [kept(part, t, key) / by for t, key, by in zip(deltas, keys, rescale, strict=True)]

    return parts.merge(row, rescaled, recipe)


def sce(parts: Parts, select_topk: float, lambda_: float) -> Tensor:
    """Entries of the largest variance between experts; weights by mean square; election; weighted mean.

    Of equal variances (in float32) the first are the larger. mergekit gives every expert the same weight where the mean
    squares sum to less than 1e-6; here only where to 0.
    """
    masks = _largest_variance(parts, select_topk)

    def kept(part: slice, deltas: list[Tensor]) -> list[Tensor]:
        return deltas if masks is None else [t * masks(part, deltas) for t in deltas]

    squares = [[] for _ in parts.experts]
    for part in parts.slices():
        for found, t in zip(squares, kept(part, parts.differences(part)), strict=True):
            found.append(float(t.double().square().sum()))
    sums = [math.fsum(found) for found in squares]
    total = math.fsum(sums)
    weights = [one / total if total else 1 / len(sums) for one in sums]
    sources = [Source(after=weight, divisor=weight) for weight in weights]
    recipe = Recipe(sources, election="sum_not_negative", divisor="weights", lambda_=lambda_)
    return parts.merge(1, kept, recipe)


def _largest_variance(parts: Parts, share: float) -> Callable[[slice, list[Tensor]], Tensor] | None:
    """Says which entries of a part are among the ``share`` of largest variance, of those whose variance is not 0."""
    if share >= 1:
        return None

    def variances() -> Iterator[tuple[int, Tensor]]:
        for part in parts.slices():
            yield part.start, _variance(parts.differences(part))

    high, nonzero = torch.zeros(2**16, dtype=torch.int64), 0
    for _, variance in variances():
        nonzero += int(variance.count_nonzero())
        high += parts.kernels.count_magnitudes(variance, None, -1).cpu()
    keep = int(nonzero * share)
    if keep == 0:
        return lambda part, deltas: torch.zeros_like(deltas[0], dtype=torch.bool)
    prefix, above = rank(high, keep)
    low = torch.zeros(2**LOW_BITS, dtype=torch.int64)
    for _, variance in variances():
        low += parts.kernels.count_magnitudes(variance, None, prefix).cpu()
    suffix, above_low = rank(low, keep - above)
    bits, left = prefix << LOW_BITS | suffix, keep - above - above_low
    ties_before = {}  # of those just at the bound: how many come before a part
    ties = 0
    for start, variance in variances():
        ties_before[start] = ties
        ties += int((variance.view(torch.int32) == bits).sum())

    def mask(part: slice, deltas: list[Tensor]) -> Tensor:
        found = _variance(deltas).view(torch.int32)
        same = found == bits
        return (found > bits) | (same & (same.cumsum(0) + ties_before[part.start] <= left))

    return mask


def _variance(deltas: list[Tensor]) -> Tensor:
    return torch.stack(deltas).var(0, unbiased=False).float()
