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


torch.library.define("moe_kernels::count_magnitudes", "(Tensor tensor, Tensor? base, int prefix) -> Tensor")
torch.library.define("moe_kernels::count_window", "(Tensor tensor, Tensor? base, int first, int last) -> Tensor")
torch.library.define("moe_kernels::delta_moments", "(Tensor tensor, Tensor? base) -> Tensor")
torch.library.define(
    "moe_kernels::select_ternary", "(Tensor tensor, Tensor? base, int threshold, int num_ties) -> Tensor"
)
torch.library.define("moe_kernels::end_of_ties", "(Tensor tensor, Tensor? base, int threshold, int num_ties) -> int")
torch.library.define(
    "moe_kernels::pack_ternary", "(Tensor planes, int[] shape, float scale, float sigma, int base_hash) -> Tensor"
)
torch.library.define(
    "moe_kernels::pack_values",
    "(Tensor planes, Tensor tensor, Tensor? base, int[] shape, float scale, float sigma, int base_hash, int dtype) "
    "-> Tensor",
)
torch.library.define("moe_kernels::unpack_ternary", "(Tensor packed) -> Tensor")
torch.library.define("moe_kernels::unpack_values", "(Tensor packed) -> (Tensor, Tensor)")
torch.library.define("moe_kernels::make_patch", "(Tensor weight, Tensor base, int[] shape, int base_hash) -> Tensor")
torch.library.define("moe_kernels::apply_patch", "(Tensor(a!) weight, Tensor packed, bool back) -> ()")
torch.library.define("moe_kernels::check_patch", "(Tensor packed) -> ()")

count_magnitudes = torch.ops.moe_kernels.count_magnitudes.default
count_window = torch.ops.moe_kernels.count_window.default
delta_moments = torch.ops.moe_kernels.delta_moments.default
select_ternary = torch.ops.moe_kernels.select_ternary.default
end_of_ties = torch.ops.moe_kernels.end_of_ties.default
pack_ternary = torch.ops.moe_kernels.pack_ternary.default
pack_values = torch.ops.moe_kernels.pack_values.default
unpack_ternary = torch.ops.moe_kernels.unpack_ternary.default
unpack_values = torch.ops.moe_kernels.unpack_values.default
make_patch = torch.ops.moe_kernels.make_patch.default
apply_patch = torch.ops.moe_kernels.apply_patch.default
check_patch = torch.ops.moe_kernels.check_patch.default


@torch.library.register_fake("moe_kernels::count_magnitudes")
def _(tensor: Tensor, base: Tensor | None, prefix: int):
    return tensor.new_empty(2**16 if prefix < 0 else 2**15, dtype=torch.int64)


@torch.library.register_fake("moe_kernels::count_window")
def _(tensor: Tensor, base: Tensor | None, first: int, last: int):
    return tensor.new_empty(2**16, dtype=torch.int64)


@torch.library.register_fake("moe_kernels::delta_moments")
def _(tensor: Tensor, base: Tensor | None):
    return tensor.new_empty(2, dtype=torch.float64)


@torch.library.register_fake("moe_kernels::select_ternary")
def _(tensor: Tensor, base: Tensor | None, threshold: int, num_ties: int):
    return tensor.new_empty((-(-tensor.numel() // 64), 2), dtype=torch.int64)


@torch.library.register_fake("moe_kernels::pack_ternary")
@torch.library.register_fake("moe_kernels::pack_values")
@torch.library.register_fake("moe_kernels::make_patch")
def _(first: Tensor, *rest):
    return first.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


@torch.library.register_fake("moe_kernels::apply_patch")
@torch.library.register_fake("moe_kernels::check_patch")
def _(first: Tensor, *rest):
    return None


@torch.library.register_fake("moe_kernels::unpack_values")
def _(packed: Tensor):
    context = torch.library.get_ctx()
    planes = packed.new_empty((context.new_dynamic_size(), 2), dtype=torch.int64)
    return planes, packed.new_empty(context.new_dynamic_size(), dtype=torch.float32)


@torch.library.register_fake("moe_kernels::unpack_ternary")
def _(packed: Tensor):
    return packed.new_empty((torch.library.get_ctx().new_dynamic_size(), 2), dtype=torch.int64)
