"""Triton kernels of logit fusion, under the names of the compiled ops (native.py).

A row is cut into blocks of BLOCK tokens, whatever the batch: a first launch fuses the blocks and keeps the largest
logit and the sum of exponentials of each, a second one makes the row's of them, in one order, and finishes the result.
How many blocks a program takes depends on the batch, what it does with each does not.

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

BLOCK = 1024
#: programs that keep every GPU busy; what a launch has beyond them, its programs do one after the other
PROGRAMS = 2048
#: blocks at least that a program of the last launch takes, which reads what is known of all blocks
FINISHED_BLOCKS = 8

FLOOR, ZERO = 1, 2  # positions in api.NEG_INF
LOGITS, LOG_PROBS, PROBS, ARGMAX, SAMPLE = range(5)  # positions in api.OUTS
DRAW_KEY = 0x6C6F6769  # as in reference.py

_INF = tl.constexpr(float("inf"))
_FLOOR, _ZERO = tl.constexpr(FLOOR), tl.constexpr(ZERO)
_LOGITS, _LOG_PROBS = tl.constexpr(LOGITS), tl.constexpr(LOG_PROBS)
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
def _low_of(tops, lows, top):
    """What the largest lost by rounding."""
    return _shift(tl.max(tl.where(tops == top, lows, -_INF), 0))


@triton.jit
def _beside(z, low, top, top_low):
    """z - top, rounded once."""
    return (z - _shift(top)) + (low - top_low)


@triton.jit
def _add_product(total, low, a, b, ACC: tl.constexpr):
    """(total, low) + a b, where low is what total lost by rounding. Knuth's two-sum."""
    product = a * b
    new = total + product
    if ACC == tl.float32:  # float64 has digits to spare
        back = new - total
        low += ((total - (new - back)) + (product - back)) + tl.fma(a, b, -product)
    return new, low


@triton.jit
def _weight(inputs, row, k: tl.constexpr, ACC: tl.constexpr):
    weights_ptr, row_stride, source_stride = inputs[2]
    return tl.load(weights_ptr + row * row_stride + k * source_stride).to(ACC)


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
    inputs, row, NUM_SOURCES: tl.constexpr, HAS_ROWS: tl.constexpr, MIXTURE: tl.constexpr, GREEDY: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Whether a row's weights or temperature are none; a row of the one source that is not there breaks it too."""
    temperature = tl.load(inputs[3][0] + row * inputs[3][1]).to(ACC)
    broken = (temperature != temperature) | (temperature < 0) | (temperature == _INF)
    if not GREEDY:
        broken |= temperature == 0
    for k in tl.static_range(NUM_SOURCES):
        weight = _weight(inputs, row, k, ACC)
        broken |= (weight != weight) | (tl.abs(weight) == _INF)
        if MIXTURE:
            broken |= weight < 0
        if HAS_ROWS:
            at = tl.load(inputs[4][0] + row * NUM_SOURCES + k)
            broken |= (at < 0) | (at >= inputs[4][1])
    return broken


@triton.jit
def _fused_block(
    inputs, stats_ptr, mask_ptr, bounds_ptr, row, block, vocab_size,
    NUM_SOURCES: tl.constexpr, HAS_ROWS: tl.constexpr, MIXTURE: tl.constexpr, ANCHOR: tl.constexpr,
    NEG_INF: tl.constexpr, HAS_MASK: tl.constexpr, HAS_FLOOR: tl.constexpr, GREEDY: tl.constexpr,
    HAS_KEEP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z of one block of tokens, and what it lost by rounding. +inf says that the row is broken."""
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    kept = tokens < vocab_size
    broken = _is_broken(inputs, row, NUM_SOURCES, HAS_ROWS, MIXTURE, GREEDY, ACC)
    stats_ptr += row * NUM_SOURCES * 2
    anchor_weight = _weight(inputs, row, ANCHOR, ACC)
    zeros = tl.zeros((BLOCK,), ACC)
    anchor, z, low = zeros, zeros, zeros
    if HAS_MASK:
        top = tl.load(stats_ptr + 2 * ANCHOR)
        anchor = _logits(inputs, row, ANCHOR, tokens, kept & (anchor_weight != 0), NUM_SOURCES, HAS_ROWS, ACC)
        kept &= (anchor >= top + tl.load(mask_ptr)) | (anchor_weight == 0)
        broken |= top != top
    bad = tl.zeros((BLOCK,), tl.int1)
    if MIXTURE:
        top = zeros - _INF  # of the terms so far, of which z is the sum of exp(term - top)
        for k in tl.static_range(NUM_SOURCES):
            weight = _weight(inputs, row, k, ACC)
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
        absent = tl.zeros((BLOCK,), tl.int1)
        alone = tl.zeros((BLOCK,), tl.int1)  # the anchor is, where a negative weight meets -inf
        weight_sum = tl.zeros((), ACC)
        for k in tl.static_range(NUM_SOURCES):
            weight = _weight(inputs, row, k, ACC)
            weight_sum += weight
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
            anchored = _add_product(zeros, zeros, weight_sum + zeros, tl.where(anchor == -_INF, 0, anchor), ACC)
            z, low = tl.where(alone, anchored[0], z), tl.where(alone, anchored[1], low)
    temperature = tl.load(inputs[3][0] + row * inputs[3][1]).to(ACC)
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


@triton.jit(do_not_specialize=["blocks_each"])
def _stats_kernel(
    inputs,
    partials_ptr,  # [num_rows, NUM_SOURCES, num_blocks, 2]: the largest, then a sum of exponentials or the smallest
    vocab_size,
    num_blocks,
    blocks_each,
    NUM_SOURCES: tl.constexpr, HAS_ROWS: tl.constexpr, MIXTURE: tl.constexpr, ANCHOR: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_FLOOR: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * blocks_each
    for block in range(first, tl.minimum(first + blocks_each, num_blocks)):
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        inside = tokens < vocab_size
        for k in tl.static_range(NUM_SOURCES):
            needed = _is_needed(_weight(inputs, row, k, ACC), k, MIXTURE, ANCHOR, HAS_MASK, HAS_FLOOR)
            x = _logits(inputs, row, k, tokens, inside & needed, NUM_SOURCES, HAS_ROWS, ACC)
            x = tl.where(x == x, x, _INF)
            top = tl.max(tl.where(inside, x, -_INF), 0)
            if MIXTURE:
                second = tl.sum(tl.exp(tl.where(inside, x, -_INF) - _shift(top)), 0)
            else:
                second = tl.min(tl.where(inside & (x > -_INF), x, _INF), 0)
            partial = partials_ptr + ((row * NUM_SOURCES + k) * num_blocks + block) * 2
            tl.store(partial, top)
            tl.store(partial + 1, second)


@triton.jit
def _stats_total_kernel(
    inputs,
    partials_ptr,
    stats_ptr,  # [num_rows, NUM_SOURCES, 2]
    floor_ptr,  # log(min_p) of the floor
    num_blocks,
    NUM_SOURCES: tl.constexpr, MIXTURE: tl.constexpr, ANCHOR: tl.constexpr, NEG_INF: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_FLOOR: tl.constexpr, HAS_MIN_P: tl.constexpr, ACC: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """A mixture's largest logit and log(sum(exp(logit - largest))); the anchor's largest; the others' floor. NaN where
    NaN or +inf was read, -inf of what need not be known."""
    row, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks = tl.arange(0, BLOCKS)
    partials = partials_ptr + ((row * NUM_SOURCES + k) * num_blocks + blocks) * 2
    tops = tl.load(partials, mask=blocks < num_blocks, other=-_INF)
    top = tl.max(tops, 0)
    if MIXTURE:
        sums = tl.load(partials + 1, mask=blocks < num_blocks, other=0)
        total = tl.sum(sums * tl.exp(tops - _shift(top)), 0)
        first, second = top, tl.log(tl.where(top > -_INF, total, 1))
    else:
        floor = tl.full((), -_INF, ACC)
        if HAS_MIN_P:
            floor = top + tl.load(floor_ptr)
        if NEG_INF == _FLOOR:
            smallest = tl.min(tl.load(partials + 1, mask=blocks < num_blocks, other=_INF), 0)
            floor = tl.maximum(floor, tl.where(smallest < _INF, smallest, -_INF))
        first, second = tl.where(k == ANCHOR, top, floor), tl.zeros((), ACC)
    first = tl.where(top == _INF, float("nan"), first)
    needed = _is_needed(_weight(inputs, row, k, ACC), k, MIXTURE, ANCHOR, HAS_MASK, HAS_FLOOR)
    stats = stats_ptr + (row * NUM_SOURCES + k) * 2
    tl.store(stats, tl.where(needed, first, -_INF))
    tl.store(stats + 1, tl.where(needed, second, 0))


@triton.jit(do_not_specialize=["blocks_each"])
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
    blocks_each,
    OUT: tl.constexpr,
    NUM_SOURCES: tl.constexpr, HAS_ROWS: tl.constexpr, MIXTURE: tl.constexpr, ANCHOR: tl.constexpr,
    NEG_INF: tl.constexpr, HAS_MASK: tl.constexpr, HAS_FLOOR: tl.constexpr, GREEDY: tl.constexpr,
    HAS_KEEP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each block what OUT needs: its logits, or those less their largest, which _finish_kernel goes on with."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * blocks_each
    for block in range(first, tl.minimum(first + blocks_each, num_blocks)):
        z, low = _fused_block(
            inputs, stats_ptr, mask_ptr, bounds_ptr, row, block, vocab_size, NUM_SOURCES, HAS_ROWS, MIXTURE, ANCHOR,
            NEG_INF, HAS_MASK, HAS_FLOOR, GREEDY, HAS_KEEP, ACC, BLOCK,
        )  # fmt: skip
        top = tl.max(z, 0)
        tl.store(tops_ptr + row * num_blocks + block, top)
        if OUT != _ARGMAX:
            tokens = block * BLOCK + tl.arange(0, BLOCK)
            out = out_ptr + row * vocab_size + tokens
            if OUT == _LOGITS:
                tl.store(out, z, mask=tokens < vocab_size)
            else:
                top_low = _low_of(z, low, top)
                z = _beside(z, low, top, top_low)
                tl.store(lows_ptr + row * num_blocks + block, top_low)
                tl.store(sums_ptr + row * num_blocks + block, tl.sum(tl.exp(z), 0))
                if OUT != _SAMPLE:
                    tl.store(out, z, mask=tokens < vocab_size)


@triton.jit
def _bound_kernel(
    tops_ptr,
    keep_ptr,  # log(min_p) of keep
    bounds_ptr,
    num_blocks,
    BLOCKS: tl.constexpr,
):
    row, blocks = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS)
    tops = tl.load(tops_ptr + row * num_blocks + blocks, mask=blocks < num_blocks, other=-_INF)
    tl.store(bounds_ptr + row, tl.max(tops, 0) + tl.load(keep_ptr))


@triton.jit
def _of_blocks(tops_ptr, lows_ptr, sums_ptr, row, blocks, num_blocks, OUT: tl.constexpr):
    """What _fuse_kernel found, and of the row its largest logit and what that lost by rounding."""
    at, inside = row * num_blocks + blocks, blocks < num_blocks
    tops = tl.load(tops_ptr + at, mask=inside, other=-_INF)
    top = tl.max(tops, 0)
    if OUT == _LOGITS or OUT == _ARGMAX:
        return tops, tops, tops, top, top
    lows, sums = tl.load(lows_ptr + at, mask=inside, other=0), tl.load(sums_ptr + at, mask=inside, other=0)
    return tops, lows, sums, top, _low_of(tops, lows, top)


@triton.jit(do_not_specialize=["blocks_each"])
def _finish_kernel(
    out_ptr,
    tops_ptr,
    lows_ptr,
    sums_ptr,
    vocab_size,
    num_blocks,
    blocks_each,
    OUT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Logits of broken rows to NaN, or all logits to (log-)probabilities."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * blocks_each
    blocks = tl.arange(0, BLOCKS)
    tops, lows, sums, top, top_low = _of_blocks(tops_ptr, lows_ptr, sums_ptr, row, blocks, num_blocks, OUT)
    total = tl.where(top > -_INF, tl.sum(sums * tl.exp(_beside(tops, lows, top, top_low)), 0), 1)
    for block in range(first, tl.minimum(first + blocks_each, num_blocks)):
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        out = out_ptr + row * vocab_size + tokens
        if OUT == _LOGITS:
            tl.store(out, tl.full((BLOCK,), float("nan"), ACC), mask=(tokens < vocab_size) & (top == _INF))
        else:
            of_block = tl.load(tops_ptr + row * num_blocks + block), tl.load(lows_ptr + row * num_blocks + block)
            z = tl.load(out, mask=tokens < vocab_size, other=0)
            z += _beside(_shift(of_block[0]), of_block[1], top, top_low)
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
    HAS_KEEP: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The block that holds the row's token is fused once more."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS)
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
    z, low = _fused_block(
        inputs, stats_ptr, mask_ptr, bounds_ptr, row, block, vocab_size, NUM_SOURCES, HAS_ROWS, MIXTURE, ANCHOR,
        NEG_INF, HAS_MASK, HAS_FLOOR, GREEDY, HAS_KEEP, ACC, BLOCK,
    )  # fmt: skip
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    largest = tl.max(z, 0)
    token = tl.min(tl.where(z == largest, tokens, 0x7FFFFFFF), 0)
    if OUT == _SAMPLE:
        powers = tl.exp(_beside(z, low, largest, _low_of(z, low, largest)))
        # rounding must not run past the last token that can be drawn
        reached = before + tl.cumsum(powers.to(tl.float64), 0) * scale > target
        token = tl.where(greedy, token, _first(reached & (powers > 0), powers > 0, tokens))
    tl.store(out_ptr + row, tl.where(usable, token, -1).to(tl.int64))


def _blocks_each(num_rows: int, num_blocks: int, at_least: int = 1) -> int:
    return min(num_blocks, max(at_least, num_rows * num_blocks // PROGRAMS))


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
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    blocks_each = _blocks_each(num_rows, num_blocks)
    grid = (num_rows, triton.cdiv(num_blocks, blocks_each))
    has_floor = not mixture and (bool(floor) or neg_inf == FLOOR)
    acc_dtype = tl.float64 if acc == torch.float64 else tl.float32
    common = dict(NUM_SOURCES=num_sources, MIXTURE=mixture, ANCHOR=anchor, HAS_MASK=bool(mask), HAS_FLOOR=has_floor,
                  ACC=acc_dtype)  # fmt: skip
    fused = common | dict(
        HAS_ROWS=rows is not None, NEG_INF=neg_inf, GREEDY=is_token, BLOCK=BLOCK, enable_fp_fusion=False
    )  # products are rounded: what they lose is counted
    of_row = dict(ACC=acc_dtype, BLOCKS=triton.next_power_of_2(num_blocks))
    of_blocks = weights.new_empty((3, num_rows, num_blocks), dtype=acc)  # the largest, its low part, the sum
    with torch.cuda.device_of(weights):
        if mixture or mask or has_floor:
            partials = weights.new_empty((num_rows, num_sources, num_blocks, 2), dtype=acc)
            _stats_kernel[grid](
                inputs, partials, vocab_size, num_blocks, blocks_each, **common, HAS_ROWS=rows is not None, BLOCK=BLOCK
            )
            _stats_total_kernel[(num_rows, num_sources)](
                inputs, partials, stats, _log_min_p(floor, weights, acc), num_blocks, **common | of_row,
                NEG_INF=neg_inf, HAS_MIN_P=bool(floor),
            )  # fmt: skip
        bounds = weights.new_empty(num_rows, dtype=acc)
        known = (inputs, stats, _log_min_p(mask, weights, acc), bounds)
        if keep:
            _fuse_kernel[grid](
                *known, result, *of_blocks, vocab_size, num_blocks, blocks_each, OUT=ARGMAX, HAS_KEEP=False, **fused
            )
            _bound_kernel[(num_rows,)](
                of_blocks[0], _log_min_p(keep, weights, acc), bounds, num_blocks, BLOCKS=of_row["BLOCKS"]
            )
        fused["HAS_KEEP"] = bool(keep)
        _fuse_kernel[grid](*known, result, *of_blocks, vocab_size, num_blocks, blocks_each, OUT=out, **fused)
        if is_token:
            ids = result if request_ids is None else request_ids.contiguous()
            _token_kernel[(num_rows,)](
                *known, ids, seed, step, *of_blocks, result, vocab_size, num_blocks, OUT=out,
                **fused | of_row,
            )  # fmt: skip
        else:
            blocks_each = _blocks_each(num_rows, num_blocks, FINISHED_BLOCKS)
            _finish_kernel[(num_rows, triton.cdiv(num_blocks, blocks_each))](
                result, *of_blocks, vocab_size, num_blocks, blocks_each, OUT=out, BLOCK=BLOCK, **of_row
            )
    return result, stats


fuse_logits = opaque("fuse_logits", _fuse_logits)
