"""Public functions of token permutation: :func:`plan_dispatch`, :func:`permute`, :func:`unpermute`."""

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
from moe_kernels._dispatch import Backend, resolve
from moe_kernels.ops.permute import autograd, reference
from moe_kernels.ops.permute.plan import DispatchPlan


def plan_dispatch(topk_ids: Tensor, num_experts: int, *, backend: Backend = "auto") -> DispatchPlan:
    """Sorts token-expert pairs by expert, stably (a counting sort).

    Pairs of one expert keep the order of their tokens, so the plan, and every sum that follows it, is deterministic.

    Args:
        topk_ids: [num_tokens, top_k], int32 or int64. A pair whose id is outside [0, num_experts) is skipped: -1 says
            "no expert", and expert parallelism sends ids >= num_experts. num_tokens * top_k must be below 2**31.
        num_experts: number of experts, at least 0.
        backend: see :mod:`moe_kernels`.

    Returns:
        A :class:`DispatchPlan`. Not differentiable (integers).
    """
    check_tensor("plan_dispatch", "topk_ids", topk_ids)
    if topk_ids.dim() != 2:
        raise shape_error("plan_dispatch", "topk_ids", "[num_tokens, top_k]", topk_ids)
    if topk_ids.dtype not in ID_DTYPES:
        raise dtype_error("plan_dispatch", "topk_ids", ID_DTYPES, topk_ids, "cast with .to(torch.int32)")
    if not torch.compiler.is_compiling() and topk_ids.numel() >= 2**31:  # the kernel checks again: no guard on the size
        raise value_error("plan_dispatch", "num_tokens * top_k", "below 2**31", topk_ids.numel(), "split the tokens")
    if not 0 <= num_experts < 2**31:
        raise value_error("plan_dispatch", "num_experts", "in [0, 2**31)", num_experts)
    backend = resolve("plan_dispatch", backend, topk_ids.device.type)
    if backend == "reference":
        return reference.plan_dispatch(topk_ids, num_experts)
    return DispatchPlan(*autograd.kernels(backend).plan_dispatch(topk_ids, num_experts))


def permute(hidden_states: Tensor, plan: DispatchPlan, *, backend: Backend = "auto") -> Tensor:
    """Gathers token rows into expert order.

    ``rows[r] = hidden_states[plan.source_rows[r]]``, zero where ``source_rows[r]`` is -1.

    Args:
        hidden_states: [num_tokens, hidden_size], float32, bfloat16, float16 or float64, any strides.
        plan: of :func:`plan_dispatch` for these tokens.
        backend: see :mod:`moe_kernels`.

    Returns:
        One row for each of ``plan.source_rows``: [num_tokens * top_k, hidden_size], or as many as
        :meth:`DispatchPlan.cut` has left. Dtype and device of ``hidden_states``. Differentiable in ``hidden_states``;
        a token's gradient is the sum of its rows', added in the order of ``topk_ids``' columns in float32.
    """
    check_tensor("permute", "hidden_states", hidden_states)
    if hidden_states.dim() != 2 or hidden_states.shape[0] != plan.permuted_rows.shape[0]:
        expected = f"[num_tokens={plan.permuted_rows.shape[0]}, hidden_size]"
        raise shape_error("permute", "hidden_states", expected, hidden_states)
    if hidden_states.dtype not in FLOAT_DTYPES:
        raise dtype_error("permute", "hidden_states", FLOAT_DTYPES, hidden_states)
    _check_plan("permute", plan)
    if hidden_states.device != plan.source_rows.device:
        check_same_device("permute", hidden_states=hidden_states, source_rows=plan.source_rows)
    backend = resolve("permute", backend, hidden_states.device.type)
    if backend == "reference":
        return reference.permute(hidden_states, plan)
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        return autograd.Permute.apply(hidden_states, plan.source_rows, plan.permuted_rows, backend)
    return autograd.kernels(backend).permute(hidden_states, plan.source_rows)


def unpermute(
    rows: Tensor, plan: DispatchPlan, topk_weights: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """Adds expert-ordered rows back to their tokens, weighted.

    ``out[t] = sum_k topk_weights[t, k] * rows[plan.permuted_rows[t, k]]`` over the pairs that are not skipped.

    Sums run in float32 (float64 for float64 rows) in the order of k and are rounded once.

    Args:
        rows: [num_tokens * top_k, hidden_size], float32, bfloat16, float16 or float64, any strides.
        plan: of :func:`plan_dispatch`. Without weights it may be :meth:`DispatchPlan.cut`, and ``rows`` with it.
        topk_weights: [num_tokens, top_k], any of the same dtypes; None weighs every pair 1.
        backend: see :mod:`moe_kernels`.

    Returns:
        [num_tokens, hidden_size], dtype of ``rows``. Differentiable in ``rows`` and ``topk_weights``; skipped pairs get
        gradient zero.
    """
    check_tensor("unpermute", "rows", rows)
    if rows.dim() != 2 or rows.shape[0] != plan.source_rows.shape[0]:
        expected = f"[{plan.source_rows.shape[0]} like plan.source_rows, hidden_size]"
        raise shape_error("unpermute", "rows", expected, rows)
    if rows.dtype not in FLOAT_DTYPES:
        raise dtype_error("unpermute", "rows", FLOAT_DTYPES, rows)
    _check_plan("unpermute", plan, cut=topk_weights is None)
    if topk_weights is not None:
        check_tensor("unpermute", "topk_weights", topk_weights)
        if topk_weights.shape != plan.permuted_rows.shape:
            raise shape_error("unpermute", "topk_weights", str(list(plan.permuted_rows.shape)), topk_weights)
        if topk_weights.dtype not in FLOAT_DTYPES:
            raise dtype_error("unpermute", "topk_weights", FLOAT_DTYPES, topk_weights)
    if rows.device != plan.permuted_rows.device or (topk_weights is not None and rows.device != topk_weights.device):
        check_same_device("unpermute", rows=rows, permuted_rows=plan.permuted_rows, topk_weights=topk_weights)
    backend = resolve("unpermute", backend, rows.device.type)
    if backend == "reference":
        return reference.unpermute(rows, plan, topk_weights)
    if torch.is_grad_enabled() and (rows.requires_grad or (topk_weights is not None and topk_weights.requires_grad)):
        return autograd.Unpermute.apply(rows, topk_weights, plan.source_rows, plan.permuted_rows, backend)
    return autograd.kernels(backend).unpermute(rows, plan.permuted_rows, topk_weights)


def _check_plan(op: str, plan: DispatchPlan, *, cut: bool = True) -> None:
    num_pairs = plan.permuted_rows.numel()
    whole = plan.source_rows.shape == (num_pairs,)
    if plan.permuted_rows.dim() != 2 or not (whole or cut and plan.source_rows.numel() < num_pairs):
        expected = f"[{num_pairs}], one row for each of plan.permuted_rows"
        raise shape_error(op, "plan.source_rows", expected, plan.source_rows, "make the plan with plan_dispatch")
