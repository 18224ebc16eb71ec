"""Routing in plain PyTorch: the specification."""

import torch
from torch import Tensor

EPSILON = 1e-20  # DeepSeek-V3's: keeps the renormalisation of all-zero sigmoid scores finite


def scores_of(logits: Tensor, score: int) -> tuple[Tensor, Tensor]:
    """Scores [num_tokens, num_experts] in float32 (float64), and where an expert cannot be chosen.

    A row with NaN or +inf is routed nowhere; -inf takes one expert out.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    bad_rows = (logits.isnan() | (logits == torch.inf)).any(1, keepdim=True)
    masked = bad_rows | (logits == -torch.inf)
    empty_rows = masked.all(1, keepdim=True)
    logits = logits.masked_fill(bad_rows | empty_rows, 0)  # softmax over nothing would be NaN
    return (logits.softmax(1) if score == 0 else logits.sigmoid()), masked


def weights_of(scores: Tensor, topk_ids: Tensor, skipped: Tensor, renormalize: bool, scaling_factor: float) -> Tensor:
    weights = scores.gather(1, topk_ids.masked_fill(skipped, 0).long()).masked_fill(skipped, 0)
    if renormalize:
        weights = weights / (weights.sum(1, keepdim=True) + EPSILON)
    return weights * scaling_factor


def empty(logits: Tensor, num_picks: int) -> tuple[Tensor, Tensor]:
    """Picks of no expert, connected to the graph."""
    ids = torch.full((logits.shape[0], num_picks), -1, dtype=torch.int32, device=logits.device)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return ids, logits.new_zeros(logits.shape[0], num_picks) + logits[:0].sum()


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
    if num_tokens == 0 or num_experts == 0:
        return empty(logits, top_k)
    scores, masked = scores_of(logits, score)
    choice = scores if expert_bias is None else scores + expert_bias.to(scores.dtype)
    choice = choice.detach()
    choice = choice.masked_fill(masked | choice.isnan(), -torch.inf)
    if topk_groups < num_groups:
        grouped = choice.view(num_tokens, num_groups, -1)
        group_scores = grouped.amax(2)
        if group_score == 1:
            # an expert that is forced by a bias of +inf forces its group, whatever stands beside it
            forced = group_scores == torch.inf
            group_scores = grouped.topk(min(2, grouped.shape[2]), 2).values.sum(2).masked_fill(forced, torch.inf)
        groups = group_scores.argsort(dim=1, descending=True, stable=True)[:, :topk_groups]
        eligible = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, groups, True)
        choice = grouped.masked_fill(~eligible[..., None], -torch.inf).view(num_tokens, num_experts)

    order = choice.argsort(dim=1, descending=True, stable=True)[:, :top_k]  # stable: lowest id first among equals
    skipped = choice.gather(1, order) == -torch.inf
    weightless = skipped | (order >= num_experts - num_null_experts)
    weights = weights_of(scores, order, weightless, renormalize, scaling_factor)
    return order.masked_fill(skipped, -1).int(), weights


def route_weights(logits: Tensor, topk_ids: Tensor, score: int, renormalize: bool, scaling_factor: float) -> Tensor:
    if logits.shape[0] == 0 or logits.shape[1] == 0:
        return empty(logits, topk_ids.shape[1])[1]
    scores, masked = scores_of(logits, score)
    skipped = (topk_ids < 0) | (topk_ids >= logits.shape[1]) | masked.all(1, keepdim=True)
    skipped = skipped | masked.gather(1, topk_ids.masked_fill(skipped, 0).long())
    return weights_of(scores, topk_ids, skipped, renormalize, scaling_factor)


def route_top_p(
    logits: Tensor, top_p: float, max_experts: int, renormalize: bool, scaling_factor: float
) -> tuple[Tensor, Tensor]:
    if logits.shape[0] == 0 or logits.shape[1] == 0:
        return empty(logits, max_experts)
    scores, masked = scores_of(logits, 0)
    choice = scores.detach().masked_fill(masked, -torch.inf)
    order = choice.argsort(dim=1, descending=True, stable=True)
    ranked = choice.gather(1, order)
    before = torch.nn.functional.pad(ranked.double().clamp(min=0).cumsum(1)[:, :-1], (1, 0))
    skipped = ranked == -torch.inf
    if top_p < 1:
        skipped = skipped | (before > top_p)
    order, skipped = order[:, :max_experts], skipped[:, :max_experts]
    weights = weights_of(scores, order, skipped, renormalize, scaling_factor)
    return order.masked_fill(skipped, -1).int(), weights


def route_expert_choice(logits: Tensor, capacity: int, scaling_factor: float) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    if num_tokens == 0 or num_experts == 0:
        return empty(logits, num_experts)
    scores, masked = scores_of(logits, 0)
    choice = scores.detach().masked_fill(masked, -torch.inf)
    tokens = choice.argsort(dim=0, descending=True, stable=True)[:capacity]  # each expert's, lowest first among equals
    chosen = torch.zeros_like(masked).scatter_(0, tokens, True) & ~masked
    # each token's experts in rising order, then empty slots
    experts = torch.arange(num_experts, device=logits.device).masked_fill(~chosen, num_experts).sort(1).values
    skipped = experts == num_experts
    return experts.masked_fill(skipped, -1).int(), weights_of(scores, experts, skipped, False, scaling_factor)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key0: int, key1: int) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    mask = 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps around 2**64: the bits are right
        c0, c1, c2, c3 = (
            ((product1 >> 32) & mask) ^ c1 ^ key0,
            product1 & mask,
            ((product0 >> 32) & mask) ^ c3 ^ key1,
            product0 & mask,
        )
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def route_random(token_ids: Tensor, num_experts: int, top_k: int, seed: int, step: int, layer: int) -> Tensor:
    blocks = torch.arange((num_experts + 3) // 4, device=token_ids.device)
    token = token_ids[:, None].expand(-1, blocks.numel())
    counter = (token & 0xFFFFFFFF, (token >> 32) & 0xFFFFFFFF, blocks.expand_as(token), torch.full_like(token, layer))
    draws = torch.stack(philox(counter, seed, step), dim=2).flatten(1)[:, :num_experts]
    return draws.argsort(dim=1, descending=True, stable=True)[:, :top_k].int()


def limit_capacity(
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    capacity: int,
    by_weight: bool,
    first_choices_first: bool,
) -> Tensor:
    num_tokens, top_k = topk_ids.shape
    # pairs in the order in which they take their places
    ids, weights = topk_ids.reshape(-1), topk_weights.detach().reshape(-1)
    if by_weight:
        order = weights.nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(descending=True, stable=True)
    else:
        order = torch.arange(ids.numel(), device=ids.device)
        if first_choices_first:
            order = order.view(num_tokens, top_k).T.reshape(-1)
    experts = torch.arange(num_experts, device=ids.device)
    place = (ids[order, None] == experts).cumsum(0)  # [pairs, num_experts]
    dropped = ((ids[order, None] == experts) & (place > capacity)).any(1)
    return ids.scatter(0, order[dropped], -1).view(num_tokens, top_k)
