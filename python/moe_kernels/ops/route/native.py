"""Schemas, fakes and handles of the compiled routing ops (csrc/ops/route)."""

import torch
from torch import Tensor

torch.library.define(
    "moe_kernels::route",
    "(Tensor logits, Tensor? expert_bias, int top_k, int score, bool renormalize, float scaling_factor, "
    "int num_groups, int topk_groups, int group_score, int num_null_experts) -> (Tensor, Tensor)",
)
torch.library.define(
    "moe_kernels::route_weights",
    "(Tensor logits, Tensor topk_ids, int score, bool renormalize, float scaling_factor) -> Tensor",
)
torch.library.define(
    "moe_kernels::route_top_p",
    "(Tensor logits, float top_p, int max_experts, bool renormalize, float scaling_factor) -> (Tensor, Tensor)",
)
# a capacity follows the number of tokens, a step counts up: symbols, so that neither compiles anew
torch.library.define(
    "moe_kernels::route_expert_choice",
    "(Tensor logits, SymInt capacity, float scaling_factor) -> (Tensor, Tensor)",
)
torch.library.define(
    "moe_kernels::route_random",
    "(Tensor token_ids, int num_experts, int top_k, int seed, SymInt step, int layer) -> Tensor",
)
torch.library.define(
    "moe_kernels::limit_capacity",
    "(Tensor topk_ids, Tensor topk_weights, int num_experts, SymInt capacity, bool by_weight, "
    "bool first_choices_first) -> Tensor",
)
torch.library.define(
    "moe_kernels::route_backward",
    "(Tensor grad_weights, Tensor logits, Tensor topk_ids, int score, bool renormalize, float scaling_factor, "
    "int num_null_experts) -> Tensor",
)

route = torch.ops.moe_kernels.route.default
route_weights = torch.ops.moe_kernels.route_weights.default
route_top_p = torch.ops.moe_kernels.route_top_p.default
route_expert_choice = torch.ops.moe_kernels.route_expert_choice.default
route_random = torch.ops.moe_kernels.route_random.default
limit_capacity = torch.ops.moe_kernels.limit_capacity.default
route_backward = torch.ops.moe_kernels.route_backward.default


def _picks(logits: Tensor, num_picks: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], num_picks)
    weights_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=weights_dtype)


@torch.library.register_fake("moe_kernels::route")
def _(logits, expert_bias, top_k, score, renormalize, scaling_factor, num_groups, topk_groups, group_score, num_null):
    return _picks(logits, top_k)


@torch.library.register_fake("moe_kernels::route_weights")
def _(logits, topk_ids, score, renormalize, scaling_factor):
    return _picks(logits, topk_ids.shape[1])[1]


@torch.library.register_fake("moe_kernels::route_top_p")
def _(logits, top_p, max_experts, renormalize, scaling_factor):
    return _picks(logits, max_experts)


@torch.library.register_fake("moe_kernels::route_expert_choice")
def _(logits, capacity, scaling_factor):
    return _picks(logits, logits.shape[1])


@torch.library.register_fake("moe_kernels::route_random")
def _(token_ids, num_experts, top_k, seed, step, layer):
    return token_ids.new_empty((token_ids.shape[0], top_k), dtype=torch.int32)


@torch.library.register_fake("moe_kernels::limit_capacity")
def _(topk_ids, topk_weights, num_experts, capacity, by_weight, first_choices_first):
    return topk_ids.new_empty(topk_ids.shape)


@torch.library.register_fake("moe_kernels::route_backward")
def _(grad_weights, logits, topk_ids, score, renormalize, scaling_factor, num_null_experts):
    return logits.new_empty(logits.shape)
