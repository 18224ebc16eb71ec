"""Schemas, fakes and handles of the compiled routing ops (csrc/ops/route)."""

import torch
from torch import Tensor

torch.library.define(
    "moe_kernels::route",
    "(Tensor logits, Tensor? expert_bias, int top_k, int score, bool renormalize, float scaling_factor, "
    "int num_groups, int topk_groups, int group_score) -> (Tensor, Tensor)",
)
torch.library.define(
    "moe_kernels::route_backward",
    "(Tensor grad_weights, Tensor logits, Tensor topk_ids, int score, bool renormalize, float scaling_factor) "
    "-> Tensor",
)

route = torch.ops.moe_kernels.route.default
route_backward = torch.ops.moe_kernels.route_backward.default


@torch.library.register_fake("moe_kernels::route")
def _(logits, expert_bias, top_k, score, renormalize, scaling_factor, num_groups, topk_groups, group_score):
    weights_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=weights_dtype)


@torch.library.register_fake("moe_kernels::route_backward")
def _(grad_weights: Tensor, logits: Tensor, topk_ids: Tensor, score: int, renormalize: bool, scaling_factor: float):
    return logits.new_empty(logits.shape)
