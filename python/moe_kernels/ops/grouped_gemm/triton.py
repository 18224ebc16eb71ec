"""Triton kernels of grouped matrix multiplication, under the names of the compiled ops (native.py).

A program multiplies a tile: rows of one expert with a block of its matrix. Which expert a tile belongs to is found from
``expert_offsets`` on the device, so launches depend on shapes alone, and no count crosses to the host. Sums run in
float32 (float64 for float64) in one order along the depth, whatever the tile. An index outside its tensor gives zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels._opaque import opaque
from moe_kernels.ops.grouped_gemm.native import new_weight_grad
from moe_kernels.ops.grouped_gemm.tiles import Tiles, num_tiles, plan_tiles, plan_weight_grad_tiles, power_of_2

GROUP = 8  # tiles that share each block of weights while it lies in L2
BIAS_ROWS = 32
BIAS_COLUMNS = 128


@triton.jit
def find_tile(
    offsets_ptr,  # [num_experts + 1]
    num_experts,
    num_rows,
    num_column_blocks,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """This program's expert, its first row, the end of the expert's rows, its block of columns.

    GROUP tiles in a row take the same block of columns before the next: neighbours share an expert's weights. A program
    past the last tile gets an expert past the last one.
    """
    program = tl.program_id(0)
    of_group = program % (GROUP * num_column_blocks)
    tile = program // (GROUP * num_column_blocks) * GROUP + of_group % GROUP
    experts = tl.arange(0, BLOCK_EXPERTS)
    begins = tl.load(offsets_ptr + experts, mask=experts < num_experts, other=0)
    ends = tl.load(offsets_ptr + experts + 1, mask=experts < num_experts, other=0)
    begins, ends = tl.maximum(begins, 0), tl.minimum(ends, num_rows)
    tiles = tl.maximum(ends - begins + BLOCK_ROWS - 1, 0) // BLOCK_ROWS
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    here = experts == expert
    first = tl.sum(tl.where(here, begins + (tile - upto + tiles) * BLOCK_ROWS, 0), 0)
    end = tl.sum(tl.where(here, ends, 0), 0)
    return expert, first, end, of_group // GROUP


@triton.jit
def _multiply_part(
    x_ptrs, x_inside, x_step, w_ptrs, w_inside, w_step, depth, sums,
    BLOCK_DEPTH: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    steps = tl.arange(0, BLOCK_DEPTH)
    for first in range(0, depth, BLOCK_DEPTH):
        if EVEN:
            x = tl.load(x_ptrs, mask=x_inside[:, None], other=0)
            w = tl.load(w_ptrs, mask=w_inside[None, :], other=0)
        else:
            inside = first + steps < depth
            x = tl.load(x_ptrs, mask=x_inside[:, None] & inside[None, :], other=0)
            w = tl.load(w_ptrs, mask=inside[:, None] & w_inside[None, :], other=0)
        sums = tl.dot(x, w, sums, input_precision=PRECISION, out_dtype=ACC)
        x_ptrs += x_step
        w_ptrs += w_step
    return sums


@triton.jit
def multiply(
    x_ptrs,  # [BLOCK_ROWS, BLOCK_DEPTH], of the first step
    x_inside,  # [BLOCK_ROWS]
    x_stride,  # of the depth
    w_ptrs,  # [BLOCK_DEPTH, BLOCK_COLUMNS]
    w_inside,  # [BLOCK_COLUMNS]
    w_stride,
    depth,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,  # depth that is summed by itself first; 0: all
    EVEN: tl.constexpr,  # depth is a multiple of BLOCK_DEPTH
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x @ w over the whole depth."""
    x_step, w_step = BLOCK_DEPTH * x_stride, BLOCK_DEPTH * w_stride
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACC)
    if CHUNK == 0:
        sums = _multiply_part(
            x_ptrs, x_inside, x_step, w_ptrs, w_inside, w_step, depth, sums, BLOCK_DEPTH, EVEN, ACC, PRECISION
        )
    else:
        for first in range(0, depth, CHUNK):
            left = tl.minimum(depth - first, CHUNK)
            part = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACC)
            sums += _multiply_part(
                x_ptrs, x_inside, x_step, w_ptrs, w_inside, w_step, left, part, BLOCK_DEPTH, EVEN, ACC, PRECISION
            )
            x_ptrs += CHUNK * x_stride
            w_ptrs += CHUNK * w_stride
    return sums


@triton.jit
def _grouped_gemm_kernel(
    rows_ptr,  # [num_rows, depth]
    weights_ptr,  # [num_experts, num_columns, depth]
    bias_ptr,  # [num_experts, num_columns]
    offsets_ptr,  # [num_experts + 1]
    out_ptr,  # [num_rows, num_columns]
    num_rows,
    num_experts,
    num_columns,
    depth,
    rows_stride,
    rows_depth_stride,
    weights_expert_stride,
    weights_column_stride,
    weights_depth_stride,
    bias_expert_stride,
    bias_column_stride,
    HAS_BIAS: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[r] = weights[e] @ rows[r] + bias[e] for the rows of a tile."""
    num_column_blocks = tl.cdiv(num_columns, BLOCK_COLUMNS)
    expert, first, end, column_block = find_tile(
        offsets_ptr, num_experts, num_rows, num_column_blocks, BLOCK_EXPERTS, BLOCK_ROWS, GROUP
    )
    if expert >= num_experts:
        return
    rows = first + tl.arange(0, BLOCK_ROWS)
    inside = rows < end
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    steps = tl.arange(0, BLOCK_DEPTH)
    c_inside = columns < num_columns
    x_ptrs = rows_ptr + rows.to(tl.int64)[:, None] * rows_stride + steps[None, :] * rows_depth_stride
    w_ptrs = weights_ptr + expert.to(tl.int64) * weights_expert_stride
    w_ptrs = w_ptrs + columns.to(tl.int64)[None, :] * weights_column_stride + steps[:, None] * weights_depth_stride
    sums = multiply(
        x_ptrs, inside, rows_depth_stride, w_ptrs, c_inside, weights_depth_stride, depth,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, CHUNK, EVEN, ACC, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert.to(tl.int64) * bias_expert_stride + columns * bias_column_stride
        sums += tl.load(bias_ptrs, mask=c_inside, other=0).to(ACC)[None, :]
    in_tile = tl.arange(0, BLOCK_ROWS)[:, None]  # 32-bit offsets from the tile's first row: half the registers
    out_ptrs = out_ptr + first.to(tl.int64) * num_columns + (in_tile * num_columns + columns[None, :])
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=inside[:, None] & c_inside[None, :])


@triton.jit
def _zero_tail_kernel(offsets_ptr, out_ptr, num_rows, num_experts, num_columns, BLOCK: tl.constexpr):
    """Zero in the rows that belong to no expert. One program for a row and a block of columns."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    owned = row < tl.load(offsets_ptr + num_experts)
    zeros = tl.zeros((BLOCK,), out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * num_columns + columns, zeros, mask=(columns < num_columns) & (not owned))


@triton.jit
def _weight_grad_kernel(
    left_ptr,  # [num_rows, num_columns]
    right_ptr,  # [num_rows, depth]
    offsets_ptr,  # [num_experts + 1]
    out_ptr,  # [num_experts, num_columns, depth], any strides
    num_rows,
    num_columns,
    depth,
    left_stride,
    left_column_stride,
    right_stride,
    right_depth_stride,
    out_expert_stride,
    out_column_stride,
    out_depth_stride,
    CHUNK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,  # summed at a time
    GROUP: tl.constexpr,
):
    """out[e] = sum over e's rows of left[r] (outer) right[r], in order. One program for a block of out[e]."""
    expert = tl.program_id(1)
    num_column_blocks, num_depth_blocks = tl.cdiv(num_columns, BLOCK_COLUMNS), tl.cdiv(depth, BLOCK_DEPTH)
    of_group = tl.program_id(0) % (GROUP * num_depth_blocks)
    column_block = tl.program_id(0) // (GROUP * num_depth_blocks) * GROUP + of_group % GROUP
    if column_block >= num_column_blocks:
        return
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    depths = of_group // GROUP * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    begin = tl.maximum(tl.load(offsets_ptr + expert), 0)
    end = tl.minimum(tl.load(offsets_ptr + expert + 1), num_rows)
    c_inside, d_inside = columns < num_columns, depths < depth
    left_ptrs = left_ptr + columns.to(tl.int64)[:, None] * left_column_stride
    right_ptrs = right_ptr + depths.to(tl.int64)[None, :] * right_depth_stride
    sums = tl.zeros((BLOCK_COLUMNS, BLOCK_DEPTH), ACC)
    total = tl.zeros((BLOCK_COLUMNS, BLOCK_DEPTH), ACC)
    for first in range(begin, end, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        inside = rows < end
        if CHUNK > 0:
            full = (first - begin) % CHUNK == 0
            total = tl.where(full, total + sums, total)
            sums = tl.where(full, 0, sums)
        left_at = left_ptrs + rows.to(tl.int64)[None, :] * left_stride
        left = tl.load(left_at, mask=c_inside[:, None] & inside[None, :], other=0)
        right_at = right_ptrs + rows.to(tl.int64)[:, None] * right_stride
        right = tl.load(right_at, mask=inside[:, None] & d_inside[None, :], other=0)
        sums = tl.dot(left, right, sums, input_precision=PRECISION, out_dtype=ACC)
    out_ptrs = out_ptr + expert.to(tl.int64) * out_expert_stride + columns.to(tl.int64)[:, None] * out_column_stride
    out_ptrs += depths.to(tl.int64)[None, :] * out_depth_stride
    if CHUNK > 0:
        sums += total
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=c_inside[:, None] & d_inside[None, :])


@triton.jit
def _bias_grad_kernel(
    grad_ptr,  # [num_rows, num_columns]
    row_weights_ptr,  # [num_rows]
    offsets_ptr,  # [num_experts + 1]
    out_ptr,  # [num_experts, num_columns]
    num_rows,
    num_columns,
    grad_stride,
    grad_column_stride,
    WEIGHTED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out[e] = sum over e's rows of (row_weights *) grad. One program for an expert and a block of columns."""
    expert = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    read = columns < num_columns
    begin = tl.maximum(tl.load(offsets_ptr + expert), 0)
    end = tl.minimum(tl.load(offsets_ptr + expert + 1), num_rows)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACC)
    for first in range(begin, end, BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        inside = rows < end
        at = grad_ptr + rows.to(tl.int64)[:, None] * grad_stride + columns.to(tl.int64)[None, :] * grad_column_stride
        grad = tl.load(at, mask=inside[:, None] & read[None, :], other=0).to(ACC)
        if WEIGHTED:
            grad *= tl.load(row_weights_ptr + rows, mask=inside, other=0)[:, None]
        sums += grad
    out = tl.sum(sums, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + expert.to(tl.int64) * num_columns + columns, out, mask=read)


def capability_of(tensor: Tensor) -> tuple[int, int]:
    """Compute capability to plan for: 8.0 where the tensor is on no GPU and an interpreter runs the kernels."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (8, 0)


def acc_dtype(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def dot_precision() -> str:
    """How float32 is multiplied: as PyTorch's own switch says."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def chunk_of(dtype: torch.dtype) -> int:
    """Products summed by themselves before they join the rest: one chain of float32 sums over thousands of products
    errs more than PyTorch's own, which are split. A product of 16-bit numbers has errors of its own that drown it, and
    float64 has digits to spare (nor does Triton 3.6 compile its weight gradient in chunks rightly for an H200)."""
    return 256 if dtype == torch.float32 else 0


def block_experts(num_experts: int) -> int:
    return triton.next_power_of_2(max(num_experts, 1))


def tile_arguments(tiles: Tiles, num_experts: int, depth: int, tensor: Tensor) -> dict:
    """The constants that every kernel of tiles takes."""
    return dict(
        CHUNK=chunk_of(tensor.dtype), EVEN=depth % tiles.depth == 0, ACC=acc_dtype(tensor), PRECISION=dot_precision(),
        BLOCK_EXPERTS=block_experts(num_experts), BLOCK_ROWS=tiles.rows, BLOCK_COLUMNS=tiles.columns,
        BLOCK_DEPTH=tiles.depth, GROUP=GROUP, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def tile_grid(tiles: Tiles, num_rows: int, num_experts: int, num_columns: int) -> tuple[int]:
    groups = triton.cdiv(num_tiles(num_rows, num_experts, tiles.rows), GROUP)
    return (groups * GROUP * triton.cdiv(num_columns, tiles.columns),)


def multiply_rows(
    rows: Tensor, expert_weights: Tensor, expert_offsets: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """The grouped GEMM with its tail unwritten."""
    num_rows, depth = rows.shape
    num_experts, num_columns, _ = expert_weights.shape
    if out is None:
        out = rows.new_empty((num_rows, num_columns))
    if out.numel() > 0 and num_experts > 0:
        tiles = plan_tiles(num_rows, num_experts, num_columns, depth, rows.dtype, capability_of(rows))
        bias_strides = (0, 0) if bias is None else bias.stride()
        with torch.cuda.device_of(rows):
            _grouped_gemm_kernel[tile_grid(tiles, num_rows, num_experts, num_columns)](
                rows, expert_weights, rows if bias is None else bias, expert_offsets, out, num_rows, num_experts,
                num_columns, depth, *rows.stride(), *expert_weights.stride(), *bias_strides,
                HAS_BIAS=bias is not None, **tile_arguments(tiles, num_experts, depth, rows),
            )  # fmt: skip
    return out


def _grouped_gemm(
    rows: Tensor, expert_weights: Tensor, expert_offsets: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    expert_offsets = expert_offsets.contiguous()
    out = multiply_rows(rows, expert_weights, expert_offsets, bias)
    num_rows, num_columns = out.shape
    if out.numel() > 0:
        block = power_of_2(num_columns, 16, 1024)
        with torch.cuda.device_of(rows):
            _zero_tail_kernel[(num_rows, triton.cdiv(num_columns, block))](
                expert_offsets, out, num_rows, expert_weights.shape[0], num_columns, BLOCK=block
            )
    return out


def weight_grad(left: Tensor, right: Tensor, expert_offsets: Tensor, out: Tensor) -> Tensor:
    """``out[e] = sum over e's rows of left[r] (outer) right[r]``."""
    num_rows, num_columns = left.shape
    depth, num_experts = right.shape[1], out.shape[0]
    if out.numel() > 0:
        tiles = plan_weight_grad_tiles(num_columns, depth, left.dtype, capability_of(left))
        blocks = triton.cdiv(triton.cdiv(num_columns, tiles.columns), GROUP) * GROUP * triton.cdiv(depth, tiles.depth)
        with torch.cuda.device_of(left):
            _weight_grad_kernel[(blocks, num_experts)](
                left, right, expert_offsets, out, num_rows, num_columns, depth, *left.stride(), *right.stride(),
                *out.stride(), CHUNK=chunk_of(left.dtype), ACC=acc_dtype(left), PRECISION=dot_precision(),
                BLOCK_COLUMNS=tiles.columns, BLOCK_DEPTH=tiles.depth, BLOCK_ROWS=tiles.rows, GROUP=GROUP,
                num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
    return out


def bias_grad(grad: Tensor, row_weights: Tensor | None, expert_offsets: Tensor) -> Tensor:
    """Sum over each expert's rows of grad, weighted if ``row_weights`` [num_rows] are given."""
    num_experts, (num_rows, num_columns) = expert_offsets.shape[0] - 1, grad.shape
    out = grad.new_empty((num_experts, num_columns))
    if out.numel() > 0:
        weighted = row_weights is not None
        with torch.cuda.device_of(grad):
            _bias_grad_kernel[(triton.cdiv(num_columns, BIAS_COLUMNS), num_experts)](
                grad, row_weights if weighted else grad, expert_offsets, out, num_rows, num_columns, *grad.stride(),
                WEIGHTED=weighted, ACC=acc_dtype(grad), BLOCK_ROWS=BIAS_ROWS, BLOCK_COLUMNS=BIAS_COLUMNS,
            )  # fmt: skip
    return out


def _grouped_gemm_weight_grad(grad_out: Tensor, rows: Tensor, expert_offsets: Tensor, transposed: bool) -> Tensor:
    expert_offsets = expert_offsets.contiguous()
    out = new_weight_grad(rows, expert_offsets.shape[0] - 1, grad_out.shape[1], rows.shape[1], transposed)
    return weight_grad(grad_out, rows, expert_offsets, out)


def _grouped_gemm_bias_grad(grad_out: Tensor, expert_offsets: Tensor) -> Tensor:
    return bias_grad(grad_out, None, expert_offsets.contiguous())


grouped_gemm = opaque("grouped_gemm", _grouped_gemm)
grouped_gemm_weight_grad = opaque("grouped_gemm_weight_grad", _grouped_gemm_weight_grad)
grouped_gemm_bias_grad = opaque("grouped_gemm_bias_grad", _grouped_gemm_bias_grad)
