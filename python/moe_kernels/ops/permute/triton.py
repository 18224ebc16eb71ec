"""Triton kernels of token permutation, under the names of the compiled ops (native.py).

Sums run in float32 (float64 for float64) in the order of k. No atomics; launches and workspace depend on shapes alone,
so all of it can be captured into a CUDA graph. An index outside its tensor gives zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 256  # pairs that one program ranks by comparing each with each
CHUNK = 32
BLOCK_EXPERTS = 128
SCAN_TILES, SCAN_EXPERTS = 64, 16  # of one step of the scan
MAX_BLOCK_HIDDEN = 2048  # columns of one program


@triton.jit
def _expert_of(ids_ptr, pairs, num_pairs, num_experts, top_k, token_stride, slot_stride):
    """Experts of ``pairs``, or -1 where a pair is skipped."""
    tokens = pairs // top_k
    at = tokens.to(tl.int64) * token_stride + (pairs - tokens * top_k).to(tl.int64) * slot_stride
    ids = tl.load(ids_ptr + at, mask=pairs < num_pairs, other=-1)
    return tl.where((ids >= 0) & (ids < num_experts), ids, -1).to(tl.int32)


@triton.jit
def _plan_count_kernel(
    ids_ptr,  # [num_tokens, top_k], any strides
    tile_rows_ptr,  # [num_tiles, num_experts]
    num_pairs,
    num_experts,
    top_k,
    token_stride,
    slot_stride,
    TILE: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    """tile_rows[tile, e] = pairs of expert e in the tile. One program for each tile and block of experts."""
    tile = tl.program_id(0)
    experts = tl.program_id(1) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    pairs = tile * TILE + tl.arange(0, TILE)
    ids = _expert_of(ids_ptr, pairs, num_pairs, num_experts, top_k, token_stride, slot_stride)
    counts = tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), axis=0)
    tl.store(tile_rows_ptr + tile.to(tl.int64) * num_experts + experts, counts, mask=experts < num_experts)


@triton.jit
def _plan_scan_kernel(
    tile_rows_ptr,  # [num_tiles, num_experts]: counts in; out: the expert's pairs in the tiles before
    counts_ptr,  # [num_experts]
    num_tiles,
    num_experts,
    BLOCK_TILES: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    """Running counts of each expert over the tiles. One program for a block of experts, many tiles at a time."""
    experts = tl.program_id(0) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    inside = experts < num_experts
    before = tl.zeros((BLOCK_EXPERTS,), tl.int32)
    for first in range(0, num_tiles, BLOCK_TILES):
        tiles = first + tl.arange(0, BLOCK_TILES)
        at = tile_rows_ptr + tiles.to(tl.int64)[:, None] * num_experts + experts[None, :]
        known = (tiles < num_tiles)[:, None] & inside[None, :]
        in_tile = tl.load(at, mask=known, other=0)
        tl.store(at, before[None, :] + tl.cumsum(in_tile, 0) - in_tile, mask=known)
        before += tl.sum(in_tile, 0)
    tl.store(counts_ptr + experts, before, mask=inside)


@triton.jit
def _plan_offsets_kernel(
    offsets_ptr,  # [num_experts + 1]: in: counts, from the second on
    num_experts,
    BLOCK_EXPERTS: tl.constexpr,
):
    """Counts to offsets. One program."""
    tl.store(offsets_ptr, 0)
    base = tl.zeros((), tl.int32)
    for first in range(0, num_experts, BLOCK_EXPERTS):
        experts = first + tl.arange(0, BLOCK_EXPERTS)
        counts = tl.load(offsets_ptr + 1 + experts, mask=experts < num_experts, other=0)
        tl.store(offsets_ptr + 1 + experts, base + tl.cumsum(counts, 0), mask=experts < num_experts)
        base += tl.sum(counts, 0)


@triton.jit
def _plan_scatter_kernel(
    ids_ptr,  # [num_tokens, top_k], any strides
    tile_rows_ptr,  # [num_tiles, num_experts]
    offsets_ptr,  # [num_experts + 1]
    source_rows_ptr,  # [num_pairs]
    permuted_rows_ptr,  # [num_pairs]
    num_pairs,
    num_experts,
    top_k,
    token_stride,
    slot_stride,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Row of each pair = first row of its expert + pairs of the tiles before + its rank. One program for each tile."""
    tile = tl.program_id(0)
    places = tl.arange(0, TILE)
    pairs = tile * TILE + places
    inside = pairs < num_pairs
    ids = _expert_of(ids_ptr, pairs, num_pairs, num_experts, top_k, token_stride, slot_stride)
    ranks = tl.zeros((TILE,), tl.int32)
    # in chunks: each with each at once needs more registers than there are
    for first in range(0, TILE, CHUNK):
        others = first + tl.arange(0, CHUNK)
        other_pairs = tile * TILE + others
        other_ids = _expert_of(ids_ptr, other_pairs, num_pairs, num_experts, top_k, token_stride, slot_stride)
        before = (ids[:, None] == other_ids[None, :]) & (others[None, :] < places[:, None])
        ranks += tl.sum(before.to(tl.int32), axis=1)
    owned = ids >= 0
    rows = tl.load(offsets_ptr + ids, mask=owned, other=0) + ranks
    if not ONE_TILE:
        rows += tl.load(tile_rows_ptr + tile.to(tl.int64) * num_experts + ids, mask=owned, other=0)
    tl.store(permuted_rows_ptr + pairs, tl.where(owned, rows, -1), mask=inside)
    tl.store(source_rows_ptr + rows, pairs // top_k, mask=owned)
    num_permuted = tl.load(offsets_ptr + num_experts)
    tl.store(source_rows_ptr + pairs, tl.full((TILE,), -1, tl.int32), mask=inside & (pairs >= num_permuted))


@triton.jit
def _permute_kernel(
    hidden_states_ptr,  # [num_tokens, hidden_size], rows row_stride apart
    source_rows_ptr,  # [num_rows]
    rows_ptr,  # [num_rows, hidden_size]
    num_tokens,
    hidden_size,
    row_stride,
    BLOCK_HIDDEN: tl.constexpr,
):
    """rows[r] = hidden_states[source_rows[r]]. One program for a block of columns of one row."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    inside = columns < hidden_size
    source = tl.load(source_rows_ptr + row)
    owned = (source >= 0) & (source < num_tokens)
    x = tl.load(hidden_states_ptr + source.to(tl.int64) * row_stride + columns, mask=inside & owned, other=0)
    tl.store(rows_ptr + row.to(tl.int64) * hidden_size + columns, x, mask=inside)


@triton.jit
def _unpermute_kernel(
    rows_ptr,  # [num_rows, hidden_size], rows row_stride apart
    permuted_rows_ptr,  # [num_tokens, top_k]
    weights_ptr,  # [num_tokens, top_k], any strides
    out_ptr,  # [num_tokens, hidden_size]
    num_rows,
    hidden_size,
    row_stride,
    weights_token_stride,
    weights_slot_stride,
    top_k,
    HAS_WEIGHTS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """out[t] = sum_k weights[t, k] * rows[permuted_rows[t, k]]. One program for a block of columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    inside = columns < hidden_size
    sums = tl.zeros((BLOCK_HIDDEN,), ACC)
    for k in range(top_k):
        row = tl.load(permuted_rows_ptr + token * top_k + k)
        owned = (row >= 0) & (row < num_rows)
        x = tl.load(rows_ptr + row.to(tl.int64) * row_stride + columns, mask=inside & owned, other=0).to(ACC)
        if HAS_WEIGHTS:
            at = token * weights_token_stride + tl.cast(k, tl.int64) * weights_slot_stride
            x *= tl.load(weights_ptr + at, mask=owned, other=0).to(ACC)
        sums += x
    tl.store(out_ptr + token * hidden_size + columns, sums.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _unpermute_bwd_kernel(
    grad_out_ptr,  # [num_tokens, hidden_size], rows grad_stride apart
    rows_ptr,  # [num_rows, hidden_size], rows row_stride apart
    weights_ptr,  # [num_tokens, top_k], any strides
    source_rows_ptr,  # [num_rows]
    permuted_rows_ptr,  # [num_tokens, top_k]
    grad_rows_ptr,  # [num_rows, hidden_size]
    grad_weights_ptr,  # [num_tokens, top_k]
    num_rows,
    num_tokens,
    hidden_size,
    grad_stride,
    row_stride,
    weights_token_stride,
    weights_slot_stride,
    top_k,
    ACC: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """One program for each pair (t, k): gradient of its row and weight; zero in row t * top_k + k if nobody owns it."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1).to(tl.int64)
    pair = token * top_k + k
    row = tl.load(permuted_rows_ptr + pair)
    owned = (row >= 0) & (row < num_rows)
    weight = tl.load(weights_ptr + token * weights_token_stride + k * weights_slot_stride, mask=owned, other=0).to(ACC)
    source = tl.load(source_rows_ptr + pair)
    nobodys = (source < 0) | (source >= num_tokens)
    products = tl.zeros((BLOCK_HIDDEN,), ACC)
    for first in range(0, hidden_size, BLOCK_HIDDEN):
        columns = first + tl.arange(0, BLOCK_HIDDEN)
        inside = columns < hidden_size
        grad = tl.load(grad_out_ptr + token * grad_stride + columns, mask=inside & owned, other=0).to(ACC)
        x = tl.load(rows_ptr + row.to(tl.int64) * row_stride + columns, mask=inside & owned, other=0).to(ACC)
        products += grad * x
        scaled = (weight * grad).to(grad_rows_ptr.dtype.element_ty)
        tl.store(grad_rows_ptr + row.to(tl.int64) * hidden_size + columns, scaled, mask=inside & owned)
        zeros = tl.zeros((BLOCK_HIDDEN,), grad_rows_ptr.dtype.element_ty)
        tl.store(grad_rows_ptr + pair * hidden_size + columns, zeros, mask=inside & nobodys)
    tl.store(grad_weights_ptr + pair, tl.sum(products, 0).to(grad_weights_ptr.dtype.element_ty))


def plan_dispatch(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, top_k = topk_ids.shape
    num_pairs = num_tokens * top_k
    num_tiles = triton.cdiv(num_pairs, TILE)
    offsets = topk_ids.new_empty(num_experts + 1, dtype=torch.int32)
    source_rows = topk_ids.new_empty(num_pairs, dtype=torch.int32)
    permuted_rows = topk_ids.new_empty((num_tokens, top_k), dtype=torch.int32)
    if num_pairs == 0 or num_experts == 0:
        return offsets.zero_(), source_rows.fill_(-1), permuted_rows.fill_(-1)
    sizes = (num_pairs, num_experts, top_k, *topk_ids.stride())
    # the counts of one tile are the experts' counts: nothing to scan
    one_tile, counts = num_tiles == 1, offsets[1:]
    tile_rows = counts if one_tile else topk_ids.new_empty((num_tiles, num_experts), dtype=torch.int32)
    with torch.cuda.device_of(topk_ids):
        grid = (num_tiles, triton.cdiv(num_experts, BLOCK_EXPERTS))
        _plan_count_kernel[grid](topk_ids, tile_rows, *sizes, TILE=TILE, BLOCK_EXPERTS=BLOCK_EXPERTS)
        if not one_tile:
            _plan_scan_kernel[(triton.cdiv(num_experts, SCAN_EXPERTS),)](
                tile_rows, counts, num_tiles, num_experts, BLOCK_TILES=SCAN_TILES, BLOCK_EXPERTS=SCAN_EXPERTS
            )
        block = triton.next_power_of_2(min(num_experts, 1024))
        _plan_offsets_kernel[(1,)](offsets, num_experts, BLOCK_EXPERTS=block)
        _plan_scatter_kernel[(num_tiles,)](
            topk_ids, tile_rows, offsets, source_rows, permuted_rows, *sizes, TILE=TILE, CHUNK=CHUNK, ONE_TILE=one_tile
        )
    return offsets, source_rows, permuted_rows


def permute(hidden_states: Tensor, source_rows: Tensor) -> Tensor:
    source_rows = source_rows.contiguous()
    num_rows, hidden_size = source_rows.shape[0], hidden_states.shape[1]
    return permute_into(hidden_states, source_rows, hidden_states.new_empty((num_rows, hidden_size)))


def permute_into(hidden_states: Tensor, source_rows: Tensor, rows: Tensor) -> Tensor:
    """``permute`` where there is memory for the rows already."""
    hidden_states = _contiguous_rows(hidden_states)
    (num_tokens, hidden_size), num_rows = hidden_states.shape, source_rows.shape[0]
    if rows.numel() > 0:
        block = _block_hidden(hidden_size)
        with torch.cuda.device_of(rows):
            _permute_kernel[(num_rows, triton.cdiv(hidden_size, block))](
                hidden_states, source_rows, rows, num_tokens, hidden_size, hidden_states.stride(0), BLOCK_HIDDEN=block
            )
    return rows


def unpermute(rows: Tensor, permuted_rows: Tensor, topk_weights: Tensor | None) -> Tensor:
    rows, permuted_rows = _contiguous_rows(rows), permuted_rows.contiguous()
    num_tokens, top_k = permuted_rows.shape
    num_rows, hidden_size = rows.shape
    out = rows.new_empty((num_tokens, hidden_size))
    if out.numel() > 0:
        block = _block_hidden(hidden_size)
        weights = rows if topk_weights is None else topk_weights  # any pointer: it is not read
        with torch.cuda.device_of(rows):
            _unpermute_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
                rows, permuted_rows, weights, out, num_rows, hidden_size, rows.stride(0), *weights.stride(), top_k,
                HAS_WEIGHTS=topk_weights is not None, ACC=_acc(rows), BLOCK_HIDDEN=block,
            )  # fmt: skip
    return out


def unpermute_backward(
    grad_out: Tensor, rows: Tensor, topk_weights: Tensor, source_rows: Tensor, permuted_rows: Tensor
) -> tuple[Tensor, Tensor]:
    grad_out, rows = _contiguous_rows(grad_out), _contiguous_rows(rows)
    num_tokens, top_k = permuted_rows.shape
    num_rows, hidden_size = rows.shape
    grad_rows = rows.new_empty(rows.shape)
    grad_weights = topk_weights.new_empty(topk_weights.shape)
    if num_rows > 0:
        with torch.cuda.device_of(rows):
            _unpermute_bwd_kernel[(num_tokens, top_k)](
                grad_out, rows, topk_weights, source_rows.contiguous(), permuted_rows.contiguous(), grad_rows,
                grad_weights, num_rows, num_tokens, hidden_size, grad_out.stride(0), rows.stride(0),
                *topk_weights.stride(), top_k, ACC=_acc(rows), BLOCK_HIDDEN=_block_hidden(hidden_size),
            )  # fmt: skip
    return grad_rows, grad_weights


def _contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[1] <= 1 or tensor.stride(1) == 1 else tensor.contiguous()


def _block_hidden(hidden_size: int) -> int:
    return min(MAX_BLOCK_HIDDEN, triton.next_power_of_2(max(hidden_size, 1)))


def _acc(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
