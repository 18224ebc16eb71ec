"""Triton kernels of routing, under the names of the compiled ops (native.py). One program routes one token.

Launches depend on shapes alone. autograd.py has the gradient's equations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SIGMOID = 1  # position in api.SCORES
TOP2_SUM = 1  # position in api.GROUP_SCORES


@triton.jit
def _load_scores(
    logits_ptr, token, experts, inside, token_stride, expert_stride, SIGMOID: tl.constexpr, ACC: tl.constexpr
):
    """Logits, scores, and whether the row can be routed: some logit above -inf, and neither NaN nor +inf."""
    at = token * token_stride + experts.to(tl.int64) * expert_stride
    logits = tl.load(logits_ptr + at, mask=inside, other=float("-inf")).to(ACC)
    broken = tl.max(((logits != logits) | (logits == float("inf"))).to(tl.int32), 0) > 0
    logits = tl.where(broken, float("-inf"), logits)
    largest = tl.max(logits, 0)
    routable = largest > float("-inf")
    if SIGMOID:
        scores = 1 / (1 + tl.exp(-logits))
    else:
        powers = tl.exp(logits - tl.where(routable, largest, 0))
        scores = powers / tl.where(routable, tl.sum(powers, 0), 1)
    return logits, scores, routable


@triton.jit
def _first_best(values, ids):
    """The largest value and the lowest id that has it."""
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, ids, 0x7FFFFFFF), 0)


@triton.jit
def _route_kernel(
    logits_ptr,  # [num_tokens, num_experts], any strides
    bias_ptr,  # [num_experts]
    ids_ptr,  # [num_tokens, top_k]
    weights_ptr,  # [num_tokens, top_k]
    num_experts,
    num_weighed,
    token_stride,
    expert_stride,
    bias_stride,
    top_k,
    scaling_factor,
    num_groups,
    topk_groups,
    group_size,
    HAS_BIAS: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    LIMIT_GROUPS: tl.constexpr,
    TOP2_SUM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_PICKS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_EXPERTS)
    inside = experts < num_experts
    logits, scores, _ = _load_scores(logits_ptr, token, experts, inside, token_stride, expert_stride, SIGMOID, ACC)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + experts.to(tl.int64) * bias_stride, mask=inside, other=0).to(ACC)
    choice = tl.where((logits > float("-inf")) & (choice == choice), choice, float("-inf"))
    if LIMIT_GROUPS:
        groups = tl.arange(0, BLOCK_GROUPS)
        group_scores = tl.full((BLOCK_GROUPS,), float("-inf"), ACC)
        for group in range(num_groups):
            members = tl.where(inside & (experts // group_size == group), choice, float("-inf"))
            score, first = _first_best(members, experts)
            if TOP2_SUM:
                second = tl.max(tl.where(experts == first, float("-inf"), members), 0)
                # an expert that is forced by a bias of +inf forces its group, whatever stands beside it
                score = tl.where(score < float("inf"), tl.where(group_size > 1, score + second, score), score)
            group_scores = tl.where(groups == group, score, group_scores)
        free = groups < num_groups
        eligible = tl.zeros((BLOCK_EXPERTS,), tl.int32)
        for _ in range(topk_groups):  # groups at -inf fill up, lowest first
            best = tl.max(tl.where(free, group_scores, float("-inf")), 0)
            chosen = tl.min(tl.where(free & (group_scores == best), groups, 0x7FFFFFFF), 0)
            free = free & (groups != chosen)
            eligible = tl.where(experts // group_size == chosen, 1, eligible)
        choice = tl.where(eligible > 0, choice, float("-inf"))

    picks = tl.arange(0, BLOCK_PICKS)
    weights = tl.zeros((BLOCK_PICKS,), ACC)
    for k in range(top_k):
        best, expert = _first_best(choice, experts)
        found = best > float("-inf")
        tl.store(ids_ptr + token * top_k + k, tl.where(found, expert, -1))
        score = tl.sum(tl.where((experts == expert) & (experts < num_weighed), scores, 0), 0)
        weights = tl.where(picks == k, tl.where(found, score, 0), weights)
        choice = tl.where(experts == expert, float("-inf"), choice)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    tl.store(weights_ptr + token * top_k + picks, weights * scaling_factor, mask=picks < top_k)


@triton.jit
def _route_weights_kernel(
    logits_ptr,  # [num_tokens, num_experts], any strides
    ids_ptr,  # [num_tokens, top_k]
    weights_ptr,  # [num_tokens, top_k]
    num_experts,
    token_stride,
    expert_stride,
    top_k,
    scaling_factor,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_PICKS: tl.constexpr,
):
    """Weights of experts that something else chose."""
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_EXPERTS)
    inside = experts < num_experts
    _, scores, routable = _load_scores(logits_ptr, token, experts, inside, token_stride, expert_stride, SIGMOID, ACC)
    picks = tl.arange(0, BLOCK_PICKS)
    weights = tl.zeros((BLOCK_PICKS,), ACC)
    for k in range(top_k):
        expert = tl.load(ids_ptr + token * top_k + k)
        score = tl.sum(tl.where((experts == expert) & inside, scores, 0), 0)
        weights = tl.where(picks == k, tl.where(routable, score, 0), weights)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    tl.store(weights_ptr + token * top_k + picks, weights * scaling_factor, mask=picks < top_k)


@triton.jit
def _route_bwd_kernel(
    logits_ptr,  # [num_tokens, num_experts], any strides
    ids_ptr,  # [num_tokens, top_k]
    grad_weights_ptr,  # [num_tokens, top_k]
    grad_logits_ptr,  # [num_tokens, num_experts]
    num_experts,
    num_weighed,
    token_stride,
    expert_stride,
    top_k,
    scaling_factor,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_EXPERTS)
    inside = experts < num_experts
    _, scores, routable = _load_scores(logits_ptr, token, experts, inside, token_stride, expert_stride, SIGMOID, ACC)
    weighed = inside & (experts < num_weighed)
    total = tl.zeros((), ACC) + 1e-20
    weighted = tl.zeros((), ACC)
    if RENORMALIZE:
        for k in range(top_k):
            expert = tl.load(ids_ptr + token * top_k + k)
            score = tl.sum(tl.where(weighed & (experts == expert), scores, 0), 0)
            total += score
            weighted += tl.load(grad_weights_ptr + token * top_k + k) * score
    grad_scores = tl.zeros((BLOCK_EXPERTS,), ACC)
    for k in range(top_k):
        expert = tl.load(ids_ptr + token * top_k + k)
        grad = tl.load(grad_weights_ptr + token * top_k + k)
        if RENORMALIZE:
            grad = (grad - weighted / total) / total
        grad_scores += tl.where(weighed & (experts == expert), grad * scaling_factor, 0)
    if SIGMOID:
        grad_logits = grad_scores * scores * (1 - scores)
    else:
        grad_logits = scores * (grad_scores - tl.sum(grad_scores * scores, 0))
    grad_logits = tl.where(routable, grad_logits, 0).to(grad_logits_ptr.dtype.element_ty)
    tl.store(grad_logits_ptr + token * num_experts + experts, grad_logits, mask=inside)


def route(
    logits: Tensor,
    expert_bias: Tensor | None,
    top_k: int,
    score: int,
    renormalize: bool,
    scaling_factor: float,
    num_groups: int,
    topk_groups: int,
    group_score: int,
    num_null_experts: int,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    topk_ids = logits.new_empty((num_tokens, top_k), dtype=torch.int32)
    topk_weights = logits.new_empty((num_tokens, top_k), dtype=_acc_dtype(logits))
    if topk_ids.numel() > 0:
        bias = logits if expert_bias is None else expert_bias  # any pointer: it is not read
        with torch.cuda.device_of(logits):
            _route_kernel[(num_tokens,)](
                logits, bias, topk_ids, topk_weights, num_experts, num_experts - num_null_experts, *logits.stride(),
                bias.stride(-1), top_k, scaling_factor, num_groups, topk_groups,
                num_experts // num_groups, HAS_BIAS=expert_bias is not None, RENORMALIZE=renormalize,
                LIMIT_GROUPS=topk_groups < num_groups, TOP2_SUM=group_score == TOP2_SUM,
                BLOCK_GROUPS=triton.next_power_of_2(num_groups), BLOCK_PICKS=triton.next_power_of_2(top_k),
                **_options(logits, score),
            )  # fmt: skip
    return topk_ids, topk_weights


def route_weights(logits: Tensor, topk_ids: Tensor, score: int, renormalize: bool, scaling_factor: float) -> Tensor:
    topk_ids = topk_ids.contiguous()
    num_tokens, top_k = topk_ids.shape
    topk_weights = logits.new_empty((num_tokens, top_k), dtype=_acc_dtype(logits))
    if topk_weights.numel() > 0:
        with torch.cuda.device_of(logits):
            _route_weights_kernel[(num_tokens,)](
                logits, topk_ids, topk_weights, logits.shape[1], *logits.stride(), top_k,
                scaling_factor, RENORMALIZE=renormalize,
                BLOCK_PICKS=triton.next_power_of_2(top_k), **_options(logits, score),
            )  # fmt: skip
    return topk_weights


def route_backward(
    grad_weights: Tensor,
    logits: Tensor,
    topk_ids: Tensor,
    score: int,
    renormalize: bool,
    scaling_factor: float,
    num_null_experts: int,
) -> Tensor:
    num_tokens, num_experts = logits.shape
    grad_logits = logits.new_empty(logits.shape)
    if grad_logits.numel() > 0:
        with torch.cuda.device_of(logits):
            _route_bwd_kernel[(num_tokens,)](
                logits, topk_ids.contiguous(), grad_weights.contiguous(), grad_logits, num_experts,
                num_experts - num_null_experts, *logits.stride(), topk_ids.shape[1],
                scaling_factor, RENORMALIZE=renormalize, **_options(logits, score),
            )  # fmt: skip
    return grad_logits


def _options(logits: Tensor, score: int) -> dict:
    num_experts = logits.shape[1]
    return dict(
        SIGMOID=score == SIGMOID,
        ACC=tl.float64 if logits.dtype == torch.float64 else tl.float32,
        BLOCK_EXPERTS=triton.next_power_of_2(max(num_experts, 1)),
        # a warp holds 16 logits in each lane at most
        num_warps=min(8, max(1, triton.next_power_of_2(num_experts) // 512)),
    )


def _acc_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
