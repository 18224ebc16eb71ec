"""Teaching a split layer's router which experts come nearest to the dense layer: FactorLLM's router training."""

import torch
from torch import Tensor, nn

from moe_kernels._checks import shape_error, value_error
from moe_kernels.nn.feed_forward import MoEFeedForward
from moe_kernels.ops.expert_ffn import expert_ffn

_EPSILON = 1e-7  # of the released code: probabilities are clipped to [1e-7, 1 - 1e-7]


def prior_approximate_loss(logits: Tensor, expert_outputs: Tensor, dense_output: Tensor, top_k: int) -> Tensor:
    """How far the router is from choosing the experts that approximate the dense layer best.

    ::

        d[t, e] = mean((expert_outputs[t, e] - dense_output[t] * top_k / num_experts)²)
        q[t]    = softmax(1 at the top_k experts with the smallest d[t], 0 at the others)
        L       = mean_t KL(p[t] || q[t])                                                    p = softmax(logits)

    Ties take the lowest expert id first. With E experts of which k run, each is asked for k / E of the output (where k
    does not divide E, the released code takes the integer part of E / k).

    Args:
        logits: [num_tokens, num_experts], the router's; differentiated.
        expert_outputs: [num_tokens, num_experts, hidden_size], of every expert alone. Not differentiated.
        dense_output: [num_tokens, hidden_size]. Not differentiated.
        top_k: experts that run, 1 to num_experts.

    Returns:
        A scalar in float32 (float64 for float64 logits), 0 without tokens.

    Source: Zhao et al., "FactorLLM", arXiv 2408.11855, and its released code.
    """
    if logits.dim() != 2:
        raise shape_error("prior_approximate_loss", "logits", "[num_tokens, num_experts]", logits)
    num_tokens, num_experts = logits.shape
    if expert_outputs.dim() != 3 or expert_outputs.shape[:2] != logits.shape:
        expected = f"[num_tokens={num_tokens}, num_experts={num_experts}, hidden_size]"
        raise shape_error("prior_approximate_loss", "expert_outputs", expected, expert_outputs)
    if dense_output.shape != (num_tokens, expert_outputs.shape[2]):
        expected = f"[num_tokens={num_tokens}, hidden_size={expert_outputs.shape[2]}]"
        raise shape_error("prior_approximate_loss", "dense_output", expected, dense_output)
    if not 1 <= top_k <= num_experts:
        raise value_error("prior_approximate_loss", "top_k", f"in [1, num_experts={num_experts}]", top_k)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    with torch.no_grad():
        share = dense_output.to(wide.dtype)[:, None] * (top_k / num_experts)
        distances = (expert_outputs.to(wide.dtype) - share).square().mean(2)
        nearest = distances.argsort(dim=1, stable=True)[:, :top_k]
        target = torch.zeros_like(wide).scatter_(1, nearest, 1.0).softmax(1)
    p = wide.softmax(1).clamp(_EPSILON, 1 - _EPSILON)
    return (p * (p / target.clamp(_EPSILON, 1 - _EPSILON)).log()).sum(1).sum() / max(num_tokens, 1)


def train_router(
    layer: MoEFeedForward,
    dense: nn.Module,
    tokens: Tensor,
    *,
    num_steps: int = 200,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Trains the router of a split layer, in place, by :func:`prior_approximate_loss`; the experts stay as they are.

    Args:
        layer: of ``split_dense``, its ``top_k`` set to what will run.
        dense: the layer that it was split from.
        tokens: [num_tokens, hidden_size], inputs of this layer on real text.
        num_steps: steps of Adam.
        batch_size: tokens of one step, drawn at random.
        learning_rate: of Adam.
        seed: of the draws.

    Returns:
        The loss of every step.
    """
    if tokens.dim() != 2 or tokens.shape[1] != layer.hidden_size or tokens.shape[0] == 0:
        raise shape_error("train_router", "tokens", f"[num_tokens > 0, hidden_size={layer.hidden_size}]", tokens)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(num_steps):
        batch = tokens[torch.randint(tokens.shape[0], (batch_size,), generator=generator).to(tokens.device)]
        with torch.no_grad():
            targets = expert_outputs(layer, batch), dense(batch)
        loss = prior_approximate_loss(layer.router(batch), *targets, layer.top_k)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def expert_outputs(layer: MoEFeedForward, tokens: Tensor) -> Tensor:
    """What each expert alone makes of each token: [num_tokens, num_experts, hidden_size]."""
    num_tokens, num_experts = tokens.shape[0], layer.num_experts
    one = torch.ones(num_tokens, 1, device=tokens.device)
    outputs = []
    for expert in range(num_experts):
        ids = torch.full((num_tokens, 1), expert, dtype=torch.int32, device=tokens.device)
        outputs.append(expert_ffn(tokens, ids, one, layer.gate_up_proj, layer.down_proj, activation=layer.activation))
    return torch.stack(outputs, dim=1)
