"""Triton kernels of the expert FFN, under the names of the compiled ops (native.py).

Forward: the first product gathers its rows of ``hidden_states`` as it loads them and applies bias and activation before
it stores; the second multiplies what it stored; a token then gathers and sums its experts' rows in the order of k.
Backward multiplies ``grad_out`` with ``down_proj`` and turns the product, in registers, into the gradient of the
pre-activation, the gradient of the routing weights and the weighted activation that down_proj's gradient needs. Between
the kernels lie ``a`` and ``y`` (backward: three, one of them of the size of the
pre-activation), in the dtype
of the weights. No atomics, no counts on the host: launches depend on shapes alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels._opaque import opaque
from moe_kernels.activation import KINDS
from moe_kernels.ops.expert_ffn.native import is_transposed, new_weight_grad
from moe_kernels.ops.grouped_gemm import triton as gemm
from moe_kernels.ops.grouped_gemm.tiles import plan_tiles, power_of_2
from moe_kernels.ops.permute import triton as permutation

SILU, GELU, GELU_TANH, RELU, RELU2 = (tl.constexpr(KINDS.index(kind)) for kind in KINDS)
PART = 64  # columns whose products are summed into one part of a routing weight's gradient
BLOCK_HIDDEN = 1024


@triton.jit
def _constant(value: tl.constexpr, like):
    return tl.full((), value, like.dtype)


@triton.jit
def _tanh(x):
    """Loses relative accuracy only where tanh itself is small beside the 1 it is added to."""
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def _act(x, KIND: tl.constexpr, ALPHA: tl.constexpr):
    if KIND == SILU:
        return x * (1 / (1 + tl.exp(-_constant(ALPHA, x) * x)))
    elif KIND == GELU:
        return 0.5 * x * (1 + tl.erf(x * _constant(0.70710678118654752440, x)))
    elif KIND == GELU_TANH:
        inner = _constant(0.79788456080286535588, x) * (x + _constant(0.044715, x) * x * x * x)
        return 0.5 * x * (1 + _tanh(inner))
    else:
        positive = tl.where((x > 0) | (x != x), x, 0)
        return positive if KIND == RELU else positive * positive


@triton.jit
def _act_derivative(x, KIND: tl.constexpr, ALPHA: tl.constexpr):
    if KIND == SILU:
        alpha = _constant(ALPHA, x)
        s = 1 / (1 + tl.exp(-alpha * x))
        return s + alpha * x * s * (1 - s)
    elif KIND == GELU:
        cdf = 0.5 * (1 + tl.erf(x * _constant(0.70710678118654752440, x)))
        return cdf + x * _constant(0.39894228040143267794, x) * tl.exp(-0.5 * x * x)
    elif KIND == GELU_TANH:
        scale = _constant(0.79788456080286535588, x)
        t = _tanh(scale * (x + _constant(0.044715, x) * x * x * x))
        inner = scale * (1 + _constant(0.134145, x) * x * x)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner
    elif KIND == RELU:
        return tl.where(x > 0, _constant(1.0, x), tl.where(x != x, x, 0))
    else:
        return tl.where((x > 0) | (x != x), 2 * x, 0)


@triton.jit
def _at_most(x, LIMIT: tl.constexpr):
    """min that keeps NaN, as torch.clamp does."""
    limit = _constant(LIMIT, x)
    return tl.where(x > limit, limit, x)


@triton.jit
def _clamped(x, LIMIT: tl.constexpr):
    limit = _constant(LIMIT, x)
    low = tl.where(x < -limit, -limit, x)
    return tl.where(low > limit, limit, low)


@triton.jit
def _gate_up_kernel(
    x_ptr,  # [num_tokens, hidden_size]
    source_rows_ptr,  # [num_rows]
    weights_ptr,  # [num_experts, gate_up_size, hidden_size]
    bias_ptr,  # [num_experts, gate_up_size]
    offsets_ptr,  # [num_experts + 1]
    h_ptr,  # [num_rows, gate_up_size]
    a_ptr,  # [num_rows, intermediate_size]
    num_rows,
    num_tokens,
    num_experts,
    intermediate_size,
    hidden_size,
    x_stride,
    x_hidden_stride,
    weights_expert_stride,
    weights_row_stride,
    weights_hidden_stride,
    bias_expert_stride,
    bias_row_stride,
    up_offset,  # rows of the weights from a gate row to its up row
    row_step,  # rows of the weights from a gate row to the next
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    ACT_LIMIT: tl.constexpr,
    UP_ADDEND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
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
    """h = weights[e] @ x[source_rows] + bias[e], a = activation(h), for the rows of a tile."""
    num_column_blocks = tl.cdiv(intermediate_size, BLOCK_COLUMNS)
    expert, first, end, column_block = gemm.find_tile(
        offsets_ptr, num_experts, num_rows, num_column_blocks, BLOCK_EXPERTS, BLOCK_ROWS, GROUP
    )
    if expert >= num_experts:
        return
    rows = first + tl.arange(0, BLOCK_ROWS)
    inside = rows < end
    sources = tl.load(source_rows_ptr + rows, mask=inside, other=-1).to(tl.int64)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    steps = tl.arange(0, BLOCK_DEPTH)
    c_inside = columns < intermediate_size
    x_ptrs = x_ptr + sources[:, None] * x_stride + steps[None, :] * x_hidden_stride
    x_inside = (sources >= 0) & (sources < num_tokens)
    # gate and up are one product: columns of the gate, then as many of up
    NUM_PARTS: tl.constexpr = 2 if GATED else 1
    both = tl.arange(0, NUM_PARTS * BLOCK_COLUMNS)
    both_columns = column_block * BLOCK_COLUMNS + both % BLOCK_COLUMNS
    weight_rows = both_columns.to(tl.int64) * row_step + (both // BLOCK_COLUMNS).to(tl.int64) * up_offset
    w_ptrs = weights_ptr + expert.to(tl.int64) * weights_expert_stride
    w_ptrs = w_ptrs + weight_rows[None, :] * weights_row_stride + steps[:, None] * weights_hidden_stride
    product = gemm.multiply(
        x_ptrs, x_inside, x_hidden_stride, w_ptrs, both_columns < intermediate_size, weights_hidden_stride, hidden_size,
        BLOCK_ROWS, NUM_PARTS * BLOCK_COLUMNS, BLOCK_DEPTH, CHUNK, EVEN, ACC, PRECISION,
    )  # fmt: skip
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(product, (BLOCK_ROWS, 2, BLOCK_COLUMNS)), (0, 2, 1)))
    else:
        gate = product
    gate_rows = columns.to(tl.int64) * row_step
    stored = inside[:, None] & c_inside[None, :]
    gate_up_size = intermediate_size * 2 if GATED else intermediate_size
    in_tile = tl.arange(0, BLOCK_ROWS)[:, None]  # 32-bit offsets from the tile's first row: half the registers
    h_ptrs = h_ptr + first.to(tl.int64) * gate_up_size + (in_tile * gate_up_size + (columns * row_step)[None, :])
    bias_ptrs = bias_ptr + expert.to(tl.int64) * bias_expert_stride + gate_rows * bias_row_stride
    if HAS_BIAS:
        gate += tl.load(bias_ptrs, mask=c_inside, other=0).to(ACC)[None, :]
    if SAVE:
        tl.store(h_ptrs, gate.to(h_ptr.dtype.element_ty), mask=stored)
    a = _at_most(_act(_at_most(gate, GATE_LIMIT), KIND, ALPHA), ACT_LIMIT)
    if GATED:
        if HAS_BIAS:
            bias_ptrs += tl.cast(up_offset, tl.int64) * bias_row_stride
            up += tl.load(bias_ptrs, mask=c_inside, other=0).to(ACC)[None, :]
        if SAVE:
            tl.store(h_ptrs + up_offset, up.to(h_ptr.dtype.element_ty), mask=stored)
        a *= _clamped(up, UP_LIMIT) + _constant(UP_ADDEND, up)
    a_ptrs = a_ptr + first.to(tl.int64) * intermediate_size + (in_tile * intermediate_size + columns[None, :])
    tl.store(a_ptrs, a.to(a_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _store_grads(
    grad_a,  # [BLOCK_ROWS, PART]
    weights,  # [BLOCK_ROWS, 1]
    inside,  # [BLOCK_ROWS]
    part,  # of the columns
    h_ptr,  # this and the others: of the tile's first row
    grad_h_ptr,
    weighted_a_ptr,
    parts_ptr,
    intermediate_size,
    up_offset,
    row_step,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    ACT_LIMIT: tl.constexpr,
    UP_ADDEND: tl.constexpr,
    GRAD_H: tl.constexpr,
    WEIGHTED_A: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """What _grad_act_kernel makes of PART columns of grad_a."""
    columns = part * PART + tl.arange(0, PART)
    stored = inside[:, None] & (columns < intermediate_size)[None, :]
    # 32-bit offsets from the tile's first row: half the registers
    in_tile = tl.arange(0, BLOCK_ROWS)[:, None]
    gate_up_size = intermediate_size * 2 if GATED else intermediate_size
    at = in_tile * gate_up_size + (columns * row_step)[None, :]
    gate = tl.load(h_ptr + at, mask=stored, other=0).to(ACC)
    x = _at_most(gate, GATE_LIMIT)
    y = _act(x, KIND, ALPHA)
    a = _at_most(y, ACT_LIMIT)
    factor = tl.full((), 1.0, ACC)
    if GATED:
        up = tl.load(h_ptr + at + up_offset, mask=stored, other=0).to(ACC)
        factor = _clamped(up, UP_LIMIT) + _constant(UP_ADDEND, up)
    if PARTS:
        products = tl.sum(tl.where(stored, grad_a * a * factor, 0), 1)
        part_ptrs = parts_ptr + tl.arange(0, BLOCK_ROWS) * tl.cdiv(intermediate_size, PART) + part
        tl.store(part_ptrs, products, mask=inside & (part * PART < intermediate_size))
    if WEIGHTED_A:
        a_ptrs = weighted_a_ptr + (in_tile * intermediate_size + columns[None, :])
        tl.store(a_ptrs, (weights * a * factor).to(weighted_a_ptr.dtype.element_ty), mask=stored)
    if GRAD_H:
        grad_a *= weights
        derivative = _act_derivative(x, KIND, ALPHA)
        # a gradient passes at a clamp's boundary, not beyond it
        derivative = tl.where((gate > _constant(GATE_LIMIT, gate)) | (y > _constant(ACT_LIMIT, y)), 0, derivative)
        grad_gate = grad_a * derivative * factor
        tl.store(grad_h_ptr + at, grad_gate.to(grad_h_ptr.dtype.element_ty), mask=stored)
        if GATED:
            limit = _constant(UP_LIMIT, up)
            grad_up = tl.where((up > limit) | (up < -limit), 0, grad_a * a)
            tl.store(grad_h_ptr + at + up_offset, grad_up.to(grad_h_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _grad_act_kernel(
    grad_rows_ptr,  # [num_rows, hidden_size]
    row_weights_ptr,  # [num_rows]
    weights_ptr,  # [num_experts, hidden_size, intermediate_size]
    offsets_ptr,  # [num_experts + 1]
    h_ptr,  # [num_rows, gate_up_size]
    grad_h_ptr,  # [num_rows, gate_up_size]
    weighted_a_ptr,  # [num_rows, intermediate_size]
    parts_ptr,  # [num_rows, num_parts]
    num_rows,
    num_experts,
    intermediate_size,
    hidden_size,
    weights_expert_stride,
    weights_hidden_stride,
    weights_column_stride,
    up_offset,
    row_step,
    GATED: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    ACT_LIMIT: tl.constexpr,
    UP_ADDEND: tl.constexpr,
    GRAD_H: tl.constexpr,
    WEIGHTED_A: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
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
    """From da = grad_rows @ weights[e] and h: grad_h, weight * a, and <da, a> of every PART columns."""
    num_column_blocks = tl.cdiv(intermediate_size, BLOCK_COLUMNS)
    expert, first, end, column_block = gemm.find_tile(
        offsets_ptr, num_experts, num_rows, num_column_blocks, BLOCK_EXPERTS, BLOCK_ROWS, GROUP
    )
    if expert >= num_experts:
        return
    rows = first + tl.arange(0, BLOCK_ROWS)
    inside = rows < end
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    steps = tl.arange(0, BLOCK_DEPTH)
    c_inside = columns < intermediate_size
    x_ptrs = grad_rows_ptr + rows.to(tl.int64)[:, None] * hidden_size + steps[None, :]
    w_ptrs = weights_ptr + expert.to(tl.int64) * weights_expert_stride
    w_ptrs = w_ptrs + columns.to(tl.int64)[None, :] * weights_column_stride
    w_ptrs = w_ptrs + steps[:, None] * weights_hidden_stride
    grad_a = gemm.multiply(
        x_ptrs, inside, 1, w_ptrs, c_inside, weights_hidden_stride, hidden_size,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, CHUNK, EVEN, ACC, PRECISION,
    )  # fmt: skip
    weights = tl.load(row_weights_ptr + rows, mask=inside, other=0)[:, None]
    gate_up_size = intermediate_size * 2 if GATED else intermediate_size
    h_ptr += first.to(tl.int64) * gate_up_size
    grad_h_ptr += first.to(tl.int64) * gate_up_size
    weighted_a_ptr += first.to(tl.int64) * intermediate_size
    parts_ptr += first.to(tl.int64) * tl.cdiv(intermediate_size, PART)
    # PART columns after each other: six values of each element are in registers at once
    if BLOCK_COLUMNS == PART:
        _store_grads(
            grad_a, weights, inside, column_block, h_ptr, grad_h_ptr, weighted_a_ptr, parts_ptr, intermediate_size,
            up_offset, row_step, GATED, KIND, ALPHA, GATE_LIMIT, UP_LIMIT, ACT_LIMIT, UP_ADDEND, GRAD_H, WEIGHTED_A,
            PARTS, PART, ACC, BLOCK_ROWS,
        )  # fmt: skip
    else:
        tl.static_assert(BLOCK_COLUMNS == 2 * PART)
        halves = tl.split(tl.permute(tl.reshape(grad_a, (BLOCK_ROWS, 2, PART)), (0, 2, 1)))
        for half in tl.static_range(2):
            _store_grads(
                halves[half], weights, inside, 2 * column_block + half, h_ptr, grad_h_ptr, weighted_a_ptr, parts_ptr,
                intermediate_size, up_offset, row_step, GATED, KIND, ALPHA, GATE_LIMIT, UP_LIMIT, ACT_LIMIT, UP_ADDEND,
                GRAD_H, WEIGHTED_A, PARTS, PART, ACC, BLOCK_ROWS,
            )  # fmt: skip


@triton.jit
def _row_weights_kernel(
    weights_ptr,  # [num_tokens, top_k], any strides
    permuted_rows_ptr,  # [num_tokens * top_k]
    row_weights_ptr,  # [num_rows]
    num_pairs,
    top_k,
    token_stride,
    slot_stride,
    BLOCK: tl.constexpr,
):
    """row_weights[permuted_rows[t, k]] = weights[t, k]."""
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(permuted_rows_ptr + pairs, mask=pairs < num_pairs, other=-1)
    owned = (rows >= 0) & (rows < num_pairs)
    tokens = pairs // top_k
    at = tokens.to(tl.int64) * token_stride + (pairs - tokens * top_k).to(tl.int64) * slot_stride
    weights = tl.load(weights_ptr + at, mask=owned, other=0).to(row_weights_ptr.dtype.element_ty)
    tl.store(row_weights_ptr + rows, weights, mask=owned)


@triton.jit
def _grad_weights_kernel(
    parts_ptr,  # [num_rows, num_parts]
    permuted_rows_ptr,  # [num_tokens, top_k]
    ids_ptr,  # [num_tokens, top_k], any strides
    grad_out_ptr,  # [num_tokens, hidden_size], any strides
    bias_ptr,  # [num_experts, hidden_size], any strides
    grad_weights_ptr,  # [num_tokens, top_k]
    num_rows,
    num_parts,
    top_k,
    hidden_size,
    ids_token_stride,
    ids_slot_stride,
    grad_stride,
    grad_hidden_stride,
    bias_expert_stride,
    bias_hidden_stride,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """grad_weights[t, k] = the sum of the row's parts, + <grad_out[t], bias[e]>. One program for a pair."""
    token, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = token * top_k + k
    row = tl.load(permuted_rows_ptr + pair)
    owned = (row >= 0) & (row < num_rows)
    parts = tl.arange(0, BLOCK_PARTS)
    of_row = tl.load(parts_ptr + row.to(tl.int64) * num_parts + parts, mask=owned & (parts < num_parts), other=0)
    total = tl.sum(of_row, 0)
    if HAS_BIAS:
        expert = tl.load(ids_ptr + token * ids_token_stride + k.to(tl.int64) * ids_slot_stride).to(tl.int64)
        products = tl.zeros((BLOCK_HIDDEN,), ACC)
        for first in range(0, hidden_size, BLOCK_HIDDEN):
            columns = (first + tl.arange(0, BLOCK_HIDDEN)).to(tl.int64)
            read = owned & (columns < hidden_size)
            grad = tl.load(grad_out_ptr + token * grad_stride + columns * grad_hidden_stride, mask=read, other=0)
            bias = tl.load(bias_ptr + expert * bias_expert_stride + columns * bias_hidden_stride, mask=read, other=0)
            products += grad.to(ACC) * bias.to(ACC)
        total += tl.sum(products, 0)
    tl.store(grad_weights_ptr + pair, total.to(grad_weights_ptr.dtype.element_ty))


def _activation(
    kind: int, gated: bool, alpha: float, limit: float, clamp_output: bool, up_addend: float, interleaved: bool,
    intermediate_size: int,
) -> tuple[tuple[int, int], dict]:  # fmt: skip
    """Where the up row of a gate row lies, and the constants of a kernel that applies the activation."""
    infinity = float("inf")
    constants = dict(
        GATED=gated, KIND=kind, ALPHA=alpha, GATE_LIMIT=infinity if clamp_output else limit, UP_LIMIT=limit,
        ACT_LIMIT=limit if clamp_output else infinity, UP_ADDEND=up_addend,
    )  # fmt: skip
    return ((1, 2) if interleaved else (intermediate_size, 1)), constants


def _expert_ffn(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    kind: int,
    gated: bool,
    alpha: float,
    limit: float,
    clamp_output: bool,
    up_offset: float,
    interleaved: bool,
    gate_up_size: int,
    save_pre_activation: bool,
) -> tuple[Tensor, Tensor]:
    num_tokens, hidden_size = hidden_states.shape
    num_rows = topk_ids.shape[0] * topk_ids.shape[1]
    num_experts, intermediate_size = gate_up_proj.shape[0], down_proj.shape[2]
    place, constants = _activation(kind, gated, alpha, limit, clamp_output, up_offset, interleaved, intermediate_size)
    offsets, source_rows, permuted_rows = permutation.plan_dispatch(topk_ids, num_experts)
    h = hidden_states.new_empty((num_rows, gate_up_size) if save_pre_activation else 0)
    a = hidden_states.new_empty((num_rows, intermediate_size))
    if a.numel() > 0 and num_experts > 0:
        tiles = plan_tiles(
            num_rows, num_experts, intermediate_size, hidden_size, a.dtype, gemm.capability_of(a),
            num_operands=2 if gated else 1,
        )  # fmt: skip
        bias_strides = (0, 0) if gate_up_bias is None else gate_up_bias.stride()
        with torch.cuda.device_of(a):
            _gate_up_kernel[gemm.tile_grid(tiles, num_rows, num_experts, intermediate_size)](
                hidden_states, source_rows, gate_up_proj, a if gate_up_bias is None else gate_up_bias, offsets, h, a,
                num_rows, num_tokens, num_experts, intermediate_size, hidden_size, *hidden_states.stride(),
                *gate_up_proj.stride(), *bias_strides, *place, HAS_BIAS=gate_up_bias is not None,
                SAVE=save_pre_activation, **constants, **gemm.tile_arguments(tiles, num_experts, hidden_size, a),
            )  # fmt: skip
    y = gemm.multiply_rows(a, down_proj, offsets, down_bias)
    return permutation.unpermute(y, permuted_rows, topk_weights), h


def _expert_ffn_backward(
    grad_out: Tensor,
    hidden_states: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    down_bias: Tensor | None,
    pre_activation: Tensor,
    kind: int,
    gated: bool,
    alpha: float,
    limit: float,
    clamp_output: bool,
    up_offset: float,
    interleaved: bool,
    asks_hidden_states: bool,
    asks_topk_weights: bool,
    asks_gate_up_proj: bool,
    asks_down_proj: bool,
    asks_gate_up_bias: bool,
    asks_down_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, hidden_size = grad_out.shape
    num_rows, top_k = topk_ids.numel(), topk_ids.shape[1]
    num_experts, gate_up_size, _ = gate_up_proj.shape
    intermediate_size = down_proj.shape[2]
    place, constants = _activation(kind, gated, alpha, limit, clamp_output, up_offset, interleaved, intermediate_size)
    nothing = grad_out.new_empty(0)
    # the plan again: a few small kernels instead of 8 saved bytes a pair
    offsets, source_rows, permuted_rows = permutation.plan_dispatch(topk_ids, num_experts)
    acc = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    row_weights = grad_out.new_empty(num_rows, dtype=acc)
    # One tensor holds in turn what has a row of hidden_size for each pair: the gradient of the output, the input, the
    # gradient of the input. Gathering the first two as they are loaded was slower on an H200: down_proj's gradient 282
    # instead of 400 TFLOP/s, for a copy at 4 TB/s saved.
    rows = permutation.permute_into(grad_out, source_rows, grad_out.new_empty((num_rows, hidden_size)))
    asks_grad_h = asks_hidden_states or asks_gate_up_proj or asks_gate_up_bias
    grad_h = grad_out.new_empty((num_rows, gate_up_size)) if asks_grad_h else nothing
    weighted_a = grad_out.new_empty((num_rows, intermediate_size)) if asks_down_proj else nothing
    num_parts = triton.cdiv(intermediate_size, PART)
    parts = grad_out.new_empty((num_rows, num_parts) if asks_topk_weights else 0, dtype=acc)
    with torch.cuda.device_of(grad_out):
        if num_rows > 0:
            _row_weights_kernel[(triton.cdiv(num_rows, BLOCK_HIDDEN),)](
                topk_weights, permuted_rows, row_weights, num_rows, top_k, *topk_weights.stride(), BLOCK=BLOCK_HIDDEN
            )
        if num_rows > 0 and num_experts > 0 and (asks_grad_h or asks_down_proj or asks_topk_weights):
            tiles = plan_tiles(
                num_rows, num_experts, intermediate_size, hidden_size, grad_out.dtype, gemm.capability_of(grad_out),
                num_operands=2,
            )  # fmt: skip
            tiles = tiles._replace(columns=max(tiles.columns, PART))
            _grad_act_kernel[gemm.tile_grid(tiles, num_rows, num_experts, intermediate_size)](
                rows, row_weights, down_proj, offsets, pre_activation, grad_h, weighted_a, parts, num_rows, num_experts,
                intermediate_size, hidden_size, *down_proj.stride(), *place, GRAD_H=asks_grad_h,
                WEIGHTED_A=asks_down_proj, PARTS=asks_topk_weights, PART=PART, **constants,
                **gemm.tile_arguments(tiles, num_experts, hidden_size, grad_out),
            )  # fmt: skip
    grad_hidden_states = grad_topk_weights = grad_gate_up = grad_down = grad_gate_up_bias = grad_down_bias = nothing
    if asks_down_proj:
        shape = (num_experts, hidden_size, intermediate_size)
        grad_down = new_weight_grad(grad_out, *shape, is_transposed(down_proj))
        gemm.weight_grad(rows, weighted_a, offsets, grad_down)
    if asks_down_bias:
        grad_down_bias = gemm.bias_grad(rows, row_weights, offsets)
    if asks_gate_up_proj:
        grad_gate_up = new_weight_grad(grad_out, num_experts, gate_up_size, hidden_size, is_transposed(gate_up_proj))
        gemm.weight_grad(grad_h, permutation.permute_into(hidden_states, source_rows, rows), offsets, grad_gate_up)
    if asks_gate_up_bias:
        grad_gate_up_bias = gemm.bias_grad(grad_h, None, offsets)
    if asks_hidden_states:
        grad_rows = gemm.multiply_rows(grad_h, gate_up_proj.transpose(1, 2), offsets, None, out=rows)
        grad_hidden_states = permutation.unpermute(grad_rows, permuted_rows, None)
    if asks_topk_weights:
        grad_topk_weights = topk_weights.new_empty(topk_weights.shape)
        if num_rows > 0:
            bias = grad_out if down_bias is None else down_bias
            with torch.cuda.device_of(grad_out):
                _grad_weights_kernel[(num_tokens, top_k)](
                    parts, permuted_rows, topk_ids, grad_out, bias, grad_topk_weights, num_rows, num_parts, top_k,
                    hidden_size, *topk_ids.stride(), *grad_out.stride(), *bias.stride(),
                    HAS_BIAS=down_bias is not None, ACC=gemm.acc_dtype(grad_out),
                    BLOCK_PARTS=triton.next_power_of_2(max(num_parts, 1)),
                    BLOCK_HIDDEN=power_of_2(hidden_size, 16, BLOCK_HIDDEN),
                )  # fmt: skip
    return grad_hidden_states, grad_topk_weights, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias


expert_ffn = opaque("expert_ffn", _expert_ffn)
expert_ffn_backward = opaque("expert_ffn_backward", _expert_ffn_backward)
