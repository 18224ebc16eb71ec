"""Routing in plain PyTorch: the specification."""

import torch
from torch import Tensor

EPSILON = 1e-20  # DeepSeek-V3's: keeps the renormalisation of all-zero sigmoid scores finite


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
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if num_tokens == 0 or num_experts == 0:
        ids = torch.full((num_tokens, top_k), -1, dtype=torch.int32, device=logits.device)
        return ids, logits.new_zeros(num_tokens, top_k)

    # a row with NaN or +inf is routed nowhere; -inf takes one expert out
    bad_rows = (logits.isnan() | (logits == torch.inf)).any(1, keepdim=True)
    masked = bad_rows | (logits == -torch.inf)
    empty_rows = masked.all(1, keepdim=True)
    logits = logits.masked_fill(bad_rows | empty_rows, 0)  # softmax over nothing would be NaN
    scores = logits.softmax(1) if score == 0 else logits.sigmoid()

    choice = scores if expert_bias is None else scores + expert_bias.to(scores.dtype)
    choice = choice.detach()
    choice = choice.masked_fill(masked | choice.isnan(), -torch.inf)
    if topk_groups < num_groups:
        grouped = choice.view(num_tokens, num_groups, -1)
        if group_score == 0:
            group_scores = grouped.amax(2)
        else:
            group_scores = grouped.topk(min(2, grouped.shape[2]), 2).values.sum(2)
        groups = group_scores.argsort(dim=1, descending=True, stable=True)[:, :topk_groups]
        eligible = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, groups, True)
        choice = grouped.masked_fill(~eligible[..., None], -torch.inf).view(num_tokens, num_experts)

    order = choice.argsort(dim=1, descending=True, stable=True)[:, :top_k]  # stable: lowest id first among equals
    skipped = choice.gather(1, order) == -torch.inf
    weights = scores.gather(1, order).masked_fill(skipped, 0)
    if renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + EPSILON)
    return order.masked_fill(skipped, -1).int(), weights * scaling_factor
