"""Routing where experts choose their tokens: :func:`route_expert_choice`."""

from torch import Tensor

from moe_kernels._checks import value_error
from moe_kernels._dispatch import Backend
from moe_kernels.ops.route import autograd
from moe_kernels.ops.route.api import check_logits, run


def route_expert_choice(
    logits: Tensor, capacity: int, *, scaling_factor: float = 1.0, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Gives each expert the tokens that score it highest.

    With S = softmax(logits) over the experts of each token, in float32::

        expert e takes the `capacity` tokens with the largest S[:, e]       lowest token first among equals
        weights = S of the pairs, times scaling_factor, not renormalised

    Every expert works equally; a token may get none or all. Tokens compete with each other, also with later ones: the
    layer is not causal, and a token's result depends on its batch. :func:`expert_capacity` computes the paper's
    capacity.

    Args:
        logits: [num_tokens, num_experts], float32, bfloat16, float16 or float64, any strides. Take padding out with
            :func:`mask_experts`.
        capacity: tokens for each expert, at least 0; 0 chooses nothing, more than num_tokens takes all of them.
        scaling_factor: multiplies the weights.
        backend: see :mod:`moe_kernels`.

    Returns:
        topk_ids [num_tokens, num_experts] int32: each token's experts in rising order, then -1; and topk_weights of
        that shape, float32 (float64 for float64 logits), differentiable in ``logits``. Masks and broken rows are
        treated as in :func:`route`.

    Source: Zhou et al., "Mixture-of-Experts with Expert Choice Routing", arXiv 2202.09368.
    """
    check_logits("route_expert_choice", logits)
    if capacity < 0:
        raise value_error("route_expert_choice", "capacity", "at least 0", capacity)
    arguments = (capacity, float(scaling_factor))
    return run("route_expert_choice", backend, logits, arguments, autograd.RouteExpertChoice)
