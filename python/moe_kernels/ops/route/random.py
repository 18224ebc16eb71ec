"""Routing that is not learned: :func:`route_random` and the schedule of SMoE-Dropout."""

import torch
from torch import Tensor

from moe_kernels._checks import check_tensor, dtype_error, shape_error, value_error
from moe_kernels._dispatch import Backend, resolve
from moe_kernels.ops.route import native, reference


def route_random(
    token_ids: Tensor,
    num_experts: int,
    top_k: int = 1,
    *,
    seed: int,
    step: int = 0,
    layer: int = 0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Draws distinct experts uniformly at random, the same for whoever asks again.

    The draw is a function of its arguments and nothing else: a Philox counter of token, expert and layer under the key
    (seed, step). Recomputation under activation checkpointing, other ranks, other batch splits and other devices that
    name a token alike draw alike.

    Args:
        token_ids: [num_tokens] int64. Tokens with the same number get the same experts: number the tokens of the global
            batch to draw for each of them, give each token its sequence's number to draw for a sequence.
        num_experts: number of experts.
        top_k: picks for each token, 0 to num_experts.
        seed, step, layer: in [0, 2**32). THOR's second pass is another seed.
        backend: see :mod:`moe_kernels`.

    Returns:
        topk_ids [num_tokens, top_k] int32 and topk_weights float32, all 1 / top_k.

    Sources: THOR, arXiv 2110.04260 (``top_k=1``, two passes, :func:`consistency_loss` between them); the generator is
    Philox4x32-10, Salmon et al., SC 2011.
    """
    check_tensor("route_random", "token_ids", token_ids)
    if token_ids.dim() != 1:
        raise shape_error("route_random", "token_ids", "[num_tokens]", token_ids)
    if token_ids.dtype != torch.int64:
        raise dtype_error("route_random", "token_ids", torch.int64, token_ids)
    if not 0 <= top_k <= num_experts:
        raise value_error("route_random", "top_k", f"in [0, num_experts={num_experts}]", top_k)
    for name, value in (("seed", seed), ("step", step), ("layer", layer)):
        if not 0 <= value < 2**32:
            raise value_error("route_random", name, "in [0, 2**32)", value)
    arguments = (token_ids, num_experts, top_k, seed, step, layer)
    chosen = reference if resolve("route_random", backend, token_ids.device.type) == "reference" else native
    topk_ids = chosen.route_random(*arguments)
    return topk_ids, torch.full(topk_ids.shape, 1 / max(top_k, 1), dtype=torch.float32, device=topk_ids.device)


def growing_top_k(step: int, num_steps: int, num_experts: int, first: int = 1) -> int:
    """Number of experts at one step of SMoE-Dropout: from ``first`` to all of them, in equal parts.

    ``first + floor(step * (num_experts - first + 1) / num_steps)``, at most num_experts. The router stays as it was
    initialised (``router.requires_grad_(False)``).

    Source: Chen et al., "Sparse MoE as the New Dropout", arXiv 2303.01610; the paper grows k linearly and does not say
    how it rounds.
    """
    if not 1 <= first <= num_experts:
        raise value_error("growing_top_k", "first", f"in [1, num_experts={num_experts}]", first)
    if num_steps < 1 or step < 0:
        raise value_error("growing_top_k", "step, num_steps", "at least 0 and 1", (step, num_steps))
    return min(first + step * (num_experts - first + 1) // num_steps, num_experts)
