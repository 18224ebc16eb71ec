"""Triton kernels of routed LoRA, under the names of the compiled ops (native.py).

Pairs of one adapter are brought together: a program multiplies a tile of them, whose tokens it gathers, with that
adapter's rows. Which pairs they are it finds among all ids where those are few, and reads from a plan where they are
many. Tokens with several adapters are expanded by tile of tokens, which meets its adapters in rising order, each once.
A row of a product of matrices does not depend on the other rows, so neighbours leave no trace in a token's bits. Sums
run in float32 (float64 for float64) in one order. No atomics. An id or a row outside its tensor adds nothing.
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
from moe_kernels.ops.routed_lora.pairs_triton import (
    PAST,
    factor_of,
    load_ids,
    next_adapter,
    pairs_by_adapter,
    rows_of,
    tables,
    tile_of_pairs,
)

MAX_RANKS = 64  # rows of a factor at a time
GRAD_TOKENS, GRAD_COLUMNS, GRAD_RANKS = 32, 64, 16  # that a program of a factor's gradient adds at a time
DROPOUT_COLUMNS = 1024  # of a program: 8 a thread, 16 bytes of the narrowest


@triton.jit
def _products(
    x_ptr, a_ptr, tokens, owners, rows, rank, depth, x_stride, x_depth_stride, a_row_stride, a_depth_stride,
    TOKENS: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x[t], row j> of the tokens ``owners`` and the rows below ``rank``; nothing to read for the other rows."""
    steps = tl.arange(0, DEPTH)
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * x_stride + steps[None, :] * x_depth_stride
    a_ptrs = a_ptr + rows.to(tl.int64)[None, :] * a_row_stride + steps[:, None] * a_depth_stride
    return multiply(
        x_ptrs, owners, x_depth_stride, a_ptrs, rows < rank, a_depth_stride, depth,
        TOKENS, RANKS, DEPTH, CHUNK, EVEN, ACC, PRECISION,
    )  # fmt: skip


@triton.jit
def _parts(v, DTYPE: tl.constexpr):
    """v as a sum of numbers that tensor cores multiply with rows of DTYPE without rounding: bfloat16 times three of 8
    bits each, float16 times two of 11 and 13. An infinity is its first part alone."""
    if DTYPE == tl.bfloat16:
        high = (v.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        rest = tl.where(tl.abs(v) == float("inf"), 0, v - high)
        middle = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        return high.to(tl.bfloat16), middle.to(tl.bfloat16), (rest - middle).to(tl.bfloat16)
    elif DTYPE == tl.float16:
        high = (v.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        rest = tl.where(tl.abs(v) == float("inf"), 0, v - high)
        return high, rest, rest
    else:
        return v, v, v


@triton.jit
def _add_rows(
    parts,  # of [TOKENS, RANKS]
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
    """sums + v @ rows of a factor, for the parts of v, the smallest first."""
    inside = (rows < rank)[:, None] & (columns < num_columns)[None, :]
    at = rows.to(tl.int64)[:, None] * b_row_stride + columns.to(tl.int64)[None, :] * b_column_stride
    b = tl.load(b_ptr + at, mask=inside, other=0)
    high, middle, low = parts
    if b.dtype == tl.bfloat16:
        sums = tl.dot(low, b, sums, out_dtype=ACC)
        sums = tl.dot(middle, b, sums, out_dtype=ACC)
        return tl.dot(high, b, sums, out_dtype=ACC)
    elif b.dtype == tl.float16:
        wide = b.to(tl.float32)
        sums = tl.dot(middle, wide, sums, input_precision="tf32", out_dtype=ACC)
        return tl.dot(high, wide, sums, input_precision="tf32", out_dtype=ACC)
    else:
        return tl.dot(high, b, sums, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _coefficients(
    weights_ptr, scaling_ptr, tokens, slots, ids, weights_token_stride, weights_slot_stride, scaling_stride,
    HAS_WEIGHTS: tl.constexpr, HAS_SCALING: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """adapter_weights[t, k] * scaling[ids[t, k]] of tokens, slots and ids of one shape; zero for ids below 0."""
    coefficients = tl.where(ids >= 0, tl.full(ids.shape, 1, ACC), 0)
    if HAS_WEIGHTS:
        at = tokens.to(tl.int64) * weights_token_stride + slots.to(tl.int64) * weights_slot_stride
        coefficients = tl.load(weights_ptr + at, mask=ids >= 0, other=0).to(ACC)
    if HAS_SCALING:
        coefficients *= tl.load(scaling_ptr + ids * scaling_stride, mask=ids >= 0, other=0).to(ACC)
    return coefficients


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
    v_ptr,  # [num_tokens, max_rank]
    b_ptr,  # as a with num_columns
    starts_ptr,  # [num_adapters]
    ranks_ptr,  # [num_adapters]
    ids_ptr,  # [num_tokens, 1]
    offsets_ptr, pairs_ptr,
    weights_ptr,  # [num_tokens, 1]
    scaling_ptr,  # [num_adapters]
    base_ptr,  # [num_tokens, num_columns]
    out_ptr,  # [num_tokens, num_columns]
    num_tokens, num_adapters, num_rows, max_rank, depth, num_columns, columns_per_split, x_stride, x_depth_stride,
    a_adapter_stride, a_row_stride, a_depth_stride, b_adapter_stride, b_row_stride, b_column_stride, ids_token_stride,
    weights_token_stride, scaling_stride, base_stride, base_column_stride,
    FEW: tl.constexpr, ADAPTERS: tl.constexpr, HAS_RANKS: tl.constexpr, PACKED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_SCALING: tl.constexpr, HAS_BASE: tl.constexpr,
    HAS_X: tl.constexpr,  # else v is given
    SAVE: tl.constexpr,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,  # max_rank, rounded up to a power of 2
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t] = base[t] + w * s * B_e v[t] with v[t] = A_e x[t], which is saved where it is asked for.

    For tokens of one adapter. One program for a tile of an adapter's tokens and a part of the columns.
    """
    split = tl.program_id(2)
    adapter, tokens = tile_of_pairs(
        ids_ptr, offsets_ptr, pairs_ptr, num_tokens, num_adapters, 1, ids_token_stride, 0, FEW, ADAPTERS, TILE
    )
    mine, rows = tokens < num_tokens, tl.arange(0, RANKS)
    if tl.max(mine.to(tl.int32), 0) == 0:
        return
    rank, b_offset = rows_of(
        ranks_ptr, starts_ptr, adapter, num_adapters, max_rank, num_rows, b_adapter_stride, b_row_stride, HAS_RANKS,
        PACKED,
    )  # fmt: skip
    v_ptrs = v_ptr + tokens.to(tl.int64)[:, None] * max_rank + rows[None, :]
    of_rank = mine[:, None] & (rows < rank)[None, :]
    if HAS_X:
        _, a_offset = rows_of(
            ranks_ptr, starts_ptr, adapter, num_adapters, max_rank, num_rows, a_adapter_stride, a_row_stride, HAS_RANKS,
            PACKED,
        )  # fmt: skip
        v = tl.zeros((TILE, RANKS), ACC)
        if rank > 0:
            v = _products(
                x_ptr, a_ptr + a_offset, tokens, mine, rows, rank, depth, x_stride, x_depth_stride, a_row_stride,
                a_depth_stride, TILE, RANKS, DEPTH, CHUNK, EVEN, ACC, PRECISION,
            )  # fmt: skip
        if SAVE:  # an infinite x times a row that is not there is NaN
            saved = mine[:, None] & (rows < max_rank)[None, :] & (split == 0)
            tl.store(v_ptrs, tl.where(of_rank, v, 0), mask=saved)
    else:
        v = tl.load(v_ptrs, mask=of_rank, other=0)
    coefficients = _coefficients(
        weights_ptr, scaling_ptr, tokens, tokens * 0, tl.where(mine & (rank > 0), adapter, -1), weights_token_stride, 0,
        scaling_stride, HAS_WEIGHTS, HAS_SCALING, ACC,
    )  # fmt: skip
    # past the rank are zeros, which an infinite coefficient must not meet
    parts = _parts(tl.where(of_rank, v * coefficients[:, None], 0), b_ptr.dtype.element_ty)
    end = tl.minimum((split + 1) * columns_per_split, num_columns)
    for first in range(split * columns_per_split, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        sums = _add_rows(
            parts, b_ptr + b_offset, rows, columns, rank, num_columns, b_row_stride, b_column_stride,
            tl.zeros((TILE, COLUMNS), ACC), ACC, PRECISION,
        )  # fmt: skip
        _store_rows(
            sums, mine & (rank > 0), mine, base_ptr, out_ptr, tokens, columns, num_columns, base_stride,
            base_column_stride, HAS_BASE, ACC,
        )  # fmt: skip


@triton.jit
def _lora_shrink_kernel(
    x_ptr,  # [num_tokens, depth]
    a_ptr,  # [num_adapters, max_rank, depth], or packed [num_rows, depth]
    starts_ptr,  # [num_adapters]
    ranks_ptr,  # [num_adapters]
    ids_ptr,  # [num_tokens, top_k]
    offsets_ptr, pairs_ptr,
    v_ptr,  # [num_tokens, top_k, max_rank], zero
    num_pairs, num_adapters, num_rows, top_k, max_rank, depth, x_stride, x_depth_stride, a_adapter_stride,
    a_row_stride, a_depth_stride, ids_token_stride, ids_slot_stride,
    FEW: tl.constexpr, ADAPTERS: tl.constexpr, HAS_RANKS: tl.constexpr, PACKED: tl.constexpr,
    TILE: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """v[t, k] = A_e x[t]. One program for a tile of an adapter's pairs and a block of its rows."""
    adapter, pairs = tile_of_pairs(
        ids_ptr, offsets_ptr, pairs_ptr, num_pairs, num_adapters, top_k, ids_token_stride, ids_slot_stride, FEW,
        ADAPTERS, TILE,
    )  # fmt: skip
    mine, rows = pairs < num_pairs, tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    rank, offset = rows_of(
        ranks_ptr, starts_ptr, adapter, num_adapters, max_rank, num_rows, a_adapter_stride, a_row_stride, HAS_RANKS,
        PACKED,
    )  # fmt: skip
    if (tl.max(mine.to(tl.int32), 0) == 0) | (tl.program_id(2) * RANKS >= rank):
        return
    products = _products(
        x_ptr, a_ptr + offset, pairs // top_k, mine, rows, rank, depth, x_stride, x_depth_stride, a_row_stride,
        a_depth_stride, TILE, RANKS, DEPTH, CHUNK, EVEN, ACC, PRECISION,
    )  # fmt: skip
    v_ptrs = v_ptr + pairs.to(tl.int64)[:, None] * max_rank + rows[None, :]
    tl.store(v_ptrs, products, mask=mine[:, None] & (rows < rank)[None, :])


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
    HAS_BASE: tl.constexpr,
    SLOTS: tl.constexpr,  # top_k, rounded up to a power of 2
    TOKENS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t] = base[t] + sum_k w * s * B_e v[t, k]. One program for a tile of tokens and a block of columns."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slots = tl.arange(0, SLOTS)
    ids = load_ids(
        ids_ptr, ranks_ptr, tokens, slots, num_tokens, top_k, num_adapters, ids_token_stride, ids_slot_stride, HAS_RANKS
    )
    of_slots = tl.broadcast_to(slots[None, :], (TOKENS, SLOTS))
    of_tokens = tl.broadcast_to(tokens[:, None], (TOKENS, SLOTS))
    coefficients = _coefficients(
        weights_ptr, scaling_ptr, of_tokens, of_slots, ids, weights_token_stride, weights_slot_stride, scaling_stride,
        HAS_WEIGHTS, HAS_SCALING, ACC,
    )  # fmt: skip
    pairs = tokens.to(tl.int64)[:, None] * top_k + slots[None, :]
    sums = tl.zeros((TOKENS, COLUMNS), ACC)
    for first in range(0, max_rank, RANKS):
        rows = first + tl.arange(0, RANKS)
        v_ptrs = v_ptr + pairs[:, :, None] * max_rank + rows[None, None, :]
        v = tl.load(v_ptrs, mask=(ids >= 0)[:, :, None] & (rows < max_rank)[None, None, :], other=0)
        v = v * coefficients[:, :, None]
        adapter = next_adapter(ids, -1)
        while adapter < PAST:
            rank, offset = rows_of(
                ranks_ptr, starts_ptr, adapter, num_adapters, max_rank, num_rows, b_adapter_stride, b_row_stride,
                HAS_RANKS, PACKED,
            )  # fmt: skip
            here = ids == adapter
            # not what is past the rank: an infinite coefficient times zero
            of_rows = tl.sum(tl.where(here[:, :, None] & (rows < rank)[None, None, :], v, 0), 1)
            part = _add_rows(
                _parts(of_rows, b_ptr.dtype.element_ty), b_ptr + offset, rows, columns, rank, num_columns, b_row_stride,
                b_column_stride, tl.zeros((TOKENS, COLUMNS), ACC), ACC, PRECISION,
            )  # fmt: skip
            owners = tl.max(here.to(tl.int32), 1) > 0
            sums = tl.where(owners[:, None], sums + part, sums)  # zero times another's infinite row is NaN
            adapter = next_adapter(ids, adapter)
    _store_rows(
        sums, tl.max(ids, 1) >= 0, tokens < num_tokens, base_ptr, out_ptr, tokens, columns, num_columns, base_stride,
        base_column_stride, HAS_BASE, ACC,
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
    TOKENS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad[row j of e] = sum over e's pairs, in order, of v[t, k, j] * x[t]. One program for a block of e's rows."""
    adapter, step = tl.program_id(1), tl.program_id(2)
    rank, offset = rows_of(
        ranks_ptr,
        starts_ptr,
        adapter,
        num_adapters,
        max_rank,
        num_rows,
        grad_adapter_stride,
        grad_row_stride,
        HAS_RANKS,
        PACKED,
    )
    if step * RANKS >= rank:
        return
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    slots, rows = tl.arange(0, SLOTS), step * RANKS + tl.arange(0, RANKS)
    c_inside, r_inside = columns < num_columns, rows < rank
    total = tl.zeros((RANKS, COLUMNS), ACC)
    for first in range(0, num_tokens, TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        ids = load_ids(
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
            total += tl.dot(tl.trans(v), x, input_precision=PRECISION, out_dtype=ACC)
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
    ranks: int  # rows of a factor at a time
    num_warps: int


def _plan(num_rows: int, num_columns: int, max_rank: int, dtype: torch.dtype, slots: int = 1) -> _Plan:
    """For so many rows, of ``slots`` vectors each.

    Two warps multiply 64 rows: with four, Hopper and Blackwell take other instructions, of whose order of sums nothing
    is promised. float32 has no tensor cores: 64 rows of it spill registers.
    """
    ranks = power_of_2(max_rank, 16, MAX_RANKS)
    most = (2048 if dtype.itemsize == 2 else 512) // ranks // slots
    tokens = power_of_2(num_rows, 16, max(16, min(most, 64)))
    columns = power_of_2(num_columns, 16, 4096 // tokens if dtype.itemsize == 2 else 1024 // tokens)
    return _Plan(tokens, columns, ranks, 2 if tokens == 64 else 4)


def _weights(adapter_weights: Tensor | None, scaling: Tensor | None, like: Tensor) -> tuple[tuple, tuple, dict]:
    """Pointers, strides and flags of a pair's weights and an adapter's scaling."""
    pointers = (like if adapter_weights is None else adapter_weights, like if scaling is None else scaling)
    strides = (0, 0) if adapter_weights is None else adapter_weights.stride()
    strides = (*strides, 0 if scaling is None else scaling.stride(0))
    return pointers, strides, dict(HAS_WEIGHTS=adapter_weights is not None, HAS_SCALING=scaling is not None)


def _one_adapter_each(
    x: Tensor | None,
    lora_a: Tensor | None,
    v: Tensor,
    lora_b: Tensor,
    rank_starts: Tensor | None,
    ranks: Tensor | None,
    adapter_ids: Tensor,
    adapter_weights: Tensor | None,
    scaling: Tensor | None,
    base: Tensor | None,
    max_rank: int,
    save: bool,
) -> Tensor:
    """Launches _routed_lora_kernel: on x, or on v where x is None."""
    num_tokens, num_columns = adapter_ids.shape[0], lora_b.shape[-1]
    depth, like = (1, v) if x is None else (x.shape[1], x)
    num_adapters, num_rows, b_strides = factor_of(lora_b, rank_starts)
    a_strides = (0, 0, 0) if x is None else factor_of(lora_a, rank_starts)[2]
    out = lora_b.new_empty((num_tokens, num_columns))
    plan = _plan(2 * num_tokens // num_adapters, num_columns, max_rank, lora_b.dtype)
    pairs = pairs_by_adapter(adapter_ids, num_adapters, plan.tokens)
    pointers, strides, flags = _weights(adapter_weights, scaling, like)
    blocks = triton.cdiv(num_columns, plan.columns)
    # no run on a GPU has said when reading A again is cheaper than few programs
    splits = max(1, min(8 // (pairs.grid[0] * pairs.grid[1]), blocks) if x is not None else blocks)
    per_split = triton.cdiv(blocks, splits) * plan.columns
    step = power_of_2(depth, 16, 128 // lora_b.dtype.itemsize)
    with torch.cuda.device_of(like):
        _routed_lora_kernel[(*pairs.grid, splits)](
            like, like if x is None else lora_a, v, lora_b, *tables(like, rank_starts, ranks), adapter_ids,
            pairs.offsets, pairs.pairs, *pointers, like if base is None else base, out, num_tokens, num_adapters,
            num_rows, max_rank, depth, num_columns, per_split, *like.stride()[:2], *a_strides, *b_strides,
            adapter_ids.stride(0), strides[0], strides[2], *((0, 0) if base is None else base.stride()),
            **pairs.constants, HAS_RANKS=ranks is not None, PACKED=rank_starts is not None, **flags,
            HAS_BASE=base is not None, HAS_X=x is not None, SAVE=save, RANKS=plan.ranks, COLUMNS=plan.columns,
            DEPTH=step, CHUNK=chunk_of(lora_b.dtype), EVEN=depth % step == 0, ACC=acc_dtype(lora_b),
            PRECISION=dot_precision(), num_warps=plan.num_warps,
        )  # fmt: skip
    return out


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
    routing = (rank_starts, ranks, adapter_ids, adapter_weights, scaling)
    num_adapters, num_rows, _ = factor_of(lora_a, rank_starts)
    empty = 0 in (num_tokens, num_adapters, num_rows, max_rank, x.shape[1], lora_b.shape[-1])
    if top_k != 1 or max_rank > MAX_RANKS or empty:
        v = _lora_shrink(x, lora_a, rank_starts, ranks, adapter_ids, max_rank)
        out = _lora_expand(v, lora_b, *routing, base)
        return out, v if save else v.new_empty((num_tokens, top_k, 0))
    v = _new_products(x, num_tokens, top_k, max_rank if save else 0)
    return _one_adapter_each(x, lora_a, v, lora_b, *routing, base, max_rank, save), v


def _lora_shrink(
    x: Tensor, factor: Tensor, rank_starts: Tensor | None, ranks: Tensor | None, adapter_ids: Tensor, max_rank: int
) -> Tensor:
    num_tokens, top_k = adapter_ids.shape
    num_adapters, num_rows, strides = factor_of(factor, rank_starts)
    v = _new_products(x, num_tokens, top_k, max_rank).zero_()
    if v.numel() > 0 and num_adapters > 0 and x.shape[1] > 0:
        plan = _plan(2 * num_tokens * top_k // num_adapters, 1, max_rank, x.dtype)
        pairs = pairs_by_adapter(adapter_ids, num_adapters, plan.tokens)
        step = power_of_2(x.shape[1], 16, 128 // x.dtype.itemsize)
        with torch.cuda.device_of(x):
            _lora_shrink_kernel[(*pairs.grid, triton.cdiv(max_rank, plan.ranks))](
                x, factor, *tables(x, rank_starts, ranks), adapter_ids, pairs.offsets, pairs.pairs, v,
                num_tokens * top_k, num_adapters, num_rows, top_k, max_rank, x.shape[1], *x.stride(), *strides,
                *adapter_ids.stride(), **pairs.constants, HAS_RANKS=ranks is not None, PACKED=rank_starts is not None,
                RANKS=plan.ranks, DEPTH=step, CHUNK=chunk_of(x.dtype), EVEN=x.shape[1] % step == 0, ACC=acc_dtype(x),
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
    num_adapters, num_rows, strides = factor_of(factor, rank_starts)
    num_columns = factor.shape[-1]
    if num_adapters == 0 or v.numel() == 0:
        return factor.new_zeros((num_tokens, num_columns)) if base is None else base.clone()
    if num_columns == 0:
        return factor.new_empty((num_tokens, num_columns))
    if top_k == 1 and max_rank <= MAX_RANKS:
        routing = (rank_starts, ranks, adapter_ids, adapter_weights, scaling)
        return _one_adapter_each(None, None, v, factor, *routing, base, max_rank, False)
    out = factor.new_empty((num_tokens, num_columns))
    slots = triton.next_power_of_2(top_k)
    plan = _plan(num_tokens, num_columns, max_rank, factor.dtype, slots)
    pointers, pair_strides, flags = _weights(adapter_weights, scaling, v)
    base_strides = (0, 0) if base is None else base.stride()
    grid = (triton.cdiv(num_tokens, plan.tokens), triton.cdiv(num_columns, plan.columns))
    with torch.cuda.device_of(v):
        _lora_expand_kernel[grid](
            v, factor, *tables(v, rank_starts, ranks), adapter_ids, *pointers, out if base is None else base, out,
            num_tokens, num_adapters, num_rows, top_k, max_rank, num_columns, *strides, *adapter_ids.stride(),
            *pair_strides, *base_strides, HAS_RANKS=ranks is not None, PACKED=rank_starts is not None, **flags,
            HAS_BASE=base is not None, SLOTS=slots, TOKENS=plan.tokens, RANKS=plan.ranks,
            COLUMNS=plan.columns, ACC=acc_dtype(factor), PRECISION=dot_precision(), num_warps=plan.num_warps,
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
        _, rows, strides = factor_of(grad, rank_starts)
        columns = power_of_2(num_columns, 16, GRAD_COLUMNS)
        grid = (triton.cdiv(num_columns, columns), num_adapters, triton.cdiv(max_rank, GRAD_RANKS))
        with torch.cuda.device_of(v):
            _lora_factor_grad_kernel[grid](
                v, x, *tables(v, rank_starts, ranks), adapter_ids, grad, num_tokens, num_adapters, rows, top_k,
                max_rank, num_columns, *x.stride(), *strides[:2], *adapter_ids.stride(), HAS_RANKS=ranks is not None,
                PACKED=rank_starts is not None, SLOTS=triton.next_power_of_2(top_k), TOKENS=GRAD_TOKENS,
                RANKS=GRAD_RANKS, COLUMNS=columns, ACC=acc_dtype(x), PRECISION=_grad_precision(x.dtype),
            )  # fmt: skip
    return grad


def _grad_precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied with rows: with 16-bit rows from three parts of 11 bits, so that it is not rounded to
    16 bits first; three steps of a tensor core instead of 16 of the other units."""
    return "tf32x3" if dtype.itemsize == 2 else dot_precision()


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
