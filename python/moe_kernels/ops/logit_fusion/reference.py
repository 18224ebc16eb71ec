"""Logit fusion in plain PyTorch: the specification."""

import math

import torch
from torch import Tensor

from moe_kernels.ops.route.reference import philox

#: second half of the generator's key: draws of this room are never those of routing under the same seed and step
DRAW_KEY = 0x6C6F6769
#: draws at one seed, request and step: of tokens, and of a draft's verification
TOKEN_DRAW, ACCEPT_DRAW, RESAMPLE_DRAW = range(3)


def threshold(z: Tensor, numbers: list[float]) -> Tensor:
    """[num_rows, 1]: the smallest value that a TokenFilter keeps in each row."""
    top_k, top_p, min_p, min_keep = numbers
    ranked = z.detach().sort(dim=1, descending=True).values
    bound = torch.full_like(ranked[:, :1], -torch.inf)
    if 0 < top_k < z.shape[1]:
        bound = ranked[:, int(top_k) - 1 : int(top_k)]
    if top_p < 1:
        left = ranked.masked_fill(ranked < bound, -torch.inf)
        probs = left.double().softmax(1).nan_to_num(0)
        above = probs.cumsum(1) - probs
        # of equal logits, the first one's rank counts for all; NaN, in no order, breaks its row whatever is found here
        above = above.gather(1, torch.searchsorted(-ranked, -ranked).clamp(max=z.shape[1] - 1))
        inside = (above < top_p) & (left > -torch.inf)
        bound = torch.maximum(bound, left.masked_fill(~inside, torch.inf).amin(1, keepdim=True))
    if min_p > 0:
        bound = torch.maximum(bound, ranked[:, :1] + math.log(min_p))
    at_least = min(int(min_keep), z.shape[1])
    return torch.minimum(bound, ranked[:, at_least - 1 : at_least])


def uniforms(request_ids: Tensor, seed: int, step: int | Tensor, draw: int = TOKEN_DRAW) -> Tensor:
    """Float64 in [0, 1), of the shape of ``request_ids``: 53 bits of Philox at (request, step, draw) under the seed."""
    counter = (
        request_ids & 0xFFFFFFFF,
        (request_ids >> 32) & 0xFFFFFFFF,
        torch.zeros_like(request_ids) + step,
        torch.full_like(request_ids, draw),
    )
    first, second, _, _ = philox(counter, seed, DRAW_KEY)
    return ((first << 21) | (second >> 11)).double() * 2.0**-53


def sample(z: Tensor, u: Tensor) -> Tensor:
    """[num_rows] int64: the first token whose cumulative probability exceeds u; -1 where there is none to draw."""
    usable = z.amax(1, keepdim=True).isfinite() & ~z.isnan().any(1, keepdim=True)
    probs = z.double().masked_fill(~usable, 0).softmax(1)
    cumulative = probs.cumsum(1)
    target = u[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)
    # rounding must not run past the last token that can be drawn
    last = torch.where(probs > 0, torch.arange(z.shape[1], device=z.device), -1).amax(1, keepdim=True)
    return torch.where(usable, torch.minimum(tokens, last), -1).squeeze(1)


def fuse(
    sources: list[Tensor],
    rows: Tensor | None,
    weights: Tensor,
    temperature: Tensor,
    vocab_size: int,
    mixture: bool,
    anchor: int,
    neg_inf: str,
    mask: list[float],
    floor: list[float],
    keep: list[float],
) -> Tensor:
    """The fused and filtered logits [num_rows, vocab_size]; a broken row is NaN."""
    if rows is not None:
        sources = [sources[0].index_select(0, rows[:, k]) for k in range(rows.shape[1])]
    dtype = torch.float64 if sources[0].dtype == torch.float64 else torch.float32
    sources = [source[:, :vocab_size].to(dtype) for source in sources]
    weights = weights.to(dtype)
    read = [weights[:, k : k + 1] != 0 for k in range(len(sources))]
    kept = torch.ones_like(sources[anchor], dtype=torch.bool)
    if mask:
        kept = (sources[anchor] >= threshold(sources[anchor], mask)) | ~read[anchor]
    broken = ~((temperature >= 0) & (temperature < torch.inf))[:, None] | ~weights.isfinite().all(1, keepdim=True)
    if mixture:
        broken = broken | (weights < 0).any(1, keepdim=True)
    for k, source in enumerate(sources):
        # outside the anchor's mask the others are not looked at, unless a sum or a bound of the whole row is needed
        whole = torch.full_like(broken, k == anchor or mixture)
        if floor or neg_inf == "floor":
            whole = whole | (weights[:, k : k + 1] < 0)
        bad = (source.isnan() | (source == torch.inf)) & (kept | whole)
        broken = broken | (read[k] & bad.any(1, keepdim=True))
        sources[k] = source.masked_fill(~(kept | whole), 0)
    # what is not read must reach neither the result nor a gradient, be it NaN
    sources = [source.masked_fill(broken | ~is_read, 0) for source, is_read in zip(sources, read, strict=True)]
    weights = weights.masked_fill(broken, 0)
    z = _mixture(sources, weights) if mixture else _linear(sources, weights, anchor, neg_inf, floor)
    broken = broken | (z.masked_fill(~kept, 0) == torch.inf).any(1, keepdim=True)  # a sum that overflows
    z = z.masked_fill(broken, 0)
    divisor = temperature.to(dtype)[:, None].masked_fill(broken | (temperature == 0)[:, None], 1)
    absent = ~kept | (z == -torch.inf)
    z = (z.masked_fill(absent, 0) / divisor).masked_fill(absent, -torch.inf)  # no -inf in the gradient of the quotient
    broken = broken | (z == torch.inf).any(1, keepdim=True)  # or a quotient
    if keep:
        z = z.masked_fill(z < threshold(z, keep), -torch.inf)
    return z.masked_fill(broken, torch.nan)


def _linear(sources: list[Tensor], weights: Tensor, anchor: int, neg_inf: str, floor: list[float]) -> Tensor:
    z = torch.zeros_like(sources[anchor])
    masked = torch.zeros_like(z, dtype=torch.bool)
    undefined = torch.zeros_like(masked)
    for k, source in enumerate(sources):
        weight = weights[:, k : k + 1]
        negative = weight < 0
        absent = source == -torch.inf
        if k != anchor:
            bound = torch.full_like(source[:, :1], -torch.inf)
            if floor:
                bound = threshold(source, floor)
            if neg_inf == "floor":
                bound = torch.maximum(bound, source.detach().masked_fill(absent, torch.inf).amin(1, keepdim=True))
            raised = negative & bound.isfinite() & (source < bound)
            source = torch.where(raised, bound, source)
            absent = source == -torch.inf
            if neg_inf == "zero":
                undefined = undefined | (negative & absent)
                absent = absent & ~negative
        masked = masked | (absent & (weight != 0))
        z = z + weight * source.masked_fill(source == -torch.inf, 0)
    anchored = weights.sum(1, keepdim=True) * sources[anchor].masked_fill(sources[anchor] == -torch.inf, 0)
    return torch.where(undefined, anchored, z).masked_fill(masked, -torch.inf)


def _mixture(sources: list[Tensor], weights: Tensor) -> Tensor:
    terms = []
    for k, source in enumerate(sources):
        # a source without any token contributes nothing; log(0) is cut out of the graph, not only of the value
        empty = (source == -torch.inf).all(1, keepdim=True)
        unread = empty | (weights[:, k : k + 1] <= 0)
        log_probs = source.masked_fill(empty, 0).log_softmax(1)
        term = log_probs + weights[:, k : k + 1].masked_fill(unread, 1).log()
        terms.append(term.masked_fill(unread | (source == -torch.inf), -torch.inf))
    stacked = torch.stack(terms)
    nothing = (stacked == -torch.inf).all(0)
    return stacked.masked_fill(nothing, 0).logsumexp(0).masked_fill(nothing, -torch.inf)


def fuse_logits(
    sources: list[Tensor],
    rows: Tensor | None,
    weights: Tensor,
    temperature: Tensor,
    request_ids: Tensor | None,
    seed: int,
    step: int,
    vocab_size: int,
    mixture: bool,
    anchor: int,
    neg_inf: str,
    mask: list[float],
    floor: list[float],
    keep: list[float],
    out: str,
) -> Tensor:
    if out in ("logits", "log_probs", "probs"):
        temperature = temperature.masked_fill(temperature == 0, torch.nan)  # a token has a limit at 0, these have none
    z = fuse(sources, rows, weights, temperature, vocab_size, mixture, anchor, neg_inf, mask, floor, keep)
    if out == "logits":
        return z
    empty = (z == -torch.inf).all(1, keepdim=True)
    # also outside: a gradient that arrives at a token at -inf goes nowhere
    if out == "log_probs":
        return z.masked_fill(empty, 0).log_softmax(1).masked_fill(z == -torch.inf, -torch.inf)
    if out == "probs":
        return z.masked_fill(empty, 0).softmax(1).masked_fill(z == -torch.inf, 0)
    unusable = (empty | z.isnan().any(1, keepdim=True)).squeeze(1)
    greedy = z.argmax(1)  # the lowest token first among equals
    if out == "sample":
        drawn = sample(z, uniforms(request_ids, seed, step))
        greedy = torch.where(temperature == 0, greedy, drawn)
    return greedy.masked_fill(unusable, -1)


def fuse_features(features: list[Tensor], map_logits: Tensor) -> Tensor:
    """[batch_size, channels, *places]: of the stacked features, the sum over models weighed by a softmax."""
    acc = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    shares = map_logits.to(acc).softmax(1)
    return (torch.stack(features, 1).to(acc) * shares[:, :, None]).sum(1).to(features[0].dtype)


def verify(target: Tensor, draft: Tensor, tokens: Tensor, accept: Tensor, resample: Tensor) -> tuple[Tensor, Tensor]:
    """(how many drafted tokens stay, the token after them), each [num_rows] int64.

    target, draft: probabilities [num_rows, num_draft + 1 and num_draft, vocab]; accept, resample: uniforms of as many.
    """
    num_draft, vocab_size = tokens.shape[1], target.shape[2]
    known = (tokens >= 0) & (tokens < vocab_size)
    index = tokens.masked_fill(~known, 0)[:, :, None]
    of_target, of_draft = (
        probs[:, :num_draft].gather(2, index).squeeze(2).double().masked_fill(~known, 0) for probs in (target, draft)
    )
    stays = accept * of_draft < of_target  # not where the target is zero, or NaN
    num_accepted = stays.long().cumprod(1).sum(1)
    at, rows = num_accepted, torch.arange(tokens.shape[0], device=tokens.device)
    last = at.clamp(max=num_draft - 1)
    is_drafted = (at < num_draft) & (tokens[rows, last] >= 0)
    q = target[rows, at]
    left = (q - draft[rows, last].masked_fill_(~is_drafted[:, None], 0)).clamp_(min=0)
    # equal but for rounding: a token went although nothing is left beside the draft
    left = torch.where((left > 0).any(1, keepdim=True), left, q)
    cumulative = left.cumsum(1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    token = torch.searchsorted(cumulative, resample[rows, at][:, None] * total, right=True)
    # rounding must not run past the last token that can be drawn
    token = torch.minimum(token, torch.searchsorted(cumulative, total))
    return num_accepted, torch.where((total > 0) & total.isfinite(), token, -1).squeeze(1)


#: of solve_tilt, by position in TARGETS of tilt.py
KL, REVERSE_KL, JEFFREYS, SYMMETRY, MATCH = range(5)
SOLVED, AT_LOW, AT_HIGH, BROKEN = range(4)
#: where a misfit may have several minima the lowest of so many intervals' ends says which
INTERVALS = 8


def _tilted(sources: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities of the base, direction, rows that are broken), tokens at -inf anywhere out of the way."""
    dtype = torch.float64 if sources[0].dtype == torch.float64 else torch.float32
    vocab_size = min(source.shape[1] for source in sources)
    sources = [source.detach()[:, :vocab_size].to(dtype) for source in sources]
    broken = torch.stack([(source.isnan() | (source == torch.inf)).any(1) for source in sources]).any(0)
    absent = torch.stack([source == -torch.inf for source in sources]).any(0)
    broken = broken | absent.all(1)
    base, *rest = (source.masked_fill(absent | broken[:, None], 0) for source in sources)
    direction = rest[0] - rest[1] if len(rest) == 2 else rest[0]
    logits = base.masked_fill(absent & ~broken[:, None], -torch.inf)
    return logits.log_softmax(1), direction, broken


def _stats(log_probs: Tensor, direction: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A, A', A'' [num_rows] float64 at one alpha for each row."""
    z = (log_probs + alpha.to(log_probs.dtype)[:, None] * direction).double()
    direction = direction.double()
    log_partition = z.logsumexp(1)
    weights = (z - log_partition[:, None]).exp()
    mean = (weights * direction).sum(1)
    return log_partition, mean, (weights * (direction - mean[:, None]).square()).sum(1)


def tilt_stats(sources: list[Tensor], alpha: Tensor) -> Tensor:
    """[num_rows, num_alphas, 3] float64."""
    log_probs, direction, broken = _tilted(sources)
    columns = [torch.stack(_stats(log_probs, direction, column), 1) for column in alpha.unbind(1)]
    stats = torch.stack(columns, 1) if columns else alpha.new_empty((*alpha.shape, 3))
    return stats.masked_fill(broken[:, None, None], torch.nan)


def _bisect(function, low: Tensor, high: Tensor) -> Tensor:
    """Where a function that rises changes its sign."""
    for _ in range(80):
        middle = (low + high) / 2
        above = function(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def solve_tilt(
    sources: list[Tensor], values: Tensor, target: int, low: float, high: float, grid: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_probs, direction, broken = _tilted(sources)
    broken = broken | ~values.isfinite().all(1)
    wanted, wanted_reverse = values.masked_fill(broken[:, None], 0).unbind(1)
    lows, highs = torch.full_like(wanted, low), torch.full_like(wanted, high)
    start, mean_at_0, _ = _stats(log_probs, direction, torch.zeros_like(wanted))
    log_partition_at_1 = _stats(log_probs, direction, torch.ones_like(wanted))[0] - start

    def divergences(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """KL(P_a || P), KL(P || P_a) and their derivatives."""
        log_partition, mean, variance = _stats(log_probs, direction, alpha)
        alpha = alpha.to(log_probs.dtype).double()
        log_partition = log_partition - start
        kl, reverse = alpha * mean - log_partition, log_partition - alpha * mean_at_0
        return kl, reverse, alpha * variance, mean - mean_at_0

    def excess(kind: int, alpha: Tensor, value: Tensor) -> Tensor:
        if kind == SYMMETRY:
            return _stats(log_probs, direction, alpha)[1] - log_partition_at_1 - value
        kl, reverse, _, _ = divergences(alpha)
        return {KL: kl, REVERSE_KL: reverse, JEFFREYS: kl + reverse}[kind] - value

    def root(kind: int, value: Tensor) -> tuple[Tensor, Tensor]:
        at_low, at_high = excess(kind, lows, value) >= 0, excess(kind, highs, value) <= 0
        alpha = _bisect(lambda alpha: excess(kind, alpha, value), lows, highs)
        alpha = torch.where(at_low, lows, torch.where(at_high, highs, alpha))
        return alpha, torch.where(at_low, AT_LOW, torch.where(at_high, AT_HIGH, SOLVED))

    def misfit(alpha: Tensor) -> tuple[Tensor, Tensor]:
        kl, reverse, kl_slope, reverse_slope = divergences(alpha)
        first, second = kl - wanted, reverse - wanted_reverse
        return first.square() + second.square(), first * kl_slope + second * reverse_slope

    if target != MATCH:
        alpha, status = root(target, wanted)
        residual = excess(target, alpha, wanted)
    else:
        first, second = (lows, highs) if grid else (root(KL, wanted)[0], root(REVERSE_KL, wanted_reverse)[0])
        begin, end = torch.minimum(first, second), torch.maximum(first, second)
        intervals = grid - 1 if grid else INTERVALS
        step = (end - begin) / intervals
        costs = torch.stack([misfit(begin + step * j)[0] for j in range(intervals + 1)], 1)
        best = costs.argmin(1)  # the first among equals
        alpha = begin + step * best
        if not grid:
            inside = [torch.clamp(alpha + sign * step, begin, end) for sign in (-1, 1)]
            alpha = torch.where(end > begin, _bisect(lambda alpha: misfit(alpha)[1], *inside), begin)
        residual = misfit(alpha)[0]
        # an end of the bounds that a search runs into is reached to the last halving
        margin = 1e-7 * (high - low)
        status = torch.where(alpha <= low + margin, AT_LOW, torch.where(alpha >= high - margin, AT_HIGH, SOLVED))
    status = torch.where(broken, BROKEN, status).int()
    alpha, residual = alpha.masked_fill(broken, torch.nan), residual.masked_fill(broken, torch.nan)
    return alpha, residual, status, torch.zeros_like(status)
