"""Routing that the caller decides: :func:`route_forced`, and all experts at once: :func:`route_soft`."""

import torch
from torch import Tensor

from moe_kernels._checks import ID_DTYPES, check_tensor, dtype_error, shape_error
from moe_kernels._dispatch import Backend
from moe_kernels.ops.route.api import check_logits, route_weights


def route_forced(
    expert_ids: Tensor,
    *,
    sequence_ids: Tensor | None = None,
    logits: Tensor | None = None,
    score: str = "softmax",
    renormalize: bool = False,
    scaling_factor: float = 1.0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Sends tokens or whole sequences to the experts that the caller names.

    ``topk_ids[t] = expert_ids[t]``, or ``expert_ids[sequence_ids[t]]``; weights are 1, or what the router gives to
    these experts (:func:`route_weights`).

    Args:
        expert_ids: [num_tokens] or [num_tokens, top_k] (with ``sequence_ids``: num_sequences rows), int32 or int64, -1
            for none.
        sequence_ids: [num_tokens], int32 or int64, the row of ``expert_ids`` that each token takes; -1 routes a token
            (padding) nowhere.
        logits: [num_tokens, num_experts] to weigh the experts by; None weighs each of them 1.
        score, renormalize, scaling_factor: of the weights, see :func:`route`; without ``logits`` not used.
        backend: see :mod:`moe_kernels`.

    Returns:
        topk_ids [num_tokens, top_k] int32 and topk_weights float32 (float64 for float64 logits), differentiable in
        ``logits``.

    Sources: Composition of Experts, arXiv 2412.01868 (a router of its own picks one expert for each prompt); routing by
    task or language label.
    """
    check_tensor("route_forced", "expert_ids", expert_ids)
    if expert_ids.dim() == 1:
        expert_ids = expert_ids[:, None]
    if expert_ids.dim() != 2:
        raise shape_error("route_forced", "expert_ids", "[num_tokens] or [num_tokens, top_k]", expert_ids)
    if expert_ids.dtype not in ID_DTYPES:
        raise dtype_error("route_forced", "expert_ids", ID_DTYPES, expert_ids)
    topk_ids = expert_ids.clamp(-1, 2**31 - 1).to(torch.int32)
    if sequence_ids is not None:
        check_tensor("route_forced", "sequence_ids", sequence_ids)
        if sequence_ids.dim() != 1:
            raise shape_error("route_forced", "sequence_ids", "[num_tokens]", sequence_ids)
        if sequence_ids.dtype not in ID_DTYPES:
            raise dtype_error("route_forced", "sequence_ids", ID_DTYPES, sequence_ids)
        # row -1 is a row of its own, after the last sequence
        topk_ids = torch.cat([topk_ids, topk_ids.new_full((1, topk_ids.shape[1]), -1)])[sequence_ids.long()]
    if logits is not None:
        options = {"score": score, "renormalize": renormalize, "scaling_factor": scaling_factor, "backend": backend}
        return topk_ids, route_weights(logits, topk_ids, **options)
    return topk_ids, (topk_ids >= 0).float()


def route_soft(
    logits: Tensor, *, score: str = "softmax", scaling_factor: float = 1.0, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Sends every token to every expert, weighted: a dense mixture.

    Column e of the result is expert e, so ``topk_weights`` is the matrix of scores of :func:`route`; weights of masked
    experts are 0.

    Args:
        logits: [num_tokens, num_experts], float32, bfloat16, float16 or float64, any strides.
        score: "softmax" or "sigmoid".
        scaling_factor: multiplies the weights.
        backend: see :mod:`moe_kernels`.

    Returns:
        topk_ids [num_tokens, num_experts] int32, -1 where the logit is -inf or the row is broken, and topk_weights of
        that shape, float32 (float64 for float64 logits), differentiable in ``logits``.

    Sources: Jacobs et al., "Adaptive Mixtures of Local Experts", 1991; LoRAMoE, arXiv 2312.09979; BAM,
    arXiv 2408.08274.
    """
    check_logits("route_soft", logits)
    experts = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device).expand(logits.shape)
    # finite where it can be weighed: a masked expert costs nothing, and a row with NaN or +inf goes nowhere
    broken = (logits.isnan() | (logits == torch.inf)).any(1, keepdim=True)
    topk_ids = experts.masked_fill(broken | (logits == -torch.inf), -1)
    return topk_ids, route_weights(logits, topk_ids, score=score, scaling_factor=scaling_factor, backend=backend)
