"""Losses that shape a router, and the balancing that needs none. Plain PyTorch: they read [num_tokens, num_experts]."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels._checks import check_tensor, dtype_error, shape_error, value_error
from moe_kernels.ops.route.api import check_ids, check_logits, check_score

SCALES = ("hf", "megatron")


def balance_loss(
    logits: Tensor,
    topk_ids: Tensor,
    *,
    scale: str = "hf",
    score: str = "softmax",
    token_mask: Tensor | None = None,
    num_null_experts: int = 0,
    expert_fractions: Tensor | None = None,
) -> Tensor:
    """The load-balance loss of the Switch Transformer, without its coefficient.

    ``L = num_experts * sum_e f_e * P_e``, with P_e the mean score of expert e and f_e how much it was chosen:

    * ``scale="hf"``: f_e = picks of e / num_tokens; balanced routing has L = top_k (transformers).
    * ``scale="megatron"``: f_e = picks of e / all picks; balanced routing has L = 1 (Megatron, MegaBlocks).

    The gradient flows through P alone. Null experts share their picks: each of them has the mean f of all of them, so
    that which null a token takes does not matter (AdaMoE, as its paper says; its released code averages another axis).

    Args:
        logits: [num_tokens, num_experts], any float dtype; null experts last.
        topk_ids: [num_tokens, top_k], the choice before anything was dropped; ids outside [0, num_experts) count as no
            pick.
        scale: "hf" or "megatron".
        score: "softmax", or "sigmoid" divided by its sum over the experts (DeepSeek-V3).
        token_mask: [num_tokens] bool, False for padding. A token without an expert (every logit -inf) does not count
            either, here and in the other losses.
        num_null_experts: how many of the last experts are null.
        expert_fractions: [num_experts], f over more tokens than these (all ranks, all accumulated batches), on the
            scale wanted; None computes it from ``topk_ids``.

    Returns:
        A scalar in float32 (float64 for float64 logits), 0 where no token counts.

    Sources: Switch Transformer, arXiv 2101.03961; AdaMoE, arXiv 2406.13233.
    """
    check_logits("balance_loss", logits)
    num_tokens, num_experts = logits.shape
    check_ids("balance_loss", topk_ids, num_tokens)
    check_score("balance_loss", score)
    if scale not in SCALES:
        raise value_error("balance_loss", "scale", f"one of {', '.join(SCALES)}", repr(scale))
    if not 0 <= num_null_experts <= num_experts:
        raise value_error("balance_loss", "num_null_experts", f"in [0, num_experts={num_experts}]", num_null_experts)
    logits, counted = _counted("balance_loss", token_mask, logits)
    scores = logits.softmax(1) if score == "softmax" else F.normalize(logits.sigmoid(), p=1, dim=1)
    mean_scores = _mean(scores, counted)
    if expert_fractions is None:
        counts = expert_counts(topk_ids, num_experts, token_mask=counted).to(logits.dtype)
        whole = counts.sum() if scale == "megatron" else counted.sum().to(logits.dtype)
        expert_fractions = counts / whole.clamp(min=1)
    elif expert_fractions.shape != (num_experts,):
        raise shape_error("balance_loss", "expert_fractions", f"[num_experts={num_experts}]", expert_fractions)
    fractions = expert_fractions.detach().to(logits.dtype)
    if num_null_experts:
        real, null = fractions.split([num_experts - num_null_experts, num_null_experts])
        fractions = torch.cat([real, null.mean().expand(num_null_experts)])
    return num_experts * (fractions * mean_scores).sum()


def z_loss(logits: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """Keeps logits small: ``mean_t logsumexp(logits[t])²``, over the tokens of ``token_mask`` ([num_tokens] bool).

    Source: ST-MoE, arXiv 2202.08906.
    """
    check_logits("z_loss", logits)
    logits, counted = _counted("z_loss", token_mask, logits)
    return _mean(logits.logsumexp(1).square(), counted)


def entropy_loss(logits: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """Keeps routers decided, so that top-p chooses few experts: ``mean_t -sum_e P log P`` with P = softmax(logits).

    ``token_mask``: [num_tokens] bool, False for padding.

    Source: Huang et al., arXiv 2403.07652, beside a balance loss.
    """
    check_logits("entropy_loss", logits)
    logits, counted = _counted("entropy_loss", token_mask, logits)
    log_probs = logits.log_softmax(1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs.masked_fill(probs == 0, 0)).sum(1)  # 0 log 0 = 0
    return _mean(entropy, counted)


def consistency_loss(first_logits: Tensor, second_logits: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """How far a model's predictions through two draws of experts differ: ``mean (KL(p||q) + KL(q||p)) / 2``.

    THOR trains with ``CE(p) + CE(q) + alpha * consistency_loss``, p and q from two passes whose :func:`route_random`
    has two seeds.

    Args:
        first_logits, second_logits: [num_rows, num_classes], what the model predicts; both are differentiated.
        token_mask: [num_rows] bool, rows that count.

    Source: Zuo et al., "Taming Sparsely Activated Transformer with Stochastic Experts", arXiv 2110.04260.
    """
    check_logits("consistency_loss", first_logits)
    check_logits("consistency_loss", second_logits)
    if first_logits.shape != second_logits.shape:
        raise shape_error("consistency_loss", "second_logits", str(list(first_logits.shape)), second_logits)
    first_logits, counted = _counted("consistency_loss", token_mask, first_logits)
    second_logits, counted = _counted("consistency_loss", counted, second_logits)
    p, q = first_logits.log_softmax(1), second_logits.log_softmax(1)
    # KL(p||q) + KL(q||p) = sum (p - q) (log p - log q); a class that both leave out adds 0, not -inf - (-inf)
    divergence = ((p.exp() - q.exp()) * (p - q).masked_fill(p == q, 0)).sum(1) / 2
    return _mean(divergence, counted)


def localized_balance_loss(
    importance: Tensor, expert_types: Tensor, sample_types: Tensor, *, delta: float = 0.1, form: str = "paper"
) -> Tensor:
    """LoRAMoE's balance inside groups: experts of a sample's own type should carry more, the others less, each evenly.

    ::

        Z[n, e] = importance[n, e] * (1 + delta if expert_types[e] == sample_types[n] else 1 - delta)
        L       = var(Z) / mean(Z)                   form="paper", the variance over all entries
        L       = var(Z) / (mean(Z)² + 1e-10)        form="official", the released code; the variance divides by n - 1

    Args:
        importance: [num_samples, num_experts], the sum of a sample's routing weights for each expert.
        expert_types: [num_experts], any integers.
        sample_types: [num_samples], of the same meaning.
        delta: in [0, 1]; how far the two groups are driven apart.
        form: "paper" or "official".

    Returns:
        A scalar, differentiable in ``importance``.

    Source: Dou et al., "LoRAMoE", arXiv 2312.09979.
    """
    check_logits("localized_balance_loss", importance)
    num_samples, num_experts = importance.shape
    if expert_types.shape != (num_experts,):
        raise shape_error("localized_balance_loss", "expert_types", f"[num_experts={num_experts}]", expert_types)
    if sample_types.shape != (num_samples,):
        raise shape_error("localized_balance_loss", "sample_types", f"[num_samples={num_samples}]", sample_types)
    if not 0 <= delta <= 1:
        raise value_error("localized_balance_loss", "delta", "in [0, 1]", delta)
    if form not in ("paper", "official"):
        raise value_error("localized_balance_loss", "form", "one of paper, official", repr(form))
    own = sample_types[:, None] == expert_types
    z = _wide(importance) * torch.where(own, 1 + delta, 1 - delta)
    if form == "paper":
        return z.var(correction=0) / z.mean()
    return z.var() / (z.mean().square() + 1e-10)


def expert_counts(topk_ids: Tensor, num_experts: int, *, token_mask: Tensor | None = None) -> Tensor:
    """How often each expert was chosen: [num_experts] int64.

    Args:
        topk_ids: [num_tokens, top_k], int32 or int64; ids outside [0, num_experts) are not counted.
        num_experts: number of experts.
        token_mask: [num_tokens] bool, False for padding.
    """
    check_ids("expert_counts", topk_ids)
    counted = (topk_ids >= 0) & (topk_ids < num_experts)
    if token_mask is not None:
        counted = counted & _mask("expert_counts", token_mask, topk_ids)[:, None]
    ids = topk_ids.long().masked_fill(~counted, num_experts).flatten()
    return ids.new_zeros(num_experts + 1).scatter_add_(0, ids, torch.ones_like(ids))[:num_experts]


@torch.no_grad()
def update_expert_bias_(expert_bias: Tensor, counts: Tensor, *, rate: float = 1e-3, center: bool = False) -> Tensor:
    """Balances without a loss: raises the bias of experts that were chosen too little, lowers the others', in place.

    ``expert_bias += rate * sign(mean(counts) - counts)``, less the mean of that change if ``center`` (torchtitan).

    Args:
        expert_bias: [num_experts] float32 or float64, the ``expert_bias`` of :func:`route`.
        counts: [num_experts], :func:`expert_counts` summed over the accumulated batches and over the data ranks.
        rate: size of a step.
        center: keep the sum of the biases.

    Returns:
        ``expert_bias``.

    Source: Wang et al., "Auxiliary-Loss-Free Load Balancing", arXiv 2408.15664.
    """
    check_tensor("update_expert_bias_", "expert_bias", expert_bias)
    if counts.shape != expert_bias.shape:
        raise shape_error("update_expert_bias_", "counts", f"{list(expert_bias.shape)} like expert_bias", counts)
    counts = counts.double()
    change = rate * (counts.mean() - counts).sign()
    if center:
        change = change - change.mean()
    return expert_bias.add_(change.to(expert_bias.dtype))


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _mask(op: str, token_mask: Tensor, values: Tensor) -> Tensor:
    if token_mask.shape != values.shape[:1]:
        raise shape_error(op, "token_mask", f"[num_tokens={values.shape[0]}]", token_mask)
    if token_mask.dtype != torch.bool:
        raise dtype_error(op, "token_mask", torch.bool, token_mask)
    return token_mask


def _counted(op: str, token_mask: Tensor | None, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in the dtype of the loss, 0 in rows that do not count, and which do: neither padding nor all -inf.

    Zeros before the nonlinearity: NaN or -inf behind it would reach the gradient, where 0 * NaN is NaN.
    """
    counted = (logits != -torch.inf).any(1)
    if token_mask is not None:
        counted = counted & _mask(op, token_mask, logits)
    return _wide(logits).masked_fill(~counted[:, None], 0), counted


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over the first dimension, over the tokens that count; 0 where none does."""
    mask = counted if values.dim() == 1 else counted[:, None]
    return values.masked_fill(~mask, 0).sum(0) / counted.sum().to(values.dtype).clamp(min=1)
