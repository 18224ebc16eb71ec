"""Schemas, fakes and handles of the compiled permutation ops (csrc/ops/permute)."""

import torch
from torch import Tensor

torch.library.define("moe_kernels::plan_dispatch", "(Tensor topk_ids, int num_experts) -> (Tensor, Tensor, Tensor)")
torch.library.define("moe_kernels::permute", "(Tensor hidden_states, Tensor source_rows) -> Tensor")
torch.library.define("moe_kernels::unpermute", "(Tensor rows, Tensor permuted_rows, Tensor? topk_weights) -> Tensor")
torch.library.define(
    "moe_kernels::unpermute_backward",
    "(Tensor grad_out, Tensor rows, Tensor topk_weights, Tensor source_rows, Tensor permuted_rows) -> (Tensor, Tensor)",
)

plan_dispatch = torch.ops.moe_kernels.plan_dispatch.default
permute = torch.ops.moe_kernels.permute.default
unpermute = torch.ops.moe_kernels.unpermute.default
unpermute_backward = torch.ops.moe_kernels.unpermute_backward.default


@torch.library.register_fake("moe_kernels::plan_dispatch")
def _(topk_ids: Tensor, num_experts: int):
    return (
        topk_ids.new_empty(num_experts + 1, dtype=torch.int32),
        topk_ids.new_empty(topk_ids.shape[0] * topk_ids.shape[1], dtype=torch.int32),
        topk_ids.new_empty(topk_ids.shape, dtype=torch.int32),
    )


@torch.library.register_fake("moe_kernels::permute")
def _(hidden_states: Tensor, source_rows: Tensor):
    return hidden_states.new_empty(source_rows.shape[0], hidden_states.shape[1])


@torch.library.register_fake("moe_kernels::unpermute")
def _(rows: Tensor, permuted_rows: Tensor, topk_weights: Tensor | None):
    return rows.new_empty(permuted_rows.shape[0], rows.shape[1])


@torch.library.register_fake("moe_kernels::unpermute_backward")
def _(grad_out: Tensor, rows: Tensor, topk_weights: Tensor, source_rows: Tensor, permuted_rows: Tensor):
    return rows.new_empty(rows.shape), topk_weights.new_empty(topk_weights.shape)
