"""Token permutation in plain PyTorch: the specification."""

import torch
from torch import Tensor

from moe_kernels.ops.permute.plan import DispatchPlan


def plan_dispatch(topk_ids: Tensor, num_experts: int) -> DispatchPlan:
    num_tokens, top_k = topk_ids.shape
    ids = topk_ids.reshape(-1).long()
    ids = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)  # skipped pairs sort last
    order = ids.argsort(stable=True)
    counts = torch.bincount(ids, minlength=num_experts + 1)
    expert_offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    expert_offsets[1:] = counts[:num_experts].cumsum(0)
    num_permuted = expert_offsets[-1]
    rows = torch.arange(ids.numel(), device=ids.device)
    skipped = rows >= num_permuted
    source_rows = torch.where(skipped, -1, order // max(top_k, 1)).int()
    permuted_rows = torch.empty_like(ids)
    permuted_rows[order] = torch.where(skipped, -1, rows)
    return DispatchPlan(expert_offsets, source_rows, permuted_rows.view(num_tokens, top_k).int())


def permute(hidden_states: Tensor, plan: DispatchPlan) -> Tensor:
    if hidden_states.shape[0] == 0:
        return hidden_states[plan.source_rows.long()]  # empty, and connected to the graph
    rows = hidden_states[plan.source_rows.clamp(min=0).long()]
    return rows.masked_fill((plan.source_rows < 0)[:, None], 0)


def unpermute(rows: Tensor, plan: DispatchPlan, topk_weights: Tensor | None) -> Tensor:
    num_tokens, top_k = plan.permuted_rows.shape
    if num_tokens == 0 or top_k == 0 or rows.shape[0] == 0:
        return rows.new_zeros(num_tokens, rows.shape[1]) + rows[:0].sum()  # connected to the graph
    skipped = plan.permuted_rows < 0
    # masked before the product: a skipped pair gives zero even where the row or its weight holds NaN
    picked = rows[plan.permuted_rows.clamp(min=0).long()].masked_fill(skipped[..., None], 0)
    if topk_weights is not None:
        picked = picked * topk_weights.masked_fill(skipped, 0)[..., None].to(rows.dtype)
    return picked.sum(1)
