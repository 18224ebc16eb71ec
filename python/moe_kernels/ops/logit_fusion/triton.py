"""Triton kernels of logit fusion, under the names of the compiled ops (native.py).

A row is cut into blocks of BLOCK tokens, whatever the batch: a first launch fuses the blocks and keeps the largest
logit and the sum of exponentials of each, a second one makes the row's of them, in one order, and finishes the result.
A program takes BLOCKS blocks at once, and several times so many in large batches; what it does with each is the same.

What has to be known of a source's whole row before it can be fused (a mixture's sums, the largest logit under a filter,
the smallest one that a floor keeps) is read in two launches before; what has to be known of the fused row before its
smallest are left out (``keep``), by fusing it twice.

A fused logit is a sum of two numbers, of which the second is what the first lost by rounding: what is left beside the
largest logit is then rounded once, however large both are.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from moe_kernels._opaque import opaque

BLOCK = 512
BLOCKS = 4
#: programs that keep every GPU busy; what a launch has beyond them, its programs do one after the other
PROGRAMS = 2048
#: tiles at least that a program of the last launch takes, which reads what is known of all blocks
FINISHED_TILES = 4

FLOOR, ZERO = 1, 2  # positions in api.NEG_INF
LOGITS, LOG_PROBS, PROBS, ARGMAX, SAMPLE = range(5)  # positions in api.OUTS
DRAW_KEY = 0x6C6F6769  # as in reference.py

_INF = tl.constexpr(float("inf"))
_FLOOR, _ZERO = tl.constexpr(FLOOR), tl.constexpr(ZERO)
_LOGITS, _LOG_PROBS, _PROBS = tl.constexpr(LOGITS), tl.constexpr(LOG_PROBS), tl.constexpr(PROBS)
_ARGMAX, _SAMPLE = tl.constexpr(ARGMAX), tl.constexpr(SAMPLE)
_DRAW_KEY = tl.constexpr(DRAW_KEY)


@triton.jit
def _divide(a, b, ACC: tl.constexpr):
    """Rounded to nearest: `/` of float32 is not."""
    if ACC == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _shift(top):
    """What is taken off logits of which ``top`` is the largest: nothing where there is none above -inf."""
    return tl.where(top > -_INF, top, 0)


@triton.jit
def _low_of(tops, lows, top, AXIS: tl.constexpr):
    """What the largest lost by rounding."""
    return _shift(tl.max(tl.where(tops == top, lows, -_INF), AXIS))


@triton.jit
def _beside(z, low, top, top_low):
    """z - top, rounded once."""
    return (z - _shift(top)) + (low - top_low)


@triton.jit
def _tile(tile, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Ids of blocks [BLOCKS] and of their tokens [BLOCKS, BLOCK]."""
    blocks = tile * BLOCKS + tl.arange(0, BLOCKS)
    return blocks, blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _add_product(total, low, a, b, ACC: tl.constexpr):
    """(total, low) + a b, where low is what total lost by rounding. Knuth's two-sum."""
    product = a * b
    new = total + product
    if ACC == tl.float32:  # float64 has digits to spare
        back = new - total
        low += ((total - (new - back)) + (product - back)) + tl.fma(a, b, -product)
    return new, low


# `inputs` of all kernels, a tuple: the sources; how far apart their rows are; weights [num_rows, num_sources] and their
# strides; temperature [num_rows] and its stride; rows [num_rows, num_sources] and how many rows the one source has


@triton.jit
def _weights(inputs, row, NUM_SOURCES: tl.constexpr, ACC: tl.constexpr, WIDTH: tl.constexpr):
    """[WIDTH], zeros after the last; all in one load."""
    k = tl.arange(0, WIDTH)
    weights_ptr, row_stride, source_stride = inputs[2]
    return tl.load(weights_ptr + row * row_stride + k * source_stride, mask=k < NUM_SOURCES, other=0).to(ACC)


@triton.jit
def _nth(values, k: tl.constexpr, WIDTH: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, WIDTH) == k, values, 0), 0)


@triton.jit
def _logits(inputs, row, k: tl.constexpr, tokens, wanted, NUM_SOURCES: tl.constexpr, HAS_ROWS: tl.constexpr,
            ACC: tl.constexpr):  # fmt: skip
    """Source k where ``wanted``, elsewhere 0."""
    at = row
    if HAS_ROWS:
        rows_ptr, num_source_rows = inputs[4]
        at = tl.load(rows_ptr + row * NUM_SOURCES + k)
        wanted = wanted & (at >= 0) & (at < num_source_rows)
    return tl.load(inputs[0][k] + at * inputs[1][k] + tokens, mask=wanted, other=0).to(ACC)


@triton.jit
def _is_broken(
    inputs, row, weights, temperature, NUM_SOURCES: tl.constexpr, HAS_ROWS: tl.constexpr, MIXTURE: tl.constexpr,
    GREEDY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Whether a row's weights or temperature are none; a row of the one source that is not there breaks it too."""
    broken = (temperature != temperature) | (temperature < 0) | (temperature == _INF)
    if not GREEDY:
        broken |= temperature == 0
    bad = (weights != weights) | (tl.abs(weights) == _INF)
    if MIXTURE:
        bad |= weights < 0
    if HAS_ROWS:
        k = tl.arange(0, WIDTH)
        at = tl.load(inputs[4][0] + row * NUM_SOURCES + k, mask=k < NUM_SOURCES, other=0)
        bad |= (at < 0) | (at >= inputs[4][1])
    return broken | (tl.max(bad.to(tl.int32), 0) > 0)


@triton.jit
def _fused(
    inputs, stats_ptr, mask_ptr, bounds_ptr, row, tokens, vocab_size,
    NUM_SOURCES: tl.constexpr, HAS_ROWS: tl.constexpr, MIXTURE: tl.constexpr, ANCHOR: tl.constexpr,
    NEG_INF: tl.constexpr, HAS_MASK: tl.constexpr, HAS_FLOOR: tl.constexpr, GREEDY: tl.constexpr,
    HAS_KEEP: tl.constexpr, ACC: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """z of some tokens, and what it lost by rounding. +inf says that the row is broken."""
    kept = tokens < vocab_size
    weights = _weights(inputs, row, NUM_SOURCES, ACC, WIDTH)
    temperature = tl.load(inputs[3][0] + row * inputs[3][1]).to(ACC)
    broken = _is_broken(inputs, row, weights, temperature, NUM_SOURCES, HAS_ROWS, MIXTURE, GREEDY, WIDTH)
    stats_ptr += row * NUM_SOURCES * 2
    anchor_weight = _nth(weights, ANCHOR, WIDTH)
    zeros = tl.zeros(tokens.shape, ACC)
    anchor, z, low = zeros, zeros, zeros
    if HAS_MASK:
        top = tl.load(stats_ptr + 2 * ANCHOR)
        anchor = _logits(inputs, row, ANCHOR, tokens, kept & (anchor_weight != 0), NUM_SOURCES, HAS_ROWS, ACC)
        kept &= (anchor >= top + tl.load(mask_ptr)) | (anchor_weight == 0)
        broken |= top != top
    bad = tl.zeros(tokens.shape, tl.int1)
    if MIXTURE:
        top = zeros - _INF  # of the terms so far, of which z is the sum of exp(term - top)
        for k in tl.static_range(NUM_SOURCES):
            weight = _nth(weights, k, WIDTH)
            largest, log_sum = tl.load(stats_ptr + 2 * k), tl.load(stats_ptr + 2 * k + 1)
            broken |= largest != largest
            here = kept & (weight > 0) & (largest > -_INF)
            x = _logits(inputs, row, k, tokens, here, NUM_SOURCES, HAS_ROWS, ACC)
            term = (x - largest) + (tl.log(tl.where(weight > 0, weight, 1)) - log_sum)
            term = tl.where(here, term, -_INF)
            new_top = tl.maximum(top, term)
            z = z * tl.exp(top - _shift(new_top)) + tl.exp(term - _shift(new_top))
            top = new_top
        absent = top == -_INF
        z = tl.log(tl.where(absent, 1, z)) + top
    else:
        absent = tl.zeros(tokens.shape, tl.int1)
        alone = tl.zeros(tokens.shape, tl.int1)  # the anchor is, where a negative weight meets -inf
        for k in tl.static_range(NUM_SOURCES):
            weight = _nth(weights, k, WIDTH)
            x = anchor
            if k != ANCHOR or not HAS_MASK:
                x = _logits(inputs, row, k, tokens, kept & (weight != 0), NUM_SOURCES, HAS_ROWS, ACC)
            bad |= (x != x) | (x == _INF)
            if k == ANCHOR:
                anchor = x
            elif HAS_FLOOR:
                floor = tl.load(stats_ptr + 2 * k)
                broken |= floor != floor
                x = tl.where((weight < 0) & (x < floor), floor, x)
            if NEG_INF == _ZERO and k != ANCHOR:
                alone |= (x == -_INF) & (weight < 0)
                absent |= (x == -_INF) & (weight > 0)
            else:
                absent |= x == -_INF
            z, low = _add_product(z, low, weight + zeros, tl.where(x == -_INF, 0, x), ACC)
        if NEG_INF == _ZERO:
            anchored = _add_product(zeros, zeros, tl.sum(weights, 0) + zeros, tl.where(anchor == -_INF, 0, anchor), ACC)
            z, low = tl.where(alone, anchored[0], z), tl.where(alone, anchored[1], low)
    divisor = tl.where(temperature == 0, 1, temperature) + zeros
    quotient = _divide(z, divisor, ACC)
    if ACC == tl.float32:
        low = (tl.fma(-quotient, divisor, z) + low) / divisor
    z = quotient + low
    low -= z - quotient
    z = tl.where(kept & (absent == 0), z, -_INF)
    z = tl.where(bad | (z != z) | broken, _INF, z)
    if HAS_KEEP:
        z = tl.where(z >= tl.load(bounds_ptr + row), z, -_INF)
    return z, tl.where(tl.abs(z) < _INF, low, 0)


@triton.jit
def _is_needed(weight, k, MIXTURE: tl.constexpr, ANCHOR: tl.constexpr, HAS_MASK: tl.constexpr, HAS_FLOOR: tl.constexpr):
    """Whether source k's whole row must be read before it is fused."""
    needed = weight != 0
    if not MIXTURE:
        if not HAS_MASK:
            needed &= k != ANCHOR
        if not HAS_FLOOR:
            needed &= k == ANCHOR
        needed &= (weight < 0) | (k == ANCHOR)
    return needed


@triton.jit(do_not_specialize=["tiles_each"])
def _stats_kernel(
    inputs,
    partials_ptr,  # [2, num_rows, NUM_SOURCES, num_blocks]: the largest; sums of exponentials or the smallest
    vocab_size,
    num_blocks,
    tiles_each,
    NUM_SOURCES: tl.constexpr, HAS_ROWS: tl.constexpr, MIXTURE: tl.constexpr, ANCHOR: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_FLOOR: tl.constexpr, ACC: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * tiles_each
    weights = _weights(inputs, row, NUM_SOURCES, ACC, WIDTH)
    for tile in range(first, tl.minimum(first + tiles_each, num_blocks // BLOCKS)):
        blocks, tokens = _tile(tile, BLOCK, BLOCKS)
        inside = tokens < vocab_size
        for k in tl.static_range(NUM_SOURCES):
            needed = _is_needed(_nth(weights, k, WIDTH), k, MIXTURE, ANCHOR, HAS_MASK, HAS_FLOOR)
            x = _logits(inputs, row, k, tokens, inside & needed, NUM_SOURCES, HAS_ROWS, ACC)
            x = tl.where(x == x, x, _INF)
            tops = tl.max(tl.where(inside, x, -_INF), 1)
            if MIXTURE:
                second = tl.sum(tl.exp(tl.where(inside, x, -_INF) - _shift(tops)[:, None]), 1)
            else:
                second = tl.min(tl.where(inside & (x > -_INF), x, _INF), 1)
            partials = partials_ptr + (row * NUM_SOURCES + k) * num_blocks + blocks
            tl.store(partials, tops)
            partials += tl.num_programs(0).to(tl.int64) * NUM_SOURCES * num_blocks
            tl.store(partials, second)


@triton.jit
def _stats_total_kernel(
    inputs,
    partials_ptr,
    stats_ptr,  # [num_rows, NUM_SOURCES, 2]
    floor_ptr,  # log(min_p) of the floor
    num_blocks,
    NUM_SOURCES: tl.constexpr, MIXTURE: tl.constexpr, ANCHOR: tl.constexpr, NEG_INF: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_FLOOR: tl.constexpr, HAS_MIN_P: tl.constexpr, ACC: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """A mixture's largest logit and log(sum(exp(logit - largest))); the anchor's largest; the others' floor. NaN where
    NaN or +inf was read, -inf of what need not be known."""
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks = tl.arange(0, ALL)
    partials = partials_ptr + (row * NUM_SOURCES + k) * num_blocks + blocks
    seconds = partials + tl.num_programs(0).to(tl.int64) * NUM_SOURCES * num_blocks
    tops = tl.load(partials, mask=blocks < num_blocks, other=-_INF)
    top = tl.max(tops, 0)
    if MIXTURE:
        sums = tl.load(seconds, mask=blocks < num_blocks, other=0)
        total = tl.sum(sums * tl.exp(tops - _shift(top)), 0)
        first, second = top, tl.log(tl.where(top > -_INF, total, 1))
    else:
        floor = tl.full((), -_INF, ACC)
        if HAS_MIN_P:
            floor = top + tl.load(floor_ptr)
        if NEG_INF == _FLOOR:
            smallest = tl.min(tl.load(seconds, mask=blocks < num_blocks, other=_INF), 0)
            floor = tl.maximum(floor, tl.where(smallest < _INF, smallest, -_INF))
        first, second = tl.where(k == ANCHOR, top, floor), tl.zeros((), ACC)
    first = tl.where(top == _INF, float("nan"), first)
    weight = tl.load(inputs[2][0] + row * inputs[2][1] + k * inputs[2][2])
    needed = _is_needed(weight, k, MIXTURE, ANCHOR, HAS_MASK, HAS_FLOOR)
    stats = stats_ptr + (row * NUM_SOURCES + k) * 2
    tl.store(stats, tl.where(needed, first, -_INF))
    tl.store(stats + 1, tl.where(needed, second, 0))


@triton.jit(do_not_specialize=["tiles_each"])
def _fuse_kernel(
    inputs,
    stats_ptr,
    mask_ptr,  # log(min_p) of the mask
    bounds_ptr,  # [num_rows]: the smallest z that is kept
    out_ptr,  # [num_rows, vocab_size]
    tops_ptr,  # [num_rows, num_blocks]
    lows_ptr,  # the same: what the largest lost by rounding
    sums_ptr,  # the same: of exp(z - top of the block)
    vocab_size,
    num_blocks,
    tiles_each,
    OUT: tl.constexpr,
    NUM_SOURCES: tl.constexpr, HAS_ROWS: tl.constexpr, MIXTURE: tl.constexpr, ANCHOR: tl.constexpr,
    NEG_INF: tl.constexpr, HAS_MASK: tl.constexpr, HAS_FLOOR: tl.constexpr, GREEDY: tl.constexpr,
    HAS_KEEP: tl.constexpr, ACC: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Of each block what OUT needs: its logits, or those less their largest, which _finish_kernel goes on with."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, num_blocks // BLOCKS)):
        blocks, tokens = _tile(tile, BLOCK, BLOCKS)
        z, low = _fused(
            inputs, stats_ptr, mask_ptr, bounds_ptr, row, tokens, vocab_size, NUM_SOURCES, HAS_ROWS, MIXTURE, ANCHOR,
            NEG_INF, HAS_MASK, HAS_FLOOR, GREEDY, HAS_KEEP, ACC, WIDTH,
        )  # fmt: skip
        tops = tl.max(z, 1)
        at, out = row * num_blocks + blocks, out_ptr + row * vocab_size + tokens
        tl.store(tops_ptr + at, tops)
        if OUT == _LOGITS:
            tl.store(out, z, mask=tokens < vocab_size)
        elif OUT != _ARGMAX:
            lows = tl.zeros((BLOCKS,), ACC)
            if OUT != _SAMPLE:  # where one token is all there is, its logarithm is 0
                lows = _low_of(z, low, tops[:, None], 1)
                tl.store(lows_ptr + at, lows)
            z = _beside(z, low, tops[:, None], lows[:, None])
            tl.store(sums_ptr + at, tl.sum(tl.exp(z), 1))
            if OUT != _SAMPLE:
                tl.store(out, z, mask=tokens < vocab_size)


@triton.jit
def _bound_kernel(
    tops_ptr,
    keep_ptr,  # log(min_p) of keep
    bounds_ptr,
    num_blocks,
    ALL: tl.constexpr,
):
    row, blocks = tl.program_id(0).to(tl.int64), tl.arange(0, ALL)
    tops = tl.load(tops_ptr + row * num_blocks + blocks, mask=blocks < num_blocks, other=-_INF)
    tl.store(bounds_ptr + row, tl.max(tops, 0) + tl.load(keep_ptr))


@triton.jit
def _of_blocks(tops_ptr, lows_ptr, sums_ptr, row, blocks, num_blocks, OUT: tl.constexpr):
    """What _fuse_kernel found, and of the row its largest logit and what that lost by rounding."""
    at, inside = row * num_blocks + blocks, blocks < num_blocks
    tops = tl.load(tops_ptr + at, mask=inside, other=-_INF)
    top = tl.max(tops, 0)
    lows, sums = tl.zeros_like(tops), tl.zeros_like(tops)
    if OUT == _LOG_PROBS or OUT == _PROBS:
        lows = tl.load(lows_ptr + at, mask=inside, other=0)
    if OUT != _LOGITS and OUT != _ARGMAX:
        sums = tl.load(sums_ptr + at, mask=inside, other=0)
    return tops, lows, sums, top, _low_of(tops, lows, top, 0)


@triton.jit(do_not_specialize=["tiles_each"])
def _finish_kernel(
    out_ptr,
    tops_ptr,
    lows_ptr,
    sums_ptr,
    vocab_size,
    num_blocks,
    tiles_each,
    OUT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Logits of broken rows to NaN, or all logits to (log-)probabilities."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * tiles_each
    tops, lows, sums, top, top_low = _of_blocks(
        tops_ptr, lows_ptr, sums_ptr, row, tl.arange(0, ALL), num_blocks, OUT
    )  # fmt: skip
    total = tl.where(top > -_INF, tl.sum(sums * tl.exp(_beside(tops, lows, top, top_low)), 0), 1)
    for tile in range(first, tl.minimum(first + tiles_each, num_blocks // BLOCKS)):
        blocks, tokens = _tile(tile, BLOCK, BLOCKS)
        out = out_ptr + row * vocab_size + tokens
        if OUT == _LOGITS:
            tl.store(out, tl.full(tokens.shape, float("nan"), ACC), mask=(tokens < vocab_size) & (top == _INF))
        else:
            at = row * num_blocks + blocks
            of_block = tl.load(tops_ptr + at), tl.load(lows_ptr + at)
            z = tl.load(out, mask=tokens < vocab_size, other=0)
            z += _beside(_shift(of_block[0]), of_block[1], top, top_low)[:, None]
            if OUT == _LOG_PROBS:
                z -= tl.log(total)
            else:
                z = tl.exp(z) * (1 / total)
            tl.store(out, tl.where(top == _INF, float("nan"), z), mask=tokens < vocab_size)


@triton.jit
def _word(number):
    return (number & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def _uniform(request, seed, step):
    """Float64 in [0, 1), of 53 bits."""
    zero = tl.zeros((), tl.int64)
    counter = _word(request), _word(request >> 32), _word(zero + step), _word(zero)
    first, second, _, _ = philox_impl(*counter, _word(zero + seed), _word(zero + _DRAW_KEY))
    return ((first.to(tl.int64) << 21) | (second.to(tl.int64) >> 11)).to(tl.float64) * 1.1102230246251565e-16  # 2**-53


@triton.jit
def _first(holds, otherwise, ids):
    """The lowest id where it holds, else the highest where ``otherwise`` does."""
    first = tl.min(tl.where(holds, ids, 0x7FFFFFFF), 0)
    return tl.where(first < 0x7FFFFFFF, first, tl.max(tl.where(otherwise, ids, -1), 0))


@triton.jit(do_not_specialize=["seed", "step"])
def _token_kernel(
    inputs,
    stats_ptr,
    mask_ptr,
    bounds_ptr,
    request_ids_ptr,  # [num_rows]
    seed,
    step,
    tops_ptr,
    lows_ptr,
    sums_ptr,
    out_ptr,  # [num_rows] int64
    vocab_size,
    num_blocks,
    OUT: tl.constexpr,
    NUM_SOURCES: tl.constexpr, HAS_ROWS: tl.constexpr, MIXTURE: tl.constexpr, ANCHOR: tl.constexpr,
    NEG_INF: tl.constexpr, HAS_MASK: tl.constexpr, HAS_FLOOR: tl.constexpr, GREEDY: tl.constexpr,
    HAS_KEEP: tl.constexpr, ACC: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The block that holds the row's token is fused once more."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, ALL)
    tops, lows, sums, top, top_low = _of_blocks(tops_ptr, lows_ptr, sums_ptr, row, blocks, num_blocks, OUT)
    usable = (top > -_INF) & (top < _INF)
    block = tl.min(tl.where(tops == top, blocks, num_blocks - 1), 0)
    if OUT == _SAMPLE:
        greedy = tl.load(inputs[3][0] + row * inputs[3][1]) == 0
        scales = tl.exp(_beside(tops, lows, top, top_low))
        masses = tl.where(usable & (sums > 0), sums * scales, 0).to(tl.float64)
        cumulative = tl.cumsum(masses, 0)
        target = _uniform(tl.load(request_ids_ptr + row), seed, step) * tl.max(cumulative, 0)
        drawn = _first((cumulative > target) & (masses > 0), masses > 0, blocks)
        block = tl.where(greedy, block, tl.maximum(drawn, 0))
        before = tl.sum(tl.where(blocks == block, cumulative - masses, 0), 0)
        scale = tl.sum(tl.where(blocks == block, scales, 0), 0)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    z, low = _fused(
        inputs, stats_ptr, mask_ptr, bounds_ptr, row, tokens, vocab_size, NUM_SOURCES, HAS_ROWS, MIXTURE, ANCHOR,
        NEG_INF, HAS_MASK, HAS_FLOOR, GREEDY, HAS_KEEP, ACC, WIDTH,
    )  # fmt: skip
    largest = tl.max(z, 0)
    token = tl.min(tl.where(z == largest, tokens, 0x7FFFFFFF), 0)
    if OUT == _SAMPLE:
        powers = tl.exp(_beside(z, low, largest, 0))
        # rounding must not run past the last token that can be drawn
        reached = before + tl.cumsum(powers.to(tl.float64), 0) * scale > target
        token = tl.where(greedy, token, _first(reached & (powers > 0), powers > 0, tokens))
    tl.store(out_ptr + row, tl.where(usable, token, -1).to(tl.int64))


def _log_min_p(numbers: list[float], like: Tensor, acc: torch.dtype) -> Tensor:
    """What a filter of min_p adds to the largest logit; any pointer where there is none."""
    return like.new_full((), math.log(numbers[2]), dtype=acc) if numbers else like


def _fuse_logits(
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
    neg_inf: int,
    mask: list[float],
    floor: list[float],
    keep: list[float],
    out: int,
) -> tuple[Tensor, Tensor]:
    """As the compiled op."""
    (num_rows, num_sources), is_token = weights.shape, out >= ARGMAX
    acc = torch.float64 if sources[0].dtype == torch.float64 else torch.float32
    result = weights.new_empty(num_rows if is_token else (num_rows, vocab_size), dtype=torch.int64 if is_token else acc)
    stats = weights.new_empty((num_rows, num_sources, 2), dtype=acc)
    if num_rows == 0:
        return result, stats
    sources = [source if source.stride(1) == 1 else source.contiguous() for source in sources]
    every = 1 if rows is None else num_sources  # which source is read is then in rows
    inputs = (
        tuple(sources * every), tuple([source.stride(0) for source in sources] * every), (weights, *weights.stride()),
        (temperature, temperature.stride(0)), (weights if rows is None else rows.contiguous(), sources[0].shape[0]),
    )  # fmt: skip
    num_tiles = triton.cdiv(vocab_size, BLOCK * BLOCKS)
    num_blocks = num_tiles * BLOCKS
    tiles_each = min(num_tiles, max(1, num_rows * num_tiles // PROGRAMS))
    grid, sizes = (num_rows, triton.cdiv(num_tiles, tiles_each)), (vocab_size, num_blocks)
    has_floor = not mixture and (bool(floor) or neg_inf == FLOOR)
    # products are rounded before they are added: fused, each lane of a sum over lanes would have another result, and
    # what a product loses is counted
    numbers = dict(ACC=tl.float64 if acc == torch.float64 else tl.float32, enable_fp_fusion=False)
    tile = numbers | dict(BLOCK=BLOCK, BLOCKS=BLOCKS)
    rule = dict(NUM_SOURCES=num_sources, MIXTURE=mixture, ANCHOR=anchor, HAS_MASK=bool(mask), HAS_FLOOR=has_floor)
    read = dict(HAS_ROWS=rows is not None, WIDTH=triton.next_power_of_2(num_sources))
    fused = rule | read | dict(NEG_INF=neg_inf, GREEDY=is_token, HAS_KEEP=bool(keep))
    of_row = dict(ALL=triton.next_power_of_2(num_blocks))
    of_blocks = weights.new_empty((3, num_rows, num_blocks), dtype=acc)  # the largest, its low part, the sum
    bounds = weights.new_empty(num_rows, dtype=acc)
    known = (inputs, stats, _log_min_p(mask, weights, acc), bounds)
    with torch.cuda.device_of(weights):
        if mixture or mask or has_floor:
            partials = weights.new_empty((2, num_rows, num_sources, num_blocks), dtype=acc)
            _stats_kernel[grid](inputs, partials, *sizes, tiles_each, **rule, **read, **tile)
            _stats_total_kernel[(num_rows, num_sources)](
                inputs, partials, stats, _log_min_p(floor, weights, acc), num_blocks, **rule, **of_row,
                NEG_INF=neg_inf, HAS_MIN_P=bool(floor), **numbers,
            )  # fmt: skip
        if keep:
            unfiltered = fused | dict(OUT=ARGMAX, HAS_KEEP=False)
            _fuse_kernel[grid](*known, result, *of_blocks, *sizes, tiles_each, **unfiltered, **tile)
            _bound_kernel[(num_rows,)](of_blocks[0], _log_min_p(keep, weights, acc), bounds, num_blocks, **of_row)
        _fuse_kernel[grid](*known, result, *of_blocks, *sizes, tiles_each, OUT=out, **fused, **tile)
        if is_token:
            ids = result if request_ids is None else request_ids.contiguous()
            _token_kernel[(num_rows,)](
                *known, ids, seed, step, *of_blocks, result, *sizes, OUT=out, **fused, **of_row, **numbers, BLOCK=BLOCK,
            )  # fmt: skip
        else:
            tiles_each = min(num_tiles, max(FINISHED_TILES, tiles_each))
            grid = (num_rows, triton.cdiv(num_tiles, tiles_each))
            _finish_kernel[grid](result, *of_blocks, *sizes, tiles_each, OUT=out, **of_row, **tile)
    return result, stats


fuse_logits = opaque("fuse_logits", _fuse_logits)
