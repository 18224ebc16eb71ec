"""Routing by scores: :func:`route`, and :func:`route_weights` for experts that something else chose."""

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
from moe_kernels.ops.route import autograd, reference

#: position in these tuples is the code that the kernels take (csrc/ops/route/route_cpu.cpp)
SCORES = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2_sum")


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = False,
    scaling_factor: float = 1.0,
    expert_bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int | None = None,
    group_score: str = "max",
    num_null_experts: int = 0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Chooses each token's experts and their weights.

    With s = softmax(logits) or sigmoid(logits), in float32, and c = s + expert_bias::

        group score = max of c in the group, or the sum of its two largest c
        topk_ids    = the top_k largest c among the topk_groups best groups
        weights     = s[topk_ids]                                   the bias chooses, it does not weigh
        weights    /= sum(weights) + 1e-20                          if renormalize
        weights    *= scaling_factor

    Ties take the lowest expert (and group) id first. Picks come in falling order of c.

    What the routers of transformers call this:

    ================================  ==========================================================================
    Mixtral, Qwen-MoE with            ``renormalize=True``
    norm_topk_prob, GPT-OSS           (the softmax over the chosen logits is the renormalised softmax)
    OLMoE, Qwen-MoE without           the defaults
    DeepSeek-V2 greedy                ``scaling_factor=…``
    DeepSeek-V2 group_limited_greedy  ``num_groups=n_group, topk_groups=…, scaling_factor=…``
    DeepSeek-V3                       ``score="sigmoid", renormalize=True, scaling_factor=…, expert_bias=…,
                                      num_groups=…, topk_groups=…, group_score="top2_sum"``
    Llama-4                           ``top_k=1, score="sigmoid"``
    AdaMoE (null experts)             ``num_null_experts=…, renormalize=True``
    LongCat-Flash (zero experts)      ``scaling_factor=…, expert_bias=…`` over the logits of both, and
                                      :func:`identity_weights`
    ================================  ==========================================================================

    Args:
        logits: [num_tokens, num_experts], float32, bfloat16, float16 or float64, any strides.
        top_k: picks for each token, 0 to num_experts.
        score: "softmax" or "sigmoid".
        renormalize: divide the chosen weights by their sum.
        scaling_factor: multiplies the weights.
        expert_bias: [num_experts] float32 or float64, added to the scores for the choice alone: what balances experts
            in training (:func:`update_expert_bias_`) and switches them at inference (:func:`tune_experts`): -inf and
            NaN take an expert out, +inf forces it. Not differentiated.
        num_groups: number of equal, contiguous groups of experts; divides num_experts.
        topk_groups: groups that stay eligible, 1 to num_groups; None keeps all.
        group_score: "max" (DeepSeek-V2) or "top2_sum" (DeepSeek-V3); a forced expert forces its group.
        num_null_experts: how many of the last logits belong to experts that compute nothing. A null pick keeps its id,
            which is past the last real expert and so skipped by every kernel, and weighs 0; ``renormalize`` divides by
            the sum over the real picks.
        backend: see :mod:`moe_kernels`.

    Returns:
        topk_ids [num_tokens, top_k] int32 and topk_weights [num_tokens, top_k] float32 (float64 for float64 logits).
        An expert whose logit is -inf, or whose bias is NaN, is never chosen; where fewer than top_k experts are left
        (masks, small groups) the remaining picks are -1 with weight 0. A row that holds NaN or +inf is routed nowhere:
        all -1 with weight 0.
        Weights are differentiable in ``logits``.

    Sources: the modeling files of transformers 5.23; DeepSeek-V3, arXiv 2412.19437 (bias and groups); AdaMoE,
    arXiv 2406.13233 (null experts).
    """
    check_logits("route", logits)
    num_experts = logits.shape[1]
    if not 0 <= top_k <= num_experts:
        raise value_error("route", "top_k", f"in [0, num_experts={num_experts}]", top_k)
    check_score("route", score)
    if group_score not in GROUP_SCORES:
        raise value_error("route", "group_score", f"one of {', '.join(GROUP_SCORES)}", repr(group_score))
    if num_groups < 1 or num_experts % num_groups:
        raise value_error("route", "num_groups", f"a divisor of num_experts={num_experts}", num_groups)
    if topk_groups is None:
        topk_groups = num_groups
    if not 1 <= topk_groups <= num_groups:
        raise value_error("route", "topk_groups", f"in [1, num_groups={num_groups}]", topk_groups)
    if expert_bias is not None:
        check_tensor("route", "expert_bias", expert_bias)
        if expert_bias.shape != (num_experts,):
            raise shape_error("route", "expert_bias", f"[num_experts={num_experts}]", expert_bias)
        if expert_bias.dtype not in (FLOAT_DTYPES[0], FLOAT_DTYPES[3]):
            raise dtype_error("route", "expert_bias", (FLOAT_DTYPES[0], FLOAT_DTYPES[3]), expert_bias)
        check_same_device("route", logits=logits, expert_bias=expert_bias)
        expert_bias = expert_bias.detach()
    if not 0 <= num_null_experts <= num_experts:
        raise value_error("route", "num_null_experts", f"in [0, num_experts={num_experts}]", num_null_experts)
    arguments = (
        expert_bias,
        top_k,
        SCORES.index(score),
        renormalize,
        float(scaling_factor),
        num_groups,
        topk_groups,
        GROUP_SCORES.index(group_score),
        num_null_experts,
    )
    return run("route", backend, logits, arguments, autograd.Route)


def route_weights(
    logits: Tensor,
    topk_ids: Tensor,
    *,
    score: str = "softmax",
    renormalize: bool = False,
    scaling_factor: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """Weighs experts that something else chose: a label, a capacity, another router.

    ``topk_weights[t, k] = scaling_factor * s[t, topk_ids[t, k]]``, divided by the sum over k if renormalize, with the
    scores s of :func:`route`. An id outside [0, num_experts), an expert whose logit is -inf and a row that holds NaN or
    +inf weigh 0.

    Args:
        logits: [num_tokens, num_experts], float32, bfloat16, float16 or float64, any strides.
        topk_ids: [num_tokens, top_k], int32 or int64.
        score: "softmax" or "sigmoid".
        renormalize: divide a token's weights by their sum.
        scaling_factor: multiplies the weights.
        backend: see :mod:`moe_kernels`.

    Returns:
        [num_tokens, top_k] float32 (float64 for float64 logits), differentiable in ``logits``.
    """
    check_logits("route_weights", logits)
    check_ids("route_weights", topk_ids, logits.shape[0])
    check_score("route_weights", score)
    check_same_device("route_weights", logits=logits, topk_ids=topk_ids)
    topk_ids = topk_ids.clamp(-1, logits.shape[1]).to(torch.int32)  # an int64 id past 2**31 must not wrap into range
    arguments = (topk_ids, SCORES.index(score), renormalize, float(scaling_factor))
    return run("route_weights", backend, logits, arguments, autograd.RouteWeights)


def run(op: str, backend: Backend, logits: Tensor, arguments: tuple, function: type[torch.autograd.Function]):
    """The one dispatch of every routing op that has a gradient in its logits."""
    backend = resolve(op, backend, logits.device.type)
    if backend == "reference":
        return getattr(reference, op)(logits, *arguments)
    if torch.is_grad_enabled() and logits.requires_grad:
        return function.apply(logits, *arguments, backend)
    return getattr(autograd.kernels(backend), op)(logits, *arguments)


def check_logits(op: str, logits: Tensor) -> None:
    check_tensor(op, "logits", logits)
    if logits.dim() != 2:
        raise shape_error(op, "logits", "[num_tokens, num_experts]", logits)
    if logits.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, "logits", FLOAT_DTYPES, logits)


def check_score(op: str, score: str) -> None:
    if score not in SCORES:
        raise value_error(op, "score", f"one of {', '.join(SCORES)}", repr(score))


def check_ids(op: str, topk_ids: Tensor, num_tokens: int | None = None) -> None:
    check_tensor(op, "topk_ids", topk_ids)
    if topk_ids.dim() != 2 or (num_tokens is not None and topk_ids.shape[0] != num_tokens):
        expected = "[num_tokens, top_k]" if num_tokens is None else f"[num_tokens={num_tokens}, top_k]"
        raise shape_error(op, "topk_ids", expected, topk_ids)
    if topk_ids.dtype not in ID_DTYPES:
        raise dtype_error(op, "topk_ids", ID_DTYPES, topk_ids, "cast with .to(torch.int32)")
