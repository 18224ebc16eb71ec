"""Gradients of the expert FFN, from the least that can be saved."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.activation import Activation
from moe_kernels.ops.expert_ffn import native


def kernels(backend: str):
    """The module whose functions run: native, or their Triton twins, which are imported when first asked for."""
    if backend == "native":
        return native
    from moe_kernels.ops.expert_ffn import triton

    return triton


#: positions of the float tensors among the arguments of forward
_DIFFERENTIABLE = (0, 2, 3, 4, 5, 6)


class ExpertFFN(torch.autograd.Function):
    """Saves the input X [num_tokens, hidden_size] and the pre-activation H [pairs, 2 * intermediate_size].

    With s = topk_weights, O the output, one row a pair::

        dA' = dO @ down_proj[e]          A, A'(H) recomputed from H
        ds  = <dA', A> + <dO, down_bias[e]>
        dH  = activation'(H) * s * dA'
        dX  = sum over the token's pairs of dH @ gate_up_proj[e]
        d gate_up_proj[e] = dH.T @ X     d down_proj[e] = dO.T @ (s * A)     and their sums over rows for the biases

    ``quantized`` holds the weights whose bytes ``gate_up_proj`` and ``down_proj`` are, where they are quantised:
    frozen, and dequantised for backward in the dtype of the input.
    """

    @staticmethod
    def forward(
        ctx,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        activation: Activation,
        interleaved: bool,
        quantized,
        backend: str,
    ) -> Tensor:
        arguments = (*activation.kernel_arguments(), interleaved)
        tensors = (hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, gate_up_bias, down_bias)
        gate_up_size = (quantized[0] if quantized else gate_up_proj).shape[1]
        out, pre_activation = kernels(backend).expert_ffn(*tensors, *arguments, gate_up_size, True)
        ctx.save_for_backward(
            hidden_states if ctx.needs_input_grad[3] else None,
            topk_ids,
            topk_weights,
            gate_up_proj,
            down_proj,
            down_bias,
            pre_activation,
        )
        ctx.arguments, ctx.quantized, ctx.backend = arguments, quantized, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        asked = [ctx.needs_input_grad[position] for position in _DIFFERENTIABLE]
        hidden_states, topk_ids, topk_weights, *weights, down_bias, pre_activation = ctx.saved_tensors
        if ctx.quantized:
            weights = [held.dequantize(grad_out.dtype) for held in ctx.quantized]
        tensors = (hidden_states, topk_ids, topk_weights, *weights, down_bias, pre_activation)
        grads = kernels(ctx.backend).expert_ffn_backward(grad_out, *tensors, *ctx.arguments, *asked)
        in_order: list[Tensor | None] = [None] * 11
        for position, grad, needed in zip(_DIFFERENTIABLE, grads, asked, strict=True):
            in_order[position] = grad if needed else None
        return tuple(in_order)
