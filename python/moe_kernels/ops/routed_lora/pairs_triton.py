"""Whose adapters' pairs a program takes, and where an adapter's rows lie: what the kernels of triton.py share."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.ops.grouped_gemm.tiles import num_tiles
from moe_kernels.ops.grouped_gemm.triton import block_experts, find_tile
from moe_kernels.ops.permute.triton import plan_dispatch

FEW_PAIRS = 512  # whose adapters each program looks up by itself
PAST = tl.constexpr(0x7FFFFFFF)  # behind every adapter


@triton.jit
def tile_of_pairs(
    ids_ptr,  # [num_tokens, top_k]
    offsets_ptr,  # [num_adapters + 2]
    pairs_ptr,  # [num_pairs]
    num_pairs, num_adapters, top_k, token_stride, slot_stride,
    FEW: tl.constexpr,  # num_pairs, rounded up to a power of 2; 0: they are many, and sorted
    ADAPTERS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """This program's adapter and a tile of its pairs; num_pairs stands where there are no more.

    Pairs without adapter are those of adapter num_adapters.
    """
    if FEW == 0:
        adapter, first, end, _ = find_tile(offsets_ptr, num_adapters + 1, num_pairs, 1, ADAPTERS, TILE, 1)
        places = first + tl.arange(0, TILE)
        return adapter, tl.load(pairs_ptr + places, mask=places < end, other=num_pairs)
    else:
        adapter, first = tl.program_id(0), tl.program_id(1) * TILE
        pairs = tl.arange(0, FEW)
        at = (pairs // top_k).to(tl.int64) * token_stride + (pairs % top_k).to(tl.int64) * slot_stride
        ids = tl.load(ids_ptr + at, mask=pairs < num_pairs, other=-1)
        ids = tl.where((ids >= 0) & (ids < num_adapters), ids, num_adapters)
        here = (ids == adapter) & (pairs < num_pairs)
        tile = tl.zeros((TILE,), tl.int32) + num_pairs
        if tl.sum(here.to(tl.int32), 0) > first:
            places = tl.cumsum(here.to(tl.int32), 0) - 1 - first
            chosen = here[None, :] & (places[None, :] == tl.arange(0, TILE)[:, None])
            tile = tl.min(tl.where(chosen, pairs[None, :], num_pairs), 1)
        return adapter, tile


@triton.jit
def load_ids(
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
def next_adapter(ids, after):
    """The first adapter behind ``after``, or PAST."""
    return tl.min(tl.min(tl.where(ids > after, ids, PAST), 1), 0)


@triton.jit
def rows_of(
    ranks_ptr, starts_ptr, adapter, num_adapters, max_rank, num_rows, adapter_stride, row_stride,
    HAS_RANKS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """An adapter's rank, and where its first row lies in a factor."""
    there = adapter < num_adapters
    rank = tl.where(there, tl.minimum(max_rank, num_rows), 0)
    offset = adapter.to(tl.int64) * adapter_stride
    if HAS_RANKS:
        rank = tl.minimum(rank, tl.load(ranks_ptr + adapter, mask=there, other=0))
    if PACKED:
        start = tl.load(starts_ptr + adapter, mask=there, other=0)
        rank = tl.where(start >= 0, tl.minimum(rank, num_rows - start), 0)
        offset = start.to(tl.int64) * row_stride
    return rank, offset


class Pairs(NamedTuple):
    """Where programs find an adapter's pairs, and how many programs there are in two dimensions."""

    grid: tuple[int, int]
    offsets: Tensor
    pairs: Tensor
    constants: dict


def pairs_by_adapter(adapter_ids: Tensor, num_adapters: int, tile: int) -> Pairs:
    num_pairs = adapter_ids.numel()
    if num_pairs <= FEW_PAIRS:
        constants = dict(FEW=triton.next_power_of_2(num_pairs), ADAPTERS=1, TILE=tile)
        return Pairs((num_adapters + 1, triton.cdiv(num_pairs, tile)), adapter_ids, adapter_ids, constants)
    known = (adapter_ids >= 0) & (adapter_ids < num_adapters)
    ids = torch.where(known, adapter_ids, num_adapters).int().reshape(-1, 1)
    offsets, pairs, _ = plan_dispatch(ids, num_adapters + 1)
    constants = dict(FEW=0, ADAPTERS=block_experts(num_adapters + 1), TILE=tile)
    return Pairs((num_tiles(num_pairs, num_adapters + 1, tile), 1), offsets, pairs, constants)


def factor_of(factor: Tensor, rank_starts: Tensor | None) -> tuple[int, int, tuple[int, int, int]]:
    """num_adapters, num_rows (of an adapter, where they are stacked) and the strides of adapter, row and element."""
    if factor.dim() == 3:
        return factor.shape[0], factor.shape[1], factor.stride()
    return rank_starts.shape[0], factor.shape[0], (0, *factor.stride())


def tables(like: Tensor, rank_starts: Tensor | None, ranks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tables of int32 side by side; any pointer for one that is not read."""
    return tuple(like if table is None else table.contiguous() for table in (rank_starts, ranks))
