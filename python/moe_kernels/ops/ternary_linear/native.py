"""Schemas, fakes and handles of the compiled ternary-linear ops (csrc/ops/ternary_linear)."""

import torch
from torch import Tensor

torch.library.define(
    "moe_kernels::ternary_linear",
    "(Tensor x, Tensor weight, Tensor[] deltas, float[] values, Tensor? delta_ids, Tensor? delta_weights, "
    "Tensor? bias) "
    "-> Tensor",
)
torch.library.define(
    "moe_kernels::ternary_linear_input_grad",
    "(Tensor grad_out, Tensor weight, Tensor[] deltas, float[] values, Tensor? delta_ids, Tensor? delta_weights) "
    "-> Tensor",
)
torch.library.define(
    "moe_kernels::ternary_linear_weights_grad",
    "(Tensor grad_out, Tensor x, Tensor[] deltas, float[] values, Tensor? delta_ids) -> Tensor",
)

ternary_linear = torch.ops.moe_kernels.ternary_linear.default
ternary_linear_input_grad = torch.ops.moe_kernels.ternary_linear_input_grad.default
ternary_linear_weights_grad = torch.ops.moe_kernels.ternary_linear_weights_grad.default


@torch.library.register_fake("moe_kernels::ternary_linear")
def _(x: Tensor, weight: Tensor, *rest):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("moe_kernels::ternary_linear_input_grad")
def _(grad_out: Tensor, weight: Tensor, *rest):
    return grad_out.new_empty(grad_out.shape[0], weight.shape[1])


@torch.library.register_fake("moe_kernels::ternary_linear_weights_grad")
def _(grad_out: Tensor, x: Tensor, deltas, values, delta_ids: Tensor | None):
    top_k = len(deltas) if delta_ids is None else delta_ids.shape[1]
    return x.new_empty(x.shape[0], top_k, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
