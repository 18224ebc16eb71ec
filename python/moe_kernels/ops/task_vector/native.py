"""Schemas, fakes and handles of the compiled task-vector ops (csrc/ops/task_vector)."""

import torch
from torch import Tensor

torch.library.define("moe_kernels::apply_ternary", "(Tensor(a!) weight, Tensor[] deltas, float[] values) -> ()")
torch.library.define(
    "moe_kernels::apply_ternary_undoable",
    "(Tensor(a!) weight, Tensor[] deltas, float[] values) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "moe_kernels::unapply_ternary",
    "(Tensor(a!) weight, Tensor[] deltas, float[] values, Tensor offsets, Tensor strings, Tensor kept, "
    "Tensor kept_offsets) -> ()",
)

apply_ternary = torch.ops.moe_kernels.apply_ternary.default
apply_ternary_undoable = torch.ops.moe_kernels.apply_ternary_undoable.default
unapply_ternary = torch.ops.moe_kernels.unapply_ternary.default


@torch.library.register_fake("moe_kernels::apply_ternary")
def _(weight: Tensor, deltas, values):
    return None


@torch.library.register_fake("moe_kernels::apply_ternary_undoable")
def _(weight: Tensor, deltas, values):
    context = torch.library.get_ctx()
    num_blocks = -(-weight.numel() // 4096)
    offsets = weight.new_empty(num_blocks + 1, dtype=torch.int64)
    return (
        offsets,
        weight.new_empty((2, context.new_dynamic_size()), dtype=torch.int64),
        weight.new_empty(context.new_dynamic_size()),
        offsets.new_empty(num_blocks + 1),
    )


@torch.library.register_fake("moe_kernels::unapply_ternary")
def _(weight: Tensor, *rest):
    return None
