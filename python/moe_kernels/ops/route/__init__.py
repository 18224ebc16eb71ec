from moe_kernels.ops.route.api import route, route_weights
from moe_kernels.ops.route.capacity import expert_capacity, limit_capacity
from moe_kernels.ops.route.expert_choice import route_expert_choice
from moe_kernels.ops.route.forced import route_forced, route_soft
from moe_kernels.ops.route.logits import cosine_logits, identity_weights, mask_experts, tune_experts
from moe_kernels.ops.route.losses import (
    balance_loss,
    consistency_loss,
    entropy_loss,
    expert_counts,
    localized_balance_loss,
    update_expert_bias_,
    z_loss,
)
from moe_kernels.ops.route.random import growing_top_k, route_random
from moe_kernels.ops.route.top_p import route_top_p
from moe_kernels.ops.route.two_level import route_two_level

__all__ = [
    "balance_loss",
    "consistency_loss",
    "cosine_logits",
    "entropy_loss",
    "expert_capacity",
    "expert_counts",
    "growing_top_k",
    "identity_weights",
    "limit_capacity",
    "localized_balance_loss",
    "mask_experts",
    "route",
    "route_expert_choice",
    "route_forced",
    "route_random",
    "route_soft",
    "route_top_p",
    "route_two_level",
    "route_weights",
    "tune_experts",
    "update_expert_bias_",
    "z_loss",
]
