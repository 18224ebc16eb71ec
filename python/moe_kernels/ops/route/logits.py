"""Around routing: cosine logits, masks and switches before it, identity experts after it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels._checks import check_tensor, dtype_error, shape_error, value_error
from moe_kernels.ops.route.api import check_ids, check_logits


def cosine_logits(hidden_states: Tensor, expert_embeddings: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Logits by angle: ``cos(hidden_states[t], expert_embeddings[e]) / temperature``.

    Lengths, which grow with the frequency of a token or an expert, have no say. X-MoE first projects the tokens to few
    dimensions and learns the temperature.

    Args:
        hidden_states: [num_tokens, size]; a token of zeros has logits 0.
        expert_embeddings: [num_experts, size].
        temperature: a number or a learned scalar, above 0.

    Returns:
        [num_tokens, num_experts], differentiable in all three.

    Source: Chi et al., "On the Representation Collapse of Sparse Mixture of Experts", arXiv 2204.09179.
    """
    if hidden_states.dim() != 2:
        raise shape_error("cosine_logits", "hidden_states", "[num_tokens, size]", hidden_states)
    size = hidden_states.shape[1]
    if expert_embeddings.dim() != 2 or expert_embeddings.shape[1] != size:
        raise shape_error("cosine_logits", "expert_embeddings", f"[num_experts, size={size}]", expert_embeddings)
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise value_error("cosine_logits", "temperature", "above 0", temperature)
    return F.normalize(hidden_states, dim=1) @ F.normalize(expert_embeddings, dim=1).T / temperature


def mask_experts(logits: Tensor, allowed: Tensor) -> Tensor:
    """Takes experts out of the choice and of the softmax: -inf where ``allowed`` is False.

    Serves every routing function. (A bias of -inf, :func:`tune_experts`, takes them out of the choice alone: the other
    scores stay as they were.)

    Args:
        logits: [num_tokens, num_experts].
        allowed: bool, [num_experts], [num_tokens, num_experts], or [num_tokens, 1] to take whole tokens (padding) out.

    Returns:
        [num_tokens, num_experts]; the gradient at masked logits is zero.
    """
    check_logits("mask_experts", logits)
    check_tensor("mask_experts", "allowed", allowed)
    num_tokens, num_experts = logits.shape
    if allowed.shape not in ((num_experts,), (num_tokens, num_experts), (num_tokens, 1)):
        expected = f"[num_experts={num_experts}], [num_tokens={num_tokens}, {num_experts}] or [{num_tokens}, 1]"
        raise shape_error("mask_experts", "allowed", expected, allowed)
    if allowed.dtype != torch.bool:
        raise dtype_error("mask_experts", "allowed", torch.bool, allowed)
    return logits.masked_fill(~allowed, -torch.inf)


def tune_experts(
    num_experts: int,
    *,
    off: tuple[int, ...] | list[int] = (),
    forced: tuple[int, ...] | list[int] = (),
    boost: dict[int, float] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The ``expert_bias`` of :func:`route` that switches experts at inference, without touching a weight.

    -inf for experts that are ``off``, +inf for those that are ``forced`` into every token's choice (the lowest ids,
    where they are more than top_k), the given number for those whose score is raised or lowered. Weights remain the
    router's own scores; add it to the bias that a model already has.

    Source: Dahlke et al., "Mixture of Tunable Experts", arXiv 2502.11096.

    Returns:
        [num_experts] float32.
    """
    bias = torch.zeros(num_experts, dtype=torch.float32, device=device)
    named = [*off, *forced, *(boost or {})]
    for expert in named:
        if not 0 <= expert < num_experts:
            raise value_error("tune_experts", "expert", f"in [0, num_experts={num_experts})", expert)
    if len(set(named)) != len(named):
        twice = next(expert for expert in named if named.count(expert) > 1)
        raise value_error("tune_experts", "each expert", "named once", f"{twice} named twice")
    bias[list(off)] = -torch.inf
    bias[list(forced)] = torch.inf
    for expert, amount in (boost or {}).items():
        bias[expert] = amount
    return bias


def identity_weights(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> Tensor:
    """How much of the token itself its identity experts add: the sum of the weights of the ids >= num_experts.

    ``out = expert_ffn(x, topk_ids, …) + identity_weights(topk_ids, topk_weights, num_experts)[:, None] * x`` is the
    layer of LongCat-Flash, whose zero experts return their input: the FFN skips their ids and spends nothing.

    Args:
        topk_ids: [num_tokens, top_k], of :func:`route` over the logits of real and identity experts.
        topk_weights: [num_tokens, top_k].
        num_experts: number of real experts.

    Returns:
        [num_tokens], dtype of ``topk_weights``, differentiable in them.

    Source: LongCat-Flash technical report, arXiv 2509.01322; ``LongcatFlashMoE`` of transformers 5.23.
    """
    check_ids("identity_weights", topk_ids)
    if topk_weights.shape != topk_ids.shape:
        raise shape_error("identity_weights", "topk_weights", f"{list(topk_ids.shape)} like topk_ids", topk_weights)
    return topk_weights.masked_fill(topk_ids < num_experts, 0).sum(1)
