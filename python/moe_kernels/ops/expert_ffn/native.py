"""Schemas, fakes and handles of the compiled expert FFN ops (csrc/ops/expert_ffn)."""

import torch
from torch import Tensor

from moe_kernels.ops.grouped_gemm.native import is_transposed, new_weight_grad

#: which gradients backward is to compute; one that is not asked comes back empty
_GRADS = (
    "grad_hidden_states",
    "grad_topk_weights",
    "grad_gate_up_proj",
    "grad_down_proj",
    "grad_gate_up_bias",
    "grad_down_bias",
)
_ACTIVATION = "int kind, bool gated, float alpha, float limit, bool clamp_output, float up_offset, bool interleaved"

torch.library.define(
    "moe_kernels::expert_ffn",
    "(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_proj, Tensor down_proj, "
    f"Tensor? gate_up_bias, Tensor? down_bias, {_ACTIVATION}, SymInt gate_up_size, bool save_pre_activation) -> "
    "(Tensor, Tensor)",
)
torch.library.define(
    "moe_kernels::expert_ffn_backward",
    "(Tensor grad_out, Tensor? hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor gate_up_proj, "
    f"Tensor down_proj, Tensor? down_bias, Tensor pre_activation, {_ACTIVATION}, "
    + ", ".join(f"bool {name}" for name in _GRADS)
    + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)

expert_ffn = torch.ops.moe_kernels.expert_ffn.default
expert_ffn_backward = torch.ops.moe_kernels.expert_ffn_backward.default


def cuda_misfit(hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> tuple[str, str, object] | None:
    """What keeps tensors from the CUDA kernels (csrc/ops/grouped_gemm/rows_gemm_sm90.cuh): the argument, what it must
    be, what it is. None where they fit: tensor copies want addresses and strides that are multiples of 16 bytes."""
    if hidden_states.dtype not in (torch.bfloat16, torch.float16):
        return "hidden_states", "bfloat16 or float16 for the CUDA kernels", hidden_states.dtype
    if hidden_states.shape[1] % 8 or down_proj.shape[2] % 8:
        sizes = (hidden_states.shape[1], down_proj.shape[2])
        return "hidden_size and intermediate_size", "multiples of 8 for the CUDA kernels", sizes
    if gate_up_proj.shape[0] > 1024:  # a block keeps a number for each in shared memory
        return "num_experts", "at most 1024 for the CUDA kernels", gate_up_proj.shape[0]
    for name, weights in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if weights.stride(2) != 1 or weights.stride(1) % 8 or weights.stride(0) % 8:
            return f"{name}.stride()", "(8 i, 8 j, 1) for the CUDA kernels", weights.stride()
        if not torch.compiler.is_compiling() and weights.data_ptr() % 16:  # the kernel checks again
            return f"{name}.data_ptr()", "a multiple of 16 for the CUDA kernels", weights.data_ptr()
    return None


@torch.library.register_fake("moe_kernels::expert_ffn")
def _(hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, gate_up_bias, down_bias, *arguments):
    gate_up_size, save_pre_activation = arguments[-2:]
    if save_pre_activation:
        pre_activation = hidden_states.new_empty(topk_ids.shape[0] * topk_ids.shape[1], gate_up_size)
    else:
        pre_activation = hidden_states.new_empty(0)
    return hidden_states.new_empty(hidden_states.shape), pre_activation


@torch.library.register_fake("moe_kernels::expert_ffn_backward")
def _(grad_out, hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, down_bias, pre_activation, *arguments):
    num_experts, gate_up_size, hidden_size = gate_up_proj.shape
    transposed = is_transposed(gate_up_proj), is_transposed(down_proj)
    grads = (
        lambda: grad_out.new_empty(grad_out.shape),
        lambda: topk_weights.new_empty(topk_weights.shape),
        lambda: new_weight_grad(grad_out, num_experts, gate_up_size, hidden_size, transposed[0]),
        lambda: new_weight_grad(grad_out, num_experts, hidden_size, down_proj.shape[2], transposed[1]),
        lambda: grad_out.new_empty(num_experts, gate_up_size),
        lambda: grad_out.new_empty(num_experts, hidden_size),
    )
    return tuple(
        new() if asked else grad_out.new_empty(0) for new, asked in zip(grads, arguments[-len(_GRADS) :], strict=True)
    )
