"""Public functions of quantised expert weights: :func:`quantize`, ``quantized_from_fp8``, ``quantized_from_mxfp4``."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moe_kernels._checks import FLOAT_DTYPES, check_tensor, dtype_error, shape_error, value_error
from moe_kernels.ops.quantize import reference
from moe_kernels.ops.quantize.quantized import FORMATS, QuantizedWeights, expert_bytes, pack

Format = Literal["int8", "int4", "fp8", "mxfp4"]

_DEFAULT_GROUP = {"int4": 32, "fp8": reference.FP8_BLOCK, "mxfp4": 32}


def quantize(
    expert_weights: Tensor,
    format: Format = "int8",
    *,
    group_size: int | None = None,
    num_splits: int = 1,
    interleaved: bool = False,
) -> QuantizedWeights:
    """Rounds expert weights to a format of 8 or 4 bits, for ops that read them so.

    ``W[o, i] = value of codes[o, i] * scales[o, i // group_size]``; :mod:`.reference` says how both are chosen. An op
    that is given the result computes ``x @ W.T``. The CPU kernels of int8, int4 and mxfp4 sum integers: in blocks of 32
    inputs a row of ``x`` becomes integers of 16 bits (bfloat16, float16) or 29 (float32) times a power of two, which
    rounds away less than 2^-15 (2^-29) of the block's largest; the sum is exact, then rounded to float32 and scaled. A
    block with NaN or infinity gives NaN. In fp8 ``value * scale`` is rounded to float32 once and sums are in float32.

    Args:
        expert_weights: [num_experts, out, in] with at least one expert, float32, bfloat16, float16 or float64, any
            strides. All finite.
        format: ``int8``, ``int4``, ``fp8`` (e4m3) or ``mxfp4`` (e2m1 with a power of two for each 32).
        group_size: inputs that share a scale: a multiple of 8 that divides ``in``. None is the whole row for int8 and
            32 for int4. fp8 (blocks of 128 x 128) and mxfp4 (32) have no other.
        num_splits: 2 for a gated expert's gate_up_proj (its gate and its up rows), else 1.
        interleaved: whether those two alternate row by row (GPT-OSS) instead of following each other.

    Returns:
        A :class:`QuantizedWeights` on the device of ``expert_weights``. Gradients do not flow to the weights.

    Raises:
        ValueError, TypeError: shapes, dtypes, values or groups that do not fit; the message names the argument.
    """
    op = "quantize"
    check_tensor(op, "expert_weights", expert_weights)
    if expert_weights.dim() != 3 or expert_weights.shape[0] == 0:
        raise shape_error(op, "expert_weights", "[num_experts, out, in] with at least one expert", expert_weights)
    if expert_weights.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, "expert_weights", FLOAT_DTYPES, expert_weights)
    if format not in FORMATS:
        raise value_error(op, "format", f"one of {', '.join(FORMATS)}", repr(format))
    in_features = expert_weights.shape[2]
    if group_size is None:
        group_size = _DEFAULT_GROUP.get(format, max(1, in_features))
    elif format in ("fp8", "mxfp4") and group_size != _DEFAULT_GROUP[format]:
        raise value_error(op, "group_size", f"{_DEFAULT_GROUP[format]} for {format}", group_size)
    elif group_size <= 0 or (group_size % 8 and group_size != in_features):
        raise value_error(op, "group_size", "a positive multiple of 8", group_size)
    if format != "fp8" and in_features % group_size:
        remedy = "choose another group_size" if format != "mxfp4" else "choose another format"
        raise value_error(op, "group_size", f"a divisor of in={in_features}", group_size, remedy)
    _check_splits(op, expert_weights.shape[1], num_splits, interleaved)

    def expert(index: int) -> tuple[Tensor, Tensor]:
        weights = expert_weights[index]
        if not weights.isfinite().all():
            raise value_error(op, "expert_weights", "finite", f"infinity or NaN in expert {index}")
        return reference.quantize(weights, format, group_size)

    with torch.no_grad():
        return _pack_experts(
            tuple(expert_weights.shape), format, group_size, num_splits, interleaved, expert, expert_weights
        )


def quantized_from_fp8(
    weights: Tensor,
    scales: Tensor,
    block_size: tuple[int, int] | None = (128, 128),
    *,
    num_splits: int = 1,
    interleaved: bool = False,
) -> QuantizedWeights:
    """Takes over weights that are stored as e4m3 codes with a scale for each block, bit for bit.

    ``W[o, i] = weights[o, i] * scales[o // block_out, i // block_in]``, as DeepSeek-V3's checkpoints and transformers'
    ``FP8Experts`` (``weight_scale_inv``) hold them.

    Args:
        weights: [num_experts, out, in] float8_e4m3fn with at least one expert.
        scales: [num_experts, ceil(out / block_out), ceil(in / block_in)], any dtype that float32 holds exactly. Zero
            gives zero weights; NaN, infinity and what makes weights too large for float32 are refused.
        block_size: (block_out, block_in), block_in a multiple of 8 or at least ``in``. None: one scale for a matrix
            (scales [num_experts, 1, 1]) or for each of several equal runs of rows (scales [num_experts, runs, 1]).
        num_splits, interleaved: as in :func:`quantize`.

    Raises:
        ValueError, TypeError: as :func:`quantize`; also for a code that is no number.
    """
    op = "quantized_from_fp8"
    check_tensor(op, "weights", weights)
    check_tensor(op, "scales", scales)
    if weights.dtype != torch.float8_e4m3fn:
        raise dtype_error(op, "weights", torch.float8_e4m3fn, weights)
    if weights.dim() != 3 or weights.shape[0] == 0:
        raise shape_error(op, "weights", "[num_experts, out, in] with at least one expert", weights)
    num_experts, out, in_features = weights.shape
    if block_size is None:
        runs = scales.shape[1] if scales.dim() == 3 else 1
        block_out, block_in = -(-out // max(1, runs)), max(1, in_features)
    else:
        block_out, block_in = block_size
    if block_out <= 0 or block_in <= 0 or (block_in % 8 and block_in < in_features):
        raise value_error(op, "block_size", "positive, block_in a multiple of 8 or at least in", (block_out, block_in))
    if scales.shape != (num_experts, -(-out // block_out), -(-in_features // block_in)):
        expected = f"[num_experts={num_experts}, {-(-out // block_out)}, {-(-in_features // block_in)}]"
        raise shape_error(op, "scales", expected, scales)
    _check_splits(op, out, num_splits, interleaved)
    _check_scales(op, scales)

    def expert(index: int) -> tuple[Tensor, Tensor]:
        codes = weights[index].contiguous().view(torch.uint8)
        if (codes & 127 == 127).any():
            raise value_error(op, "weights", "numbers", f"NaN in expert {index}")
        return codes, scales[index].float().repeat_interleave(block_out, 0)[:out]

    return _pack_experts((num_experts, out, in_features), "fp8", block_in, num_splits, interleaved, expert, weights)


def quantized_from_mxfp4(
    blocks: Tensor, scales: Tensor, *, num_splits: int = 1, interleaved: bool = False
) -> QuantizedWeights:
    """Takes over MXFP4 weights in the layout of GPT-OSS's checkpoints, bit for bit.

    ``W[o, 32 g + 2 b + h] = e2m1(nibble h of blocks[o, g, b]) * 2 ** (scales[o, g] - 127)``, the low nibble first.

    Args:
        blocks: [num_experts, out, in / 32, 16] uint8 with at least one expert.
        scales: [num_experts, out, in / 32] uint8 (e8m0), at most 252: float32 does not hold all weights of larger ones,
            and 255 is no number.
        num_splits, interleaved: as in :func:`quantize`; GPT-OSS's gate_up_proj has ``num_splits=2, interleaved=True``.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit; the message names the argument.
    """
    op = "quantized_from_mxfp4"
    for argument, tensor in (("blocks", blocks), ("scales", scales)):
        check_tensor(op, argument, tensor)
        if tensor.dtype != torch.uint8:
            raise dtype_error(op, argument, torch.uint8, tensor)
    if blocks.dim() != 4 or blocks.shape[3] != 16 or blocks.shape[0] == 0:
        raise shape_error(op, "blocks", "[num_experts, out, in / 32, 16] with at least one expert", blocks)
    if scales.shape != blocks.shape[:3]:
        raise shape_error(op, "scales", f"{list(blocks.shape[:3])} like blocks", scales)
    num_experts, out, num_groups, _ = blocks.shape
    _check_splits(op, out, num_splits, interleaved)
    if scales.numel() and scales.max() > 252:
        raise value_error(op, "scales", "at most 252", scales.max().item(), "255 is NaN, and 6 * 2**126 no float32")

    def expert(index: int) -> tuple[Tensor, Tensor]:
        codes = torch.stack((blocks[index] & 15, blocks[index] >> 4), 3).reshape(out, -1)
        return codes, (scales[index].double() - 127).exp2().float()

    return _pack_experts((num_experts, out, 32 * num_groups), "mxfp4", 32, num_splits, interleaved, expert, blocks)


def _check_splits(op: str, out: int, num_splits: int, interleaved: bool) -> None:
    if num_splits not in (1, 2) or out % num_splits:
        raise value_error(op, "num_splits", f"1, or 2 where out={out} is even", num_splits)
    if interleaved and num_splits == 1:
        raise value_error(op, "interleaved", "False where num_splits is 1", interleaved)


def _check_scales(op: str, scales: Tensor) -> None:
    if not (scales.float() * reference.values("fp8").nan_to_num(0).max().item()).isfinite().all():
        raise value_error(op, "scales", "finite, and 448 times them", "NaN, infinity or more than 7.5e35")


def _pack_experts(
    shape: tuple[int, int, int],
    format: str,
    group_size: int,
    num_splits: int,
    interleaved: bool,
    expert: Callable[[int], tuple[Tensor, Tensor]],
    like: Tensor,
) -> QuantizedWeights:
    """One expert at a time, so that little memory is needed beside the result."""
    size = expert_bytes(format, group_size, num_splits, *shape[1:])
    # numpy asks for huge pages where an array is large: fewer look-ups of addresses while weights are read
    data = torch.from_numpy(np.empty((shape[0], size), np.uint8)).to(like.device).zero_()
    for index in range(shape[0]):
        pack(*expert(index), format, group_size, num_splits, interleaved, data[index])
    return QuantizedWeights(data, shape, format, group_size, num_splits, interleaved)
