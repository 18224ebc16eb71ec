"""The Triton kernel of linear layers with ternary task vectors, forward: W + aT is never made.

A program makes a tile of the output: the product with W, then, for each delta that a token of the tile uses, the
product with its signs, which are unpacked from the planes in registers, 32 bits from one half word or two. Sums run in
float32 (float64 for float64) in one order, so that a token's result does not depend on those beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.ops.grouped_gemm.tiles import plan_tiles
from moe_kernels.ops.grouped_gemm.triton import acc_dtype, capability_of, chunk_of, dot_precision, multiply

GROUP = 64  # elements that share the two words of a plane
STEP = 32  # features at once: half a word, so that signs are made in 32-bit registers; 16 of float32 for occupancy
DELTAS = 8  # of one launch: their planes are parameters of the kernel


@triton.jit
def _half(plane_ptr, bit, wanted, num_groups):
    """[BLOCK_COLUMNS] uint32: the half word that a bit lies in; a plane's two lie together in a group's four."""
    halves = plane_ptr + bit // 64 * 4 + bit // 32 % 2
    return tl.load(halves, mask=wanted & (bit // 64 < num_groups), other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _bits(plane_ptr, bit, num_groups):
    """[BLOCK_COLUMNS] uint32: 32 bits of each row from any bit on."""
    shift = (bit % 32).to(tl.uint32)
    low, high = _half(plane_ptr, bit, bit >= 0, num_groups), _half(plane_ptr, bit + 32, shift > 0, num_groups)
    return (low >> shift) | ((high << 1) << (31 - shift))  # two shifts: one of 32 is none


@triton.jit
def _ternary_linear_kernel(
    x_ptr,  # [num_tokens, in_features]
    weight_ptr,  # [out_features, in_features]
    bias_ptr,  # [out_features]
    planes_ptrs,  # a tuple of [num_groups, 4] int32
    factors_ptr,  # [num_tokens, all deltas], those of the first of the tuple
    used_ptr,  # the same, 1 where the token uses the delta
    sums_ptr,  # [num_tokens, out_features], of the launches before
    out_ptr,  # the same, in the dtype of x or of the sums
    num_tokens,
    out_features,
    in_features,
    num_groups,
    x_stride,
    weight_stride,
    weight_depth_stride,
    factors_stride,
    NUM_DELTAS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    STEP: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside, c_inside = rows < num_tokens, columns < out_features
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    at_out = rows.to(tl.int64)[:, None] * out_features + columns[None, :]
    both_inside = inside[:, None] & c_inside[None, :]
    if HAS_SUMS:
        sums = tl.load(sums_ptr + at_out, mask=both_inside, other=0)
    else:
        steps = tl.arange(0, BLOCK_DEPTH)
        w_ptrs = weight_ptr + columns.to(tl.int64)[None, :] * weight_stride + steps[:, None] * weight_depth_stride
        sums = multiply(
            x_rows + steps[None, :], inside, 1, w_ptrs, c_inside, weight_depth_stride, in_features,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, CHUNK, EVEN, ACC, PRECISION,
        )  # fmt: skip
    features = tl.arange(0, STEP)
    for e in tl.static_range(NUM_DELTAS):
        at = rows.to(tl.int64) * factors_stride + e
        used = tl.load(used_ptr + at, mask=inside, other=0)
        if tl.max(used, 0) > 0:
            products = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACC)
            for first in range(0, in_features, STEP):
                bit = columns.to(tl.int64) * in_features + first
                nonzero = _bits(planes_ptrs[e], bit, num_groups)
                negative = _bits(planes_ptrs[e] + 2, bit, num_groups)
                place = features.to(tl.uint32)[:, None]
                # the bits past the row's last are the next one's, and multiply zeros
                signs = tl.where((negative[None, :] >> place) & 1 != 0, -1.0, 1.0)
                t = tl.where((nonzero[None, :] >> place) & 1 != 0, signs, 0.0).to(x_ptr.dtype.element_ty)
                in_row = first + features < in_features
                x = tl.load(x_rows + (first + features)[None, :], mask=inside[:, None] & in_row[None, :], other=0)
                products = tl.dot(x, t, products, input_precision=PRECISION, out_dtype=ACC)
            factor = tl.load(factors_ptr + at, mask=inside, other=0)
            # who does not use it keeps its bits, also of -0 and of what is no number
            sums = tl.where((used > 0)[:, None], sums + factor[:, None] * products, sums)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + columns, mask=c_inside, other=0).to(ACC)[None, :]
    tl.store(out_ptr + at_out, sums.to(out_ptr.dtype.element_ty), mask=both_inside)


def ternary_linear(
    x: Tensor,
    weight: Tensor,
    deltas: list[Tensor],
    values: list[float],
    delta_ids: Tensor | None,
    delta_weights: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """As the compiled op. A token that has a delta twice adds both weights first."""
    num_tokens, (out_features, in_features) = x.shape[0], weight.shape
    out = x.new_empty(num_tokens, out_features)
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    factors, used = _factors(values, delta_ids, delta_weights, num_tokens, acc, x.device)
    tiles = plan_tiles(num_tokens, 1, out_features, in_features, x.dtype, capability_of(x))
    if x.dtype == torch.float32:  # without tensor cores two tiles of sums are too many registers
        tiles = tiles._replace(columns=min(tiles.columns, 32))
    step = STEP if x.dtype.itemsize == 2 else STEP // 2
    grid = (triton.cdiv(num_tokens, tiles.rows), triton.cdiv(out_features, tiles.columns))
    parts = [slice(at, at + DELTAS) for at in range(0, max(len(deltas), 1), DELTAS)]
    sums = x.new_empty(out.shape, dtype=acc) if len(parts) > 1 else out
    with torch.cuda.device_of(x):
        for number, part in enumerate(parts):
            last, planes = number == len(parts) - 1, tuple(delta.view(torch.int32) for delta in deltas[part])
            _ternary_linear_kernel[grid](
                x, weight, bias.contiguous() if last and bias is not None else x, planes,
                factors[:, part], used[:, part], sums, out if last else sums, num_tokens, out_features, in_features,
                triton.cdiv(out_features * in_features, GROUP), x.stride(0), *weight.stride(), factors.stride(0),
                NUM_DELTAS=len(planes), HAS_SUMS=number > 0, HAS_BIAS=last and bias is not None,
                CHUNK=chunk_of(x.dtype), EVEN=in_features % tiles.depth == 0, ACC=acc_dtype(x),
                PRECISION=dot_precision(), BLOCK_ROWS=tiles.rows, BLOCK_COLUMNS=tiles.columns, BLOCK_DEPTH=tiles.depth,
                STEP=step, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
    return out


def _factors(
    values: list[float], ids: Tensor | None, weights: Tensor | None, num_tokens: int, acc: torch.dtype, device
) -> tuple[Tensor, Tensor]:
    """What each token multiplies each delta's product with, [num_tokens, num_deltas], and int32 1 where it has it."""
    of_delta = torch.tensor(values, dtype=acc, device="cpu").to(device)
    if ids is None:
        factors = of_delta.expand(num_tokens, -1) if weights is None else weights.to(acc) * of_delta
        return factors.contiguous(), torch.ones(factors.shape, dtype=torch.int32, device=device)
    factors = torch.zeros(num_tokens, len(values), dtype=acc, device=device)
    used = torch.zeros_like(factors, dtype=torch.int32)
    order = torch.arange(len(values), device=device)
    for k in range(ids.shape[1]):  # in order: a scatter's would be anyone's
        here = ids[:, k : k + 1] == order
        weight = 1.0 if weights is None else weights[:, k : k + 1].to(acc)
        factors = torch.where(here, factors + weight * of_delta, factors)
        used |= here.int()
    return factors, used
