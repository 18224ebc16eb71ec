"""Triton kernels of routed LoRA, under the names of the compiled ops (native.py).

A program takes a tile of tokens and meets the tile's adapters in rising order, each once: a row of a product of
matrices does not depend on the other rows, so neighbours leave no trace in a token's bits, whichever adapters they
name. Ranks are walked in steps of RANKS rows, as many as the adapter has; rows past its rank are not read. Sums run in
float32 (float64 for float64) in one order. No atomics. An id or a row outside its tensor adds nothing.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels._opaque import opaque
from moe_kernels.ops.grouped_gemm.tiles import power_of_2
from moe_kernels.ops.grouped_gemm.triton import acc_dtype, chunk_of, dot_precision, multiply
from moe_kernels.ops.merge.triton import random_bits
from moe_kernels.ops.routed_lora.native import accumulator

RANKS = 16  # rows of a factor at a time: the least that tensor cores take
MAX_ON_CHIP = 64  # steps of RANKS rows that a token's slots may have in one launch: 128 registers of a thread
MAX_GROUPS = 64
GRAD_TOKENS, GRAD_COLUMNS = 32, 64  # that a program of a factor's gradient adds at a time
DROPOUT_COLUMNS = 1024  # of a program: 8 a thread, 16 bytes of the narrowest
_PAST = tl.constexpr(0x7FFFFFFF)  # behind every adapter


@triton.jit
def _load_ids(
    ids_ptr,  # [num_tokens, top_k]
    ranks_ptr,  # [num_adapters]
    tokens,
    slots,
    num_tokens,
    top_k,
    num_adapters,
    token_stride,
    slot_stride,
    HAS_RANKS: tl.constexpr,
):
    """Adapters of tokens and slots [tokens, slots], -1 where there is none or its rank is 0."""
    inside = (tokens < num_tokens)[:, None] & (slots < top_k)[None, :]
    at = tokens.to(tl.int64)[:, None] * token_stride + slots.to(tl.int64)[None, :] * slot_stride
    ids = tl.load(ids_ptr + at, mask=inside, other=-1)
    ids = tl.where((ids >= 0) & (ids < num_adapters), ids, -1).to(tl.int32)
    if HAS_RANKS:
        ids = tl.where(tl.load(ranks_ptr + ids, mask=ids >= 0, other=0) > 0, ids, -1)
    return ids


@triton.jit
def _next_adapter(ids, after, group, NUM_GROUPS: tl.constexpr):
    """The first of this program's adapters behind ``after``, or _PAST."""
    behind = (ids > after) & (ids % NUM_GROUPS == group)
    return tl.min(tl.min(tl.where(behind, ids, _PAST), 1), 0)


@triton.jit
def _rows_of(
    ranks_ptr, starts_ptr, adapter, max_rank, num_rows, adapter_stride, row_stride,
    HAS_RANKS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """An adapter's rank, and where its first row lies in a factor."""
    rank = tl.minimum(max_rank, num_rows)
    offset = adapter.to(tl.int64) * adapter_stride
    if HAS_RANKS:
        rank = tl.minimum(rank, tl.load(ranks_ptr + adapter))
    if PACKED:
        start = tl.load(starts_ptr + adapter)
        rank = tl.where(start >= 0, tl.minimum(rank, num_rows - start), 0)
        offset = start.to(tl.int64) * row_stride
    return rank, offset


@triton.jit
def _products(
    x_ptr, a_ptr, tokens, owners, rows, rank, depth, x_stride, x_depth_stride, a_row_stride, a_depth_stride,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x[t], row j> of the tokens ``owners`` and the rows below ``rank``; zero for the other rows."""
    steps = tl.arange(0, DEPTH)
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * x_stride + steps[None, :] * x_depth_stride
    a_ptrs = a_ptr + rows.to(tl.int64)[None, :] * a_row_stride + steps[:, None] * a_depth_stride
    products = multiply(
        x_ptrs, owners, x_depth_stride, a_ptrs, rows < rank, a_depth_stride, depth,
        TOKENS, RANKS, DEPTH, CHUNK, EVEN, ACC, PRECISION,
    )  # fmt: skip
    return tl.where((rows < rank)[None, :], products, 0)  # an infinite x times a row that is not there is NaN


@triton.jit
def _add_rows(
    coefficients,  # [TOKENS, RANKS]
    b_ptr,
    rows,
    columns,
    rank,
    num_columns,
    b_row_stride,
    b_column_stride,
    sums,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums + coefficients @ rows of a factor. The coefficients are not rounded: 16-bit rows are widened."""
    inside = (rows < rank)[:, None] & (columns < num_columns)[None, :]
    at = rows.to(tl.int64)[:, None] * b_row_stride + columns.to(tl.int64)[None, :] * b_column_stride
    b = tl.load(b_ptr + at, mask=inside, other=0).to(ACC)
    return tl.dot(coefficients, b, sums, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _store_rows(
    sums, used, mine, base_ptr, out_ptr, tokens, columns, num_columns, base_stride, base_column_stride,
    HAS_BASE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = base + sums, rounded once; the base's bits where no adapter is used."""
    stored = mine[:, None] & (columns < num_columns)[None, :]
    out = sums.to(out_ptr.dtype.element_ty)
    if HAS_BASE:
        at = tokens.to(tl.int64)[:, None] * base_stride + columns.to(tl.int64)[None, :] * base_column_stride
        base = tl.load(base_ptr + at, mask=stored, other=0)
        out = tl.where(used[:, None], (base.to(ACC) + sums).to(out_ptr.dtype.element_ty), base)
    out_ptrs = out_ptr + tokens.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(out_ptrs, out, mask=stored)


@triton.jit
def _routed_lora_kernel(
    x_ptr,  # [num_tokens, depth]
    a_ptr,  # [num_adapters, max_rank, depth], or packed [num_rows, depth]
    b_ptr,  # the same with num_columns
    starts_ptr,  # [num_adapters]
    ranks_ptr,  # [num_adapters]
    ids_ptr,  # [num_tokens, top_k]
    weights_ptr,  # [num_tokens, top_k]
    scaling_ptr,  # [num_adapters]
    base_ptr,  # [num_tokens, num_columns]
    out_ptr,  # [num_tokens, num_columns]
    v_ptr,  # [num_tokens, top_k, max_rank]
    num_tokens, num_adapters, num_rows, top_k, max_rank, depth, num_columns, columns_per_split, x_stride,
    x_depth_stride, a_adapter_stride, a_row_stride, a_depth_stride, b_adapter_stride, b_row_stride, b_column_stride,
    ids_token_stride, ids_slot_stride, weights_token_stride, weights_slot_stride, scaling_stride, base_stride,
    base_column_stride,
    HAS_RANKS: tl.constexpr, PACKED: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_SCALING: tl.constexpr,
    HAS_BASE: tl.constexpr, SAVE: tl.constexpr, NUM_GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,  # top_k * STEPS, rounded up to a power of 2
    STEPS: tl.constexpr,  # of RANKS rows, in max_rank
    TOKENS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr,
    EVEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, PRECISION_OUT: tl.constexpr,
):  # fmt: skip
    """out[t] = base[t] + sum_k w * s * B_e A_e x[t]; v[t, k] = A_e x[t] where it is saved.

    One program for a tile of tokens, a group of adapters (those with one remainder: several groups only where a token
    has one adapter) and a part of the columns. The products with A stay in registers, [tokens, slots and steps, RANKS].
    """
    group, split = tl.program_id(1), tl.program_id(2)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slots, of_step = tl.arange(0, SLOTS) // STEPS, tl.arange(0, SLOTS) % STEPS
    ids = _load_ids(
        ids_ptr, ranks_ptr, tokens, slots, num_tokens, top_k, num_adapters, ids_token_stride, ids_slot_stride, HAS_RANKS
    )
    highest = tl.max(ids, 1)
    # a token without adapters is the first group's
    mine = (tokens < num_tokens) & (tl.maximum(highest, 0) % NUM_GROUPS == group)
    if tl.max(mine.to(tl.int32), 0) == 0:
        return
    in_step = tl.arange(0, RANKS)
    v = tl.zeros((TOKENS, SLOTS, RANKS), ACC)
    adapter = _next_adapter(ids, -1, group, NUM_GROUPS)
    while adapter < _PAST:
        rank, offset = _rows_of(
            ranks_ptr, starts_ptr, adapter, max_rank, num_rows, a_adapter_stride, a_row_stride, HAS_RANKS, PACKED
        )
        here = ids == adapter
        owners = tl.max(here.to(tl.int32), 1) > 0
        for step in range(0, tl.cdiv(rank, RANKS)):
            products = _products(
                x_ptr, a_ptr + offset, tokens, owners, step * RANKS + in_step, rank, depth, x_stride, x_depth_stride,
                a_row_stride, a_depth_stride, TOKENS, RANKS, DEPTH, CHUNK, EVEN, ACC, PRECISION,
            )  # fmt: skip
            v = tl.where((here & (of_step == step)[None, :])[:, :, None], products[:, None, :], v)
        adapter = _next_adapter(ids, adapter, group, NUM_GROUPS)
    if SAVE:
        pair = tokens.to(tl.int64)[:, None, None] * top_k + slots[None, :, None]
        row = of_step[None, :, None] * RANKS + in_step[None, None, :]
        saved = (mine & (split == 0))[:, None, None] & (slots < top_k)[None, :, None] & (row < max_rank)
        tl.store(v_ptr + pair * max_rank + row, v, mask=saved)
    if HAS_WEIGHTS or HAS_SCALING:
        coefficients = tl.full((TOKENS, SLOTS), 1, ACC)
        if HAS_WEIGHTS:
            at = tokens.to(tl.int64)[:, None] * weights_token_stride + slots[None, :] * weights_slot_stride
            coefficients = tl.load(weights_ptr + at, mask=ids >= 0, other=0).to(ACC)
        if HAS_SCALING:
            coefficients *= tl.load(scaling_ptr + ids * scaling_stride, mask=ids >= 0, other=0).to(ACC)
        v = v * coefficients[:, :, None]
    end = tl.minimum((split + 1) * columns_per_split, num_columns)
    for first in range(split * columns_per_split, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        sums = tl.zeros((TOKENS, COLUMNS), ACC)
        adapter = _next_adapter(ids, -1, group, NUM_GROUPS)
        while adapter < _PAST:
            rank, offset = _rows_of(
                ranks_ptr, starts_ptr, adapter, max_rank, num_rows, b_adapter_stride, b_row_stride, HAS_RANKS, PACKED
            )
            here = ids == adapter
            owners = tl.max(here.to(tl.int32), 1) > 0
            part = tl.zeros((TOKENS, COLUMNS), ACC)
            for step in range(0, tl.cdiv(rank, RANKS)):
                picked = here & (of_step == step)[None, :]
                of_rows = tl.sum(tl.where(picked[:, :, None], v, 0), 1)
                part = _add_rows(
                    of_rows, b_ptr + offset, step * RANKS + in_step, columns, rank, num_columns, b_row_stride,
                    b_column_stride, part, ACC, PRECISION_OUT,
                )  # fmt: skip
            sums = tl.where(owners[:, None], sums + part, sums)  # zero times another's infinite row is NaN
            adapter = _next_adapter(ids, adapter, group, NUM_GROUPS)
        _store_rows(
            sums, highest >= 0, mine, base_ptr, out_ptr, tokens, columns, num_columns, base_stride,
            base_column_stride, HAS_BASE, ACC,
        )  # fmt: skip


@triton.jit
def _lora_shrink_kernel(
    x_ptr,  # [num_tokens, depth]
    a_ptr,  # [num_adapters, max_rank, depth], or packed [num_rows, depth]
    starts_ptr,  # [num_adapters]
    ranks_ptr,  # [num_adapters]
    ids_ptr,  # [num_tokens, top_k]
    v_ptr,  # [num_tokens, top_k, max_rank], zero
    num_tokens, num_adapters, num_rows, top_k, max_rank, depth, x_stride, x_depth_stride, a_adapter_stride,
    a_row_stride, a_depth_stride, ids_token_stride, ids_slot_stride,
    HAS_RANKS: tl.constexpr, PACKED: tl.constexpr, NUM_GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,  # top_k, rounded up to a power of 2
    TOKENS: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """v[t, k] = A_e x[t]. One program for a tile of tokens and a group of adapters."""
    group = tl.program_id(1)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slots, in_step = tl.arange(0, SLOTS), tl.arange(0, RANKS)
    ids = _load_ids(
        ids_ptr, ranks_ptr, tokens, slots, num_tokens, top_k, num_adapters, ids_token_stride, ids_slot_stride, HAS_RANKS
    )
    pairs = tokens.to(tl.int64)[:, None] * top_k + slots[None, :]
    adapter = _next_adapter(ids, -1, group, NUM_GROUPS)
    while adapter < _PAST:
        rank, offset = _rows_of(
            ranks_ptr, starts_ptr, adapter, max_rank, num_rows, a_adapter_stride, a_row_stride, HAS_RANKS, PACKED
        )
        here = ids == adapter
        owners = tl.max(here.to(tl.int32), 1) > 0
        for step in range(0, tl.cdiv(rank, RANKS)):
            rows = step * RANKS + in_step
            products = _products(
                x_ptr, a_ptr + offset, tokens, owners, rows, rank, depth, x_stride, x_depth_stride, a_row_stride,
                a_depth_stride, TOKENS, RANKS, DEPTH, CHUNK, EVEN, ACC, PRECISION,
            )  # fmt: skip
            of_slots = tl.broadcast_to(products[:, None, :], (TOKENS, SLOTS, RANKS))
            v_ptrs = v_ptr + pairs[:, :, None] * max_rank + rows[None, None, :]
            tl.store(v_ptrs, of_slots, mask=here[:, :, None] & (rows < rank)[None, None, :])
        adapter = _next_adapter(ids, adapter, group, NUM_GROUPS)


@triton.jit
def _lora_expand_kernel(
    v_ptr,  # [num_tokens, top_k, max_rank]
    b_ptr,  # [num_adapters, max_rank, num_columns], or packed [num_rows, num_columns]
    starts_ptr,  # [num_adapters]
    ranks_ptr,  # [num_adapters]
    ids_ptr,  # [num_tokens, top_k]
    weights_ptr,  # [num_tokens, top_k]
    scaling_ptr,  # [num_adapters]
    base_ptr,  # [num_tokens, num_columns]
    out_ptr,  # [num_tokens, num_columns]
    num_tokens, num_adapters, num_rows, top_k, max_rank, num_columns, b_adapter_stride, b_row_stride,
    b_column_stride, ids_token_stride, ids_slot_stride, weights_token_stride, weights_slot_stride, scaling_stride,
    base_stride, base_column_stride,
    HAS_RANKS: tl.constexpr, PACKED: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_SCALING: tl.constexpr,
    HAS_BASE: tl.constexpr, NUM_GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,  # top_k, rounded up to a power of 2
    TOKENS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr, PRECISION_OUT: tl.constexpr,
):  # fmt: skip
    """out[t] = base[t] + sum_k w * s * B_e v[t, k]. One program for a tile, a group of adapters, a block of columns."""
    group = tl.program_id(1)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    slots, in_step = tl.arange(0, SLOTS), tl.arange(0, RANKS)
    ids = _load_ids(
        ids_ptr, ranks_ptr, tokens, slots, num_tokens, top_k, num_adapters, ids_token_stride, ids_slot_stride, HAS_RANKS
    )
    highest = tl.max(ids, 1)
    mine = (tokens < num_tokens) & (tl.maximum(highest, 0) % NUM_GROUPS == group)
    if tl.max(mine.to(tl.int32), 0) == 0:
        return
    coefficients = tl.full((TOKENS, SLOTS), 1, ACC)
    if HAS_WEIGHTS:
        at = tokens.to(tl.int64)[:, None] * weights_token_stride + slots[None, :] * weights_slot_stride
        coefficients = tl.load(weights_ptr + at, mask=ids >= 0, other=0).to(ACC)
    if HAS_SCALING:
        coefficients *= tl.load(scaling_ptr + ids * scaling_stride, mask=ids >= 0, other=0).to(ACC)
    pairs = tokens.to(tl.int64)[:, None] * top_k + slots[None, :]
    sums = tl.zeros((TOKENS, COLUMNS), ACC)
    adapter = _next_adapter(ids, -1, group, NUM_GROUPS)
    while adapter < _PAST:
        rank, offset = _rows_of(
            ranks_ptr, starts_ptr, adapter, max_rank, num_rows, b_adapter_stride, b_row_stride, HAS_RANKS, PACKED
        )
        here = ids == adapter
        owners = tl.max(here.to(tl.int32), 1) > 0
        part = tl.zeros((TOKENS, COLUMNS), ACC)
        for step in range(0, tl.cdiv(rank, RANKS)):
            rows = step * RANKS + in_step
            v_ptrs = v_ptr + pairs[:, :, None] * max_rank + rows[None, None, :]
            v = tl.load(v_ptrs, mask=here[:, :, None] & (rows < rank)[None, None, :], other=0)
            # slots of other adapters hold zeros, which an infinite coefficient must not meet
            of_rows = tl.sum(tl.where(here[:, :, None], v * coefficients[:, :, None], 0), 1)
            part = _add_rows(
                of_rows, b_ptr + offset, rows, columns, rank, num_columns, b_row_stride, b_column_stride, part, ACC,
                PRECISION_OUT,
            )  # fmt: skip
        sums = tl.where(owners[:, None], sums + part, sums)
        adapter = _next_adapter(ids, adapter, group, NUM_GROUPS)
    _store_rows(
        sums, highest >= 0, mine, base_ptr, out_ptr, tokens, columns, num_columns, base_stride, base_column_stride,
        HAS_BASE, ACC,
    )  # fmt: skip


@triton.jit
def _lora_factor_grad_kernel(
    v_ptr,  # [num_tokens, top_k, max_rank]
    x_ptr,  # [num_tokens, num_columns]
    starts_ptr,  # [num_adapters]
    ranks_ptr,  # [num_adapters]
    ids_ptr,  # [num_tokens, top_k]
    grad_ptr,  # [num_adapters, max_rank, num_columns], or packed [num_rows, num_columns]: zero
    num_tokens, num_adapters, num_rows, top_k, max_rank, num_columns, x_stride, x_column_stride, grad_adapter_stride,
    grad_row_stride, ids_token_stride, ids_slot_stride,
    HAS_RANKS: tl.constexpr, PACKED: tl.constexpr,
    SLOTS: tl.constexpr,  # top_k, rounded up to a power of 2
    TOKENS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr, PRECISION_OUT: tl.constexpr,
):  # fmt: skip
    """grad[row j of e] = sum over e's pairs, in order, of v[t, k, j] * x[t]. One program for a block of e's rows."""
    adapter, step = tl.program_id(1), tl.program_id(2)
    rank, offset = _rows_of(
        ranks_ptr, starts_ptr, adapter, max_rank, num_rows, grad_adapter_stride, grad_row_stride, HAS_RANKS, PACKED
    )
    if step * RANKS >= rank:
        return
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    slots, rows = tl.arange(0, SLOTS), step * RANKS + tl.arange(0, RANKS)
    c_inside, r_inside = columns < num_columns, rows < rank
    total = tl.zeros((RANKS, COLUMNS), ACC)
    for first in range(0, num_tokens, TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        ids = _load_ids(
            ids_ptr, ranks_ptr, tokens, slots, num_tokens, top_k, num_adapters, ids_token_stride, ids_slot_stride, False
        )
        here = ids == adapter
        owners = tl.max(here.to(tl.int32), 1)
        if tl.max(owners, 0) > 0:
            pairs = tokens.to(tl.int64)[:, None] * top_k + slots[None, :]
            v_ptrs = v_ptr + pairs[:, :, None] * max_rank + rows[None, None, :]
            v = tl.sum(tl.load(v_ptrs, mask=here[:, :, None] & r_inside[None, None, :], other=0), 1)
            x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * x_stride + columns.to(tl.int64)[None, :] * x_column_stride
            x = tl.load(x_ptrs, mask=(owners > 0)[:, None] & c_inside[None, :], other=0).to(ACC)
            # each tile's sum joins the total by itself: errors grow with the tiles
            total += tl.dot(tl.trans(v), x, input_precision=PRECISION_OUT, out_dtype=ACC)
    grad_ptrs = grad_ptr + offset + rows.to(tl.int64)[:, None] * grad_row_stride + columns[None, :]
    tl.store(grad_ptrs, total.to(grad_ptr.dtype.element_ty), mask=r_inside[:, None] & c_inside[None, :])


@triton.jit
def _lora_dropout_kernel(
    x_ptr,  # [num_tokens, length]
    seed_ptr,
    out_ptr,  # [num_tokens, length]
    length, x_stride, x_column_stride,
    BELOW: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = x, or zero where the element's random word is less than BELOW."""
    token, first = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * COLUMNS
    words = random_bits(tl.load(seed_ptr), token, first, COLUMNS)
    columns = first + tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + token * x_stride + columns * x_column_stride, mask=columns < length)
    out = tl.where(words < tl.full((), BELOW, tl.uint32), 0, x)
    tl.store(out_ptr + token * length + columns, out, mask=columns < length)


class _Plan(NamedTuple):
    """How a batch is cut; none of it changes a bit of a token."""

    tokens: int  # of a tile
    columns: int  # of a block
    depth: int  # of a step
    groups: int  # of adapters, each a program of its own
    splits: int  # of the columns; each multiplies with A again
    num_warps: int


def _plan(
    num_tokens: int, num_adapters: int, top_k: int, depth: int, num_columns: int, dtype: torch.dtype, slots: int
) -> _Plan:
    """16 tokens a tile for few of them; 64 for a batch that is then one tile and reads its adapters once; 32 beyond.

    Two warps multiply 64 rows: with four, Hopper and Blackwell take other instructions, of whose order of sums nothing
    is promised. float32 has no tensor cores: 64 rows of it spill registers.
    """
    one_tile = num_tokens <= 64 and dtype.itemsize == 2
    tokens = 16 if num_tokens <= 16 or (top_k > 1 and num_tokens <= 1024) else 64 if one_tile else 32
    while tokens > 16 and tokens * slots * RANKS > 8192:
        tokens //= 2
    columns = power_of_2(num_columns, 16, 2048 // tokens)
    groups = min(num_adapters, MAX_GROUPS) if top_k == 1 else 1
    # no run on a GPU has said when reading A again is cheaper than few programs
    splits = max(1, min(8 // (triton.cdiv(num_tokens, tokens) * groups), triton.cdiv(num_columns, columns)))
    step = power_of_2(depth, 16, 128 // dtype.itemsize)
    return _Plan(tokens, columns, step, groups, splits, 2 if tokens == 64 else 4)


def _factor(factor: Tensor, rank_starts: Tensor | None) -> tuple[int, int, tuple[int, int, int]]:
    """num_adapters, num_rows (of an adapter, where they are stacked) and the strides of adapter, row and element."""
    if factor.dim() == 3:
        return factor.shape[0], factor.shape[1], factor.stride()
    return rank_starts.shape[0], factor.shape[0], (0, *factor.stride())


def _tables(like: Tensor, rank_starts: Tensor | None, ranks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tables of int32 side by side; any pointer for one that is not read."""
    return tuple(like if table is None else table.contiguous() for table in (rank_starts, ranks))


def _out_precision(dtype: torch.dtype) -> str:
    """How float32 sums are multiplied with a factor's rows: with 16-bit rows, from three parts of 11 bits, so that they
    are not rounded to 16 bits first; three steps of a tensor core instead of 16 of the other units."""
    return "tf32x3" if dtype.itemsize == 2 else dot_precision()


def _pairs(adapter_weights: Tensor | None, scaling: Tensor | None, like: Tensor) -> tuple[tuple, tuple, dict]:
    """Pointers, strides and flags of a pair's weights and an adapter's scaling."""
    pointers = (like if adapter_weights is None else adapter_weights, like if scaling is None else scaling)
    strides = (0, 0) if adapter_weights is None else adapter_weights.stride()
    strides = (*strides, 0 if scaling is None else scaling.stride(0))
    return pointers, strides, dict(HAS_WEIGHTS=adapter_weights is not None, HAS_SCALING=scaling is not None)


def _routed_lora(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    rank_starts: Tensor | None,
    ranks: Tensor | None,
    adapter_ids: Tensor,
    adapter_weights: Tensor | None,
    scaling: Tensor | None,
    base: Tensor | None,
    max_rank: int,
    save: bool,
) -> tuple[Tensor, Tensor]:
    num_tokens, top_k = adapter_ids.shape
    depth, num_columns = x.shape[1], lora_b.shape[-1]
    num_adapters, num_rows, a_strides = _factor(lora_a, rank_starts)
    steps = triton.cdiv(max_rank, RANKS)
    if num_adapters * steps * top_k == 0 or depth == 0:  # nothing is added
        v = _new_products(x, num_tokens, top_k, max_rank if save else 0).zero_()
        return (x.new_zeros((num_tokens, num_columns)) if base is None else base.clone()), v
    slots = triton.next_power_of_2(top_k * steps)
    if slots > MAX_ON_CHIP:
        v = _lora_shrink(x, lora_a, rank_starts, ranks, adapter_ids, max_rank)
        out = _lora_expand(v, lora_b, rank_starts, ranks, adapter_ids, adapter_weights, scaling, base)
        return out, v if save else v.new_empty((num_tokens, top_k, 0))
    out = x.new_empty((num_tokens, num_columns))
    v = _new_products(x, num_tokens, top_k, max_rank if save else 0)
    if num_tokens == 0 or (num_columns == 0 and not save):
        return out, v
    plan = _plan(num_tokens, num_adapters, top_k, depth, num_columns, x.dtype, slots)
    pointers, strides, flags = _pairs(adapter_weights, scaling, x)
    base_strides = (0, 0) if base is None else base.stride()
    per_split = triton.cdiv(triton.cdiv(num_columns, plan.columns), plan.splits) * plan.columns
    with torch.cuda.device_of(x):
        _routed_lora_kernel[(triton.cdiv(num_tokens, plan.tokens), plan.groups, plan.splits)](
            x, lora_a, lora_b, *_tables(x, rank_starts, ranks), adapter_ids, *pointers, x if base is None else base,
            out, v, num_tokens, num_adapters, num_rows, top_k, max_rank, depth, num_columns, per_split, *x.stride(),
            *a_strides, *_factor(lora_b, rank_starts)[2], *adapter_ids.stride(), *strides, *base_strides,
            HAS_RANKS=ranks is not None, PACKED=rank_starts is not None, **flags, HAS_BASE=base is not None, SAVE=save,
            NUM_GROUPS=plan.groups, SLOTS=slots, STEPS=steps, TOKENS=plan.tokens, RANKS=RANKS, COLUMNS=plan.columns,
            DEPTH=plan.depth, CHUNK=chunk_of(x.dtype), EVEN=depth % plan.depth == 0, ACC=acc_dtype(x),
            PRECISION=dot_precision(), PRECISION_OUT=_out_precision(x.dtype), num_warps=plan.num_warps,
        )  # fmt: skip
    return out, v


def _lora_shrink(
    x: Tensor, factor: Tensor, rank_starts: Tensor | None, ranks: Tensor | None, adapter_ids: Tensor, max_rank: int
) -> Tensor:
    num_tokens, top_k = adapter_ids.shape
    num_adapters, num_rows, strides = _factor(factor, rank_starts)
    v = _new_products(x, num_tokens, top_k, max_rank).zero_()
    if v.numel() > 0 and num_adapters > 0 and x.shape[1] > 0:
        slots = triton.next_power_of_2(top_k)
        plan = _plan(num_tokens, num_adapters, top_k, x.shape[1], 1, x.dtype, slots)
        groups = min(num_adapters, MAX_GROUPS)  # no sum goes over a token's adapters
        with torch.cuda.device_of(x):
            _lora_shrink_kernel[(triton.cdiv(num_tokens, plan.tokens), groups)](
                x, factor, *_tables(x, rank_starts, ranks), adapter_ids, v, num_tokens, num_adapters, num_rows, top_k,
                max_rank, x.shape[1], *x.stride(), *strides, *adapter_ids.stride(), HAS_RANKS=ranks is not None,
                PACKED=rank_starts is not None, NUM_GROUPS=groups, SLOTS=slots, TOKENS=plan.tokens, RANKS=RANKS,
                DEPTH=plan.depth, CHUNK=chunk_of(x.dtype), EVEN=x.shape[1] % plan.depth == 0, ACC=acc_dtype(x),
                PRECISION=dot_precision(), num_warps=plan.num_warps,
            )  # fmt: skip
    return v


def _lora_expand(
    v: Tensor,
    factor: Tensor,
    rank_starts: Tensor | None,
    ranks: Tensor | None,
    adapter_ids: Tensor,
    adapter_weights: Tensor | None,
    scaling: Tensor | None,
    base: Tensor | None,
) -> Tensor:
    v = v.contiguous()
    num_tokens, top_k, max_rank = v.shape
    num_adapters, num_rows, strides = _factor(factor, rank_starts)
    num_columns = factor.shape[-1]
    if num_adapters == 0 or v.numel() == 0:
        return factor.new_zeros((num_tokens, num_columns)) if base is None else base.clone()
    out = factor.new_empty((num_tokens, num_columns))
    if out.numel() > 0:
        slots = triton.next_power_of_2(top_k)
        plan = _plan(num_tokens, num_adapters, top_k, 1, num_columns, factor.dtype, slots)
        pointers, pair_strides, flags = _pairs(adapter_weights, scaling, v)
        base_strides = (0, 0) if base is None else base.stride()
        grid = (triton.cdiv(num_tokens, plan.tokens), plan.groups, triton.cdiv(num_columns, plan.columns))
        with torch.cuda.device_of(v):
            _lora_expand_kernel[grid](
                v, factor, *_tables(v, rank_starts, ranks), adapter_ids, *pointers, out if base is None else base, out,
                num_tokens, num_adapters, num_rows, top_k, max_rank, num_columns, *strides, *adapter_ids.stride(),
                *pair_strides, *base_strides, HAS_RANKS=ranks is not None, PACKED=rank_starts is not None, **flags,
                HAS_BASE=base is not None, NUM_GROUPS=plan.groups, SLOTS=slots, TOKENS=plan.tokens, RANKS=RANKS,
                COLUMNS=plan.columns, ACC=acc_dtype(factor), PRECISION_OUT=_out_precision(factor.dtype),
                num_warps=plan.num_warps,
            )  # fmt: skip
    return out


def _lora_factor_grad(
    v: Tensor,
    x: Tensor,
    rank_starts: Tensor | None,
    ranks: Tensor | None,
    adapter_ids: Tensor,
    num_adapters: int,
    num_rows: int | None,
) -> Tensor:
    v = v.contiguous()
    num_tokens, top_k, max_rank = v.shape
    num_columns = x.shape[1]
    grad = x.new_zeros((num_adapters, max_rank, num_columns) if num_rows is None else (num_rows, num_columns))
    if grad.numel() > 0 and v.numel() > 0 and num_adapters > 0:
        _, rows, strides = _factor(grad, rank_starts)
        columns = power_of_2(num_columns, 16, GRAD_COLUMNS)
        with torch.cuda.device_of(v):
            _lora_factor_grad_kernel[(triton.cdiv(num_columns, columns), num_adapters, triton.cdiv(max_rank, RANKS))](
                v, x, *_tables(v, rank_starts, ranks), adapter_ids, grad, num_tokens, num_adapters, rows, top_k,
                max_rank, num_columns, *x.stride(), *strides[:2], *adapter_ids.stride(), HAS_RANKS=ranks is not None,
                PACKED=rank_starts is not None, SLOTS=triton.next_power_of_2(top_k), TOKENS=GRAD_TOKENS, RANKS=RANKS,
                COLUMNS=columns, ACC=acc_dtype(x), PRECISION_OUT=_out_precision(x.dtype),
            )  # fmt: skip
    return grad


def _lora_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    if out.numel() > 0:
        columns = power_of_2(x.shape[1], 4, DROPOUT_COLUMNS)
        with torch.cuda.device_of(x):
            _lora_dropout_kernel[(x.shape[0], triton.cdiv(x.shape[1], columns))](
                x, seed, out, x.shape[1], *x.stride(), int(p * 2**32), columns
            )
    return out


def _new_products(x: Tensor, num_tokens: int, top_k: int, max_rank: int) -> Tensor:
    return x.new_empty((num_tokens, top_k, max_rank), dtype=accumulator(x.dtype))


lora_dropout = opaque("lora_dropout", _lora_dropout)
routed_lora = opaque("routed_lora", _routed_lora)
lora_shrink = opaque("lora_shrink", _lora_shrink)
lora_expand = opaque("lora_expand", _lora_expand)
lora_factor_grad = opaque("lora_factor_grad", _lora_factor_grad)
