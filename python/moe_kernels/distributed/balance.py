"""The balance loss of the whole batch, of which each rank has a part."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moe_kernels.ops import route


def balance_loss(
    logits: Tensor,
    topk_ids: Tensor,
    *,
    group: ProcessGroup | None = None,
    scale: str = "hf",
    score: str = "softmax",
    token_mask: Tensor | None = None,
    num_null_experts: int = 0,
) -> Tensor:
    """:func:`moe_kernels.balance_loss` over the tokens of all ranks.

    ::

        L      = num_experts * sum_e f[e] * P[e]        f, P over the tokens of all ranks
        L[r]   = num_experts * sum_e f[e] * P[r, e] * tokens[r] * world_size / sum of tokens
        L      = mean over ranks of L[r]

    A balance on each rank by itself would be another, stricter loss. L[r] is returned: averaged as DDP and FSDP average
    gradients it is L, however many tokens each rank has. The ranks exchange num_experts + 1 integers by an all-reduce;
    the gradient flows through P and needs none.

    Args:
        logits: [num_tokens, num_experts], this rank's; also no token.
        topk_ids: [num_tokens, top_k].
        group: the ranks that share the batch; None for all.
        scale, score, token_mask, num_null_experts: see :func:`moe_kernels.balance_loss`.

    Returns:
        A scalar in float32 (float64 for float64 logits).
    """
    counted = (logits.detach() != -torch.inf).any(1)
    if token_mask is not None:
        counted = counted & token_mask
    mine = route.expert_counts(topk_ids, logits.shape[1], token_mask=counted)
    totals = torch.cat([mine, counted.sum()[None]])
    dist.all_reduce(totals, group=group)
    counts, num_tokens = totals[:-1].double(), totals[-1].double().clamp(min=1)
    fractions = counts / (num_tokens if scale == "hf" else counts.sum().clamp(min=1))
    options = {"scale": scale, "score": score, "token_mask": token_mask, "num_null_experts": num_null_experts}
    loss = route.balance_loss(logits, topk_ids, expert_fractions=fractions, **options)
    return loss * (counted.sum() * dist.get_world_size(group) / num_tokens).to(loss.dtype)
