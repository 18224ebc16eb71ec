"""Public functions of grouped matrix multiplication: :func:`grouped_gemm`, :func:`prepack`."""

import torch
from torch import Tensor

from moe_kernels._checks import (
    FLOAT_DTYPES,
    check_same_device,
    check_tensor,
    dtype_error,
    shape_error,
    value_error,
)
from moe_kernels._dispatch import Backend, autocast, autocast_enabled, resolve
from moe_kernels.ops.grouped_gemm import autograd, native, reference
from moe_kernels.ops.grouped_gemm.prepacked import PrepackedWeights
from moe_kernels.ops.quantize.quantized import QuantizedWeights

_QUANTIZED_OP = "grouped_gemm of quantised weights"  # kernels for the CPU alone


def grouped_gemm(
    rows: Tensor,
    expert_weights: Tensor | PrepackedWeights | QuantizedWeights,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Multiplies each expert's rows with that expert's matrix.

    ``out[r] = expert_weights[e] @ rows[r] + bias[e]`` for ``expert_offsets[e] <= r < expert_offsets[e + 1]``; rows from
    ``expert_offsets[-1]`` on belong to no expert: their output and their gradient are zero.

    Products accumulate in float32 (float64 for float64) in one fixed order, so a row's result has the same bits
    whatever rows stand beside it and however many threads run.

    Args:
        rows: [num_permuted, in], float32, bfloat16, float16 or float64, any strides.
        expert_weights: [num_experts, out, in], dtype of ``rows``, any strides: a transposed layout [num_experts, in,
            out] is given as ``weights.transpose(1, 2)`` and read in place. Or :func:`prepack` of it, or
            :func:`quantize` of it (no gradient flows to those; native kernels want float32, bfloat16 or float16 rows).
        expert_offsets: [num_experts + 1] int32, starts at 0, never falls, ends at or below num_permuted.
        bias: [num_experts, out], dtype of ``rows``.
        backend: see :mod:`moe_kernels`.

    Returns:
        [num_permuted, out], dtype of ``rows``. Under ``torch.autocast`` the inputs are cast to the autocast dtype, as
        ``F.linear`` does. Differentiable in ``rows``, ``expert_weights`` and ``bias``; an expert
        without rows gets a zero gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names the argument.
        RuntimeError: ``expert_offsets`` is not monotone, or a backend is missing.
    """
    check_tensor("grouped_gemm", "rows", rows)
    check_tensor("grouped_gemm", "expert_offsets", expert_offsets)
    packed = isinstance(expert_weights, PrepackedWeights)
    quantized = isinstance(expert_weights, QuantizedWeights)
    if not packed and not quantized:
        check_tensor("grouped_gemm", "expert_weights", expert_weights)
    device_type = rows.device.type
    if not packed and autocast_enabled(device_type):  # leaves quantised weights alone
        rows, expert_weights, bias = autocast(device_type, rows, expert_weights, bias)
    if rows.dim() != 2:
        raise shape_error("grouped_gemm", "rows", "[num_permuted, in]", rows)
    if rows.dtype not in FLOAT_DTYPES:
        raise dtype_error("grouped_gemm", "rows", FLOAT_DTYPES, rows)
    if len(expert_weights.shape) != 3 or expert_weights.shape[2] != rows.shape[1]:
        raise shape_error("grouped_gemm", "expert_weights", f"[num_experts, out, in={rows.shape[1]}]", expert_weights)
    if not quantized and expert_weights.dtype != rows.dtype:
        raise dtype_error("grouped_gemm", "expert_weights", rows.dtype, expert_weights, "it must equal that of rows")
    num_experts, out_features, _ = expert_weights.shape
    if expert_offsets.shape != (num_experts + 1,):
        raise shape_error("grouped_gemm", "expert_offsets", f"[num_experts + 1={num_experts + 1}]", expert_offsets)
    if expert_offsets.dtype != torch.int32:
        raise dtype_error("grouped_gemm", "expert_offsets", torch.int32, expert_offsets, "cast with .to(torch.int32)")
    if bias is not None:
        check_bias("grouped_gemm", "bias", bias, (num_experts, out_features), rows.dtype)
    device = rows.device
    if not (device == expert_weights.device == expert_offsets.device) or (bias is not None and bias.device != device):
        check_same_device(
            "grouped_gemm", rows=rows, expert_weights=expert_weights, expert_offsets=expert_offsets, bias=bias
        )
    chosen = resolve(_QUANTIZED_OP if quantized else "grouped_gemm", backend, device_type)
    if packed:
        check_prepacked("grouped_gemm", "expert_weights", expert_weights, chosen, 1, False, rows, bias)
    elif quantized:
        check_quantized("grouped_gemm", "expert_weights", expert_weights, "rows", rows, chosen, 1, False)
    if chosen == "reference":
        weights = expert_weights.dequantize(rows.dtype) if quantized else expert_weights
        return reference.grouped_gemm(rows, weights, expert_offsets, bias)
    weights = expert_weights.data if packed or quantized else expert_weights
    if torch.is_grad_enabled() and (
        rows.requires_grad or expert_weights.requires_grad or (bias is not None and bias.requires_grad)
    ):
        held = expert_weights if quantized else None
        return autograd.GroupedGemm.apply(rows, weights, expert_offsets, bias, held, chosen)
    return autograd.kernels(chosen).grouped_gemm(rows, weights, expert_offsets, bias, out_features)


def prepack(expert_weights: Tensor, *, num_splits: int = 1, interleaved: bool = False) -> PrepackedWeights:
    """Copies expert weights into the order in which the CPU kernels of this machine read them.

    The copy is read as one stream, and a transposed layout is turned once instead of in each call. For finite inputs it
    gives the same bits as contiguous [num_experts, out, in] weights. It is a new tensor of the size of the original
    (each dimension rounded up to a few rows and one vector; see ``PrepackedWeights.nbytes``); the caller's tensor is
    left as it is. It serves one vector length: a copy of another layout is refused.

    Args:
        expert_weights: [num_experts, out, in], float32, bfloat16 or float16, any strides, on the CPU.
        num_splits: 2 for a gated expert's gate_up_proj (its gate and its up rows), else 1.
        interleaved: whether those two alternate row by row (GPT-OSS) instead of following each other.

    Returns:
        A :class:`PrepackedWeights`. Gradients do not flow through it.
    """
    check_tensor("prepack", "expert_weights", expert_weights)
    if expert_weights.dim() != 3:
        raise shape_error("prepack", "expert_weights", "[num_experts, out, in]", expert_weights)
    if expert_weights.dtype not in FLOAT_DTYPES[:3]:
        raise dtype_error("prepack", "expert_weights", FLOAT_DTYPES[:3], expert_weights)
    if num_splits not in (1, 2) or expert_weights.shape[1] % num_splits:
        raise value_error("prepack", "num_splits", f"1, or 2 where out={expert_weights.shape[1]} is even", num_splits)
    if interleaved and num_splits == 1:
        raise value_error("prepack", "interleaved", "False where num_splits is 1", interleaved)
    resolve("prepack", "native", expert_weights.device.type)
    data = native.prepack(expert_weights.detach(), num_splits, interleaved)
    return PrepackedWeights(data, tuple(expert_weights.shape), interleaved)


def check_bias(op: str, argument: str, bias: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Raises where ``bias`` is not a tensor of that shape and dtype."""
    check_tensor(op, argument, bias)
    if bias.shape != shape:
        raise shape_error(op, argument, str(list(shape)), bias)
    if bias.dtype != dtype:
        raise dtype_error(op, argument, dtype, bias, "it must equal that of the rows")


def check_prepacked(
    op: str,
    argument: str,
    weights: PrepackedWeights,
    backend: str,
    num_splits: int,
    interleaved: bool,
    *inputs: Tensor | None,
) -> None:
    """Raises where prepacked weights meet another backend or use than theirs, or a gradient is asked through them."""
    if backend != "native":
        raise value_error(op, argument, f"a plain tensor for backend='{backend}'", "prepacked weights")
    if weights.data.shape[1] != num_splits or weights.interleaved != interleaved:
        made = f"num_splits={weights.data.shape[1]}, interleaved={weights.interleaved}"
        raise value_error(op, argument, f"prepacked with num_splits={num_splits}, interleaved={interleaved}", made)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        raise value_error(op, argument, "a plain tensor where a gradient is needed", "prepacked weights")


def check_quantized(
    op: str,
    argument: str,
    weights: QuantizedWeights,
    input_argument: str,
    inputs: Tensor,
    backend: str,
    num_splits: int,
    interleaved: bool,
) -> None:
    """Raises where quantised weights meet inputs that no kernel multiplies them with, or another use than theirs."""
    if backend != "reference" and inputs.dtype == torch.float64:
        remedy = f"cast {input_argument}, or use backend='reference'"
        raise dtype_error(op, input_argument, FLOAT_DTYPES[:3], inputs, f"weights are quantised: {remedy}")
    if weights.num_splits != num_splits or weights.interleaved != interleaved:
        made = f"num_splits={weights.num_splits}, interleaved={weights.interleaved}"
        raise value_error(op, argument, f"quantised with num_splits={num_splits}, interleaved={interleaved}", made)
