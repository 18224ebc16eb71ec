"""The expert functions that transformers calls: one for plain weights, one for fine-grained FP8 weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_kernels._checks import value_error
from moe_kernels._dispatch import autocast_enabled
from moe_kernels.integrations.transformers.gates import Gate, recognise
from moe_kernels.nn.quantized_experts import QuantizedExperts, expert_weights
from moe_kernels.ops.expert_ffn import expert_ffn
from moe_kernels.ops.grouped_gemm import grouped_gemm
from moe_kernels.ops.permute import permute, plan_dispatch, unpermute
from moe_kernels.ops.quantize import QuantizedWeights


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``experts_implementation="moe_kernels"`` of every class that ``use_experts_implementation`` decorates.

    ::

        h      = up[e] @ hidden_states[t] + up_bias[e]           e = top_k_index[t, k], up = gate_up_proj or up_proj
        y      = down_proj[e] @ gate(h) + down_bias[e]
        out[t] = sum_k top_k_weights[t, k] * post_expert_norm(y)       the norm where the class has one

    A gate that is recognised exactly (see :mod:`.gates`) runs fused, by :func:`moe_kernels.expert_ffn`. Any other, and
    every class with a ``post_expert_norm``, runs as permute, grouped_gemm, the module's own functions, grouped_gemm,
    unpermute. The layout is read from the decorator's flags, weights are read in place, and one function serves
    prefill and decode.

    Args:
        self: the experts module.
        hidden_states: [num_tokens, hidden_size]; cast to the dtype of the weights where it differs.
        top_k_index: [num_tokens, top_k], int32 or int64. An id outside [0, num_experts), such as the sentinels of
            expert parallelism, gives zero and zero gradient.
        top_k_weights: [num_tokens, top_k], any float dtype.

    Returns:
        [num_tokens, hidden_size], dtype of ``hidden_states``.
    """
    if self.has_gate:
        up_proj, up_bias = self.gate_up_proj, self.gate_up_proj_bias if self.has_bias else None
    else:
        up_proj, up_bias = self.up_proj, self.up_proj_bias if self.has_bias else None
    down_proj, down_bias = self.down_proj, self.down_proj_bias if self.has_bias else None
    if self.is_transposed and not isinstance(up_proj, QuantizedExperts):
        up_proj, down_proj = up_proj.transpose(1, 2), down_proj.transpose(1, 2)
    return run(
        hidden_states,
        top_k_index,
        top_k_weights,
        expert_weights(up_proj),
        expert_weights(down_proj),
        up_bias,
        down_bias,
        gate=fusable_gate(self),
        own_gate=self._apply_gate if self.has_gate else self.act_fn,
        post_expert_norm=self.post_expert_norm if self.has_post_expert_norm else None,
    )


def fp8_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``experts_implementation="moe_kernels"`` of ``FP8Experts``: dequantises, then does as :func:`experts_forward`.

    Unless :func:`.quantize_experts` has turned the weights over to the kernels that read e4m3, each call makes a copy
    of the layer's weights in the dtype of ``hidden_states`` (``3 * num_experts * intermediate_size * hidden_size``
    elements where gated), which lives until the call ends, or until backward where a gradient flows to
    ``hidden_states``. That is slower than plain weights, but it runs on any device; transformers' own FP8 experts need
    a GPU. Activations are not quantised, so results are closer to the plain model's than those of transformers'
    kernels, which round activations to FP8. The weights and their scales get no gradient.

    Args:
        self, hidden_states, top_k_index, top_k_weights: as :func:`experts_forward`.

    Raises:
        ValueError: packed FP4 weights, or static activation scales: see :func:`refuse_fp8`.
    """
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    gates = {"gate": fusable_gate(self), "own_gate": self._apply_gate if self.has_gate else self.act_fn}
    if isinstance(self.down_proj, QuantizedExperts):
        return run(hidden_states, top_k_index, top_k_weights, getattr(self, up_name)(), self.down_proj(), **gates)
    reason = refuse_fp8(self)
    if reason is not None:
        raise value_error("fp8_experts_forward", *reason)
    dtype = hidden_states.dtype
    if autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
    up_proj = _dequantise(getattr(self, up_name), getattr(self, up_name + "_scale_inv"), self.block_size, dtype)
    down_proj = _dequantise(self.down_proj, self.down_proj_scale_inv, self.block_size, dtype)
    return run(hidden_states, top_k_index, top_k_weights, up_proj, down_proj, **gates)


def refuse_fp8(experts: nn.Module) -> tuple[str, str, object, str] | None:
    """Why ``FP8Experts`` cannot run here, as (argument, expected, actual, remedy); None when it can."""
    if isinstance(experts.down_proj, QuantizedExperts):
        return None
    dtype = experts.down_proj.dtype
    if not dtype.is_floating_point:
        remedy = "there is no FP4 path; load the model with dequantize=True or another experts_implementation"
        return "down_proj", "torch.float8_e4m3fn", f"{dtype} (packed FP4)", remedy
    if experts.activation_scheme != "dynamic":
        remedy = "static scales would be ignored, as activations are not quantised; use experts_implementation='eager'"
        return "activation_scheme", "'dynamic'", repr(experts.activation_scheme), remedy
    return None


def fusable_gate(experts: nn.Module) -> Gate | None:
    """The gate of a decorated class, where all that it does fits :func:`moe_kernels.expert_ffn`; else None."""
    if experts.has_post_expert_norm:
        return None
    gate = recognise(experts)
    # a recipe and a flag that contradict each other: the module's own code decides
    if gate is not None and gate.interleaved == experts.is_concatenated:
        return None
    return gate


def run(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    up_proj: Tensor | QuantizedWeights,
    down_proj: Tensor | QuantizedWeights,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    gate: Gate | None,
    own_gate: Callable[[Tensor], Tensor],
    post_expert_norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Runs experts [num_experts, out, in]: fused where ``gate`` is known, else ``own_gate`` between grouped GEMMs."""
    # transformers' own implementations cast like this: norms kept in float32 hand float32 to bfloat16 experts
    # quantised weights take any dtype: biases then say which is the model's own
    quantized = isinstance(up_proj, QuantizedWeights)
    dtype = up_proj.dtype if not quantized else hidden_states.dtype if up_bias is None else up_bias.dtype
    rows = hidden_states.to(dtype)
    if gate is not None:
        out = expert_ffn(
            rows,
            topk_ids,
            topk_weights,
            up_proj,
            down_proj,
            gate_up_bias=up_bias,
            down_bias=down_bias,
            activation=gate.activation,
            interleaved=gate.interleaved,
        )
        return out.to(hidden_states.dtype)
    plan = plan_dispatch(topk_ids, up_proj.shape[0])
    rows = own_gate(grouped_gemm(permute(rows, plan), up_proj, plan.expert_offsets, up_bias))
    rows = grouped_gemm(rows.to(dtype if quantized else down_proj.dtype), down_proj, plan.expert_offsets, down_bias)
    if post_expert_norm is not None:
        rows = post_expert_norm(rows)
    return unpermute(rows, plan, topk_weights).to(hidden_states.dtype)


@torch.no_grad()
def _dequantise(weight: Tensor, scale: Tensor, block_size: list[int] | None, dtype: torch.dtype) -> Tensor:
    """``weight[e, o, i] * scale[e, o // block_out, i // block_in]``: [num_experts, out, in] in ``dtype``."""
    if weight.element_size() > 1:  # transformers keeps weights that it did not quantise, and ignores their scales
        return weight.to(dtype)
    _, out_features, in_features = weight.shape
    # without blocks the scales are one for each half of a gate_up_proj, or one for the matrix
    block_out, block_in = block_size or (-(-out_features // scale.shape[1]), in_features)
    scale = scale.float().repeat_interleave(block_out, 1)[:, :out_features]
    scale = scale.repeat_interleave(block_in, 2)[:, :, :in_features]
    return (weight.float() * scale).to(dtype)
