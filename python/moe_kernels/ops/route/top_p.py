"""Routing to as many experts as a token needs: :func:`route_top_p`."""

from torch import Tensor

from moe_kernels._checks import value_error
from moe_kernels._dispatch import Backend
from moe_kernels.ops.route import autograd
from moe_kernels.ops.route.api import check_logits, run


def route_top_p(
    logits: Tensor,
    top_p: float,
    *,
    max_experts: int | None = None,
    renormalize: bool = False,
    scaling_factor: float = 1.0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Gives each token its most probable experts until their probabilities add up to more than ``top_p``.

    With P = softmax(logits), in float32, in falling order P_1 >= P_2 >= …::

        expert j is chosen iff P_1 + … + P_(j-1) <= top_p            the best is always chosen
        weights = P, divided by their sum if renormalize, times scaling_factor

    Ties take the lowest expert id first. ``entropy_loss`` keeps the number of experts small in training.

    Args:
        logits: [num_tokens, num_experts], float32, bfloat16, float16 or float64, any strides.
        top_p: above 0; from 1 on every expert is chosen. The paper's value is 0.4.
        max_experts: the most experts a token may get, and the width of the result; None allows all. ``expert_ffn``
            sizes what it saves for backward by this width.
        renormalize: divide the chosen weights by their sum; the paper does not.
        scaling_factor: multiplies the weights.
        backend: see :mod:`moe_kernels`.

    Returns:
        topk_ids [num_tokens, max_experts] int32, -1 beyond a token's experts, and topk_weights of that shape, float32
        (float64 for float64 logits), differentiable in ``logits``. Masks and broken rows are treated as in
        :func:`route`.

    Source: Huang et al., "Harder Tasks Need More Experts", arXiv 2403.07652.
    """
    check_logits("route_top_p", logits)
    if not top_p > 0:
        raise value_error("route_top_p", "top_p", "above 0", top_p)
    num_experts = logits.shape[1]
    if max_experts is None:
        max_experts = num_experts
    if not 0 <= max_experts <= num_experts:
        raise value_error("route_top_p", "max_experts", f"in [0, num_experts={num_experts}]", max_experts)
    arguments = (float(top_p), max_experts, renormalize, float(scaling_factor))
    return run("route_top_p", backend, logits, arguments, autograd.RouteTopP)
