"""Public function of the room: :func:`ternary_linear`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels._checks import (
    FLOAT_DTYPES,
    ID_DTYPES,
    check_same_device,
    check_tensor,
    dtype_error,
    shape_error,
    value_error,
)
from moe_kernels._dispatch import Backend, autocast, autocast_enabled, resolve
from moe_kernels.ops.task_vector.ternary import TernaryDelta
from moe_kernels.ops.ternary_linear import autograd, native, reference


def ternary_linear(
    x: Tensor,
    weight: Tensor,
    deltas: Sequence[TernaryDelta],
    delta_ids: Tensor | None = None,
    delta_weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    coefficients: float | Sequence[float] = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """A linear layer whose tokens each add their own task vectors to the weight, which stays as it is.

    With ``e = delta_ids[t, k]``, ``a = delta_weights[t, k] * coefficients[e]`` and ``T_e`` the signs of a delta::

        out[t] = (W + sum_k a * scale_e * T_e) x[t] + bias

    ``W + aT`` is never made: tokens of one batch may use different fine-tunes of one weight, and several each, while
    the weight is in memory once and a fine-tune costs two bits a parameter. The CPU's kernels read the rows of W and
    of each delta once for a block of tokens; sums run in float32 (float64 for float64) and are rounded once: the
    product with W, then the deltas in the order of ``deltas``, then the bias. A token's result has the same bits
    whatever tokens stand beside it and however many threads run.

    Args:
        x: [..., in_features], float32, bfloat16, float16 or float64.
        weight: [out_features, in_features], dtype of ``x``, any strides.
        deltas: of the weight's shape, on its device. They are constants.
        delta_ids: [num_tokens, K] or [num_tokens], int32 or int64, with num_tokens the product of the leading
            dimensions of ``x``. -1, and all else outside of [0, len(deltas)), is no delta. None: every token uses every
            delta.
        delta_weights: like ``delta_ids``, or without ids [num_tokens, len(deltas)]; any float dtype; None: each 1.
        bias: [out_features], dtype of ``x``.
        coefficients: one number for each delta, or one for all; they multiply ``delta.scale``.
        backend: see :mod:`moe_kernels`.

    Returns:
        [..., out_features], dtype of ``x``. Under ``torch.autocast`` x, weight and bias are cast to the autocast dtype.
        Differentiable in ``x``, ``weight``, ``bias`` and ``delta_weights``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or coefficients that do not fit; the message names the argument.

    Sources: ComPEFT (arXiv 2311.13171) for ternary task vectors, Punica (arXiv 2310.18547) for one batch of many
    adapters; DeltaZip (arXiv 2312.05215) and BitDelta (arXiv 2402.10193) serve dense deltas, one a request.
    """
    op = "ternary_linear"
    for name, tensor in (("x", x), ("weight", weight)):
        check_tensor(op, name, tensor)
    if autocast_enabled(x.device.type):
        x, weight, bias = autocast(x.device.type, x, weight, bias)
    if x.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, "x", FLOAT_DTYPES, x)
    if weight.dim() != 2:
        raise shape_error(op, "weight", "[out_features, in_features]", weight)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise shape_error(op, "x", f"[..., in_features={weight.shape[1]}]", x)
    if weight.dtype != x.dtype:
        raise dtype_error(op, "weight", x.dtype, weight, "it must equal that of x")
    if bias is not None:
        check_tensor(op, "bias", bias)
        if bias.shape != weight.shape[:1]:
            raise shape_error(op, "bias", f"[out_features={weight.shape[0]}]", bias)
        if bias.dtype != x.dtype:
            raise dtype_error(op, "bias", x.dtype, bias, "it must equal that of x")
    deltas, values = _check_deltas(op, weight, deltas, coefficients)
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)
    delta_ids, delta_weights = _check_pairs(op, len(deltas), rows.shape[0], delta_ids, delta_weights)
    planes = [delta.planes for delta in deltas]
    check_same_device(
        op, x=x, weight=weight, bias=bias, delta_ids=delta_ids, delta_weights=delta_weights,
        **{f"deltas[{i}]": tensor for i, tensor in enumerate(planes)},
    )  # fmt: skip
    differentiable = (x, weight, bias, delta_weights)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    backend = resolve(_named(op, rows, needs_grad), backend, x.device.type)
    if backend == "reference":
        out = reference.ternary_linear(rows, weight, deltas, values, delta_ids, delta_weights, bias)
    elif backend == "triton":
        from moe_kernels.ops.ternary_linear import triton  # imported when it is first asked for

        out = triton.ternary_linear(rows, weight, planes, values, delta_ids, delta_weights, bias)
    elif needs_grad:
        out = autograd.TernaryLinear.apply(rows, weight, delta_weights, bias, delta_ids, values, *planes)
    else:
        out = native.ternary_linear(rows, weight, planes, values, delta_ids, delta_weights, bias)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _named(op: str, rows: Tensor, needs_grad: bool) -> str:
    """What :func:`resolve` knows the op as: the CUDA kernel is for few tokens of 16 bits."""
    if needs_grad:
        return f"{op} with gradients"
    if rows.device.type == "cuda" and (rows.dtype.itemsize != 2 or rows.shape[0] > 64):
        return f"{op} of many or wide tokens"
    return op


def _check_deltas(op: str, weight: Tensor, deltas, coefficients) -> tuple[list[TernaryDelta], list[float]]:
    """The deltas, and what one step of each is worth."""
    deltas = [deltas] if isinstance(deltas, TernaryDelta) else list(deltas)
    for i, delta in enumerate(deltas):
        if not isinstance(delta, TernaryDelta):
            raise TypeError(f"{op}: deltas[{i}] must be a TernaryDelta, got {type(delta).__name__}; call decompress")
        if delta.shape != weight.shape:
            raise shape_error(op, "weight", str(list(delta.shape)), weight, "the task vector is of another tensor")
    many = not isinstance(coefficients, (int, float))
    given = [float(one) for one in coefficients] if many else [float(coefficients)] * len(deltas)
    if len(given) != len(deltas):
        raise value_error(op, "coefficients", f"one number or {len(deltas)}, one a delta", f"{len(given)}")
    values = [one * delta.scale for one, delta in zip(given, deltas, strict=True)]
    if not all(abs(value) < math.inf for value in values):  # math.isfinite is not traced
        raise value_error(op, "coefficients", "finite, times the scales too", given)
    return deltas, values


def _check_pairs(op: str, num_deltas: int, num_tokens: int, delta_ids: Tensor | None, delta_weights: Tensor | None):
    """delta_ids and delta_weights as [num_tokens, K]."""
    top_k = num_deltas
    if delta_ids is not None:
        check_tensor(op, "delta_ids", delta_ids)
        if delta_ids.dtype not in ID_DTYPES:
            raise dtype_error(op, "delta_ids", ID_DTYPES, delta_ids, "cast with .to(torch.int32)")
        if delta_ids.dim() not in (1, 2) or delta_ids.shape[0] != num_tokens:
            raise shape_error(op, "delta_ids", f"[num_tokens={num_tokens}] or [num_tokens, K]", delta_ids)
        if delta_ids.dim() == 1:
            delta_ids = delta_ids[:, None]
            if isinstance(delta_weights, Tensor) and delta_weights.dim() == 1:
                delta_weights = delta_weights[:, None]
        top_k = delta_ids.shape[1]
    if delta_weights is not None:
        check_tensor(op, "delta_weights", delta_weights)
        if delta_weights.shape != (num_tokens, top_k):
            raise shape_error(op, "delta_weights", f"[num_tokens={num_tokens}, {top_k}]", delta_weights)
        if delta_weights.dtype not in FLOAT_DTYPES:
            raise dtype_error(op, "delta_weights", FLOAT_DTYPES, delta_weights)
    return delta_ids, delta_weights
