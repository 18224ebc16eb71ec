"""Public function of the expert FFN: :func:`expert_ffn`."""

import torch
from torch import Tensor

from moe_kernels._checks import (
    FLOAT_DTYPES,
    ID_DTYPES,
    check_same_device,
    check_tensor,
    dtype_error,
    shape_error,
    value_error,
)
from moe_kernels._dispatch import Backend, autocast, autocast_enabled, missing_reason, resolve
from moe_kernels.activation import Activation
from moe_kernels.ops.expert_ffn import autograd, native, reference
from moe_kernels.ops.grouped_gemm.api import check_bias, check_prepacked, check_quantized
from moe_kernels.ops.grouped_gemm.prepacked import PrepackedWeights
from moe_kernels.ops.quantize.quantized import QuantizedWeights

_OP = "expert_ffn"
# what has other kernels
_QUANTIZED_OP, _TRAINING_OP = "expert_ffn of quantised weights", "expert_ffn with gradients"
_SILU = Activation()


def expert_ffn(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor | PrepackedWeights | QuantizedWeights,
    down_proj: Tensor | PrepackedWeights | QuantizedWeights,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: Activation = _SILU,
    interleaved: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Runs each token through its chosen experts and adds their outputs, weighted.

    ::

        h[t, k] = gate_up_proj[e] @ hidden_states[t] + gate_up_bias[e]         e = topk_ids[t, k]
        a[t, k] = activation(gate of h, up of h)                               see Activation
        out[t]  = sum_k topk_weights[t, k] * (down_proj[e] @ a[t, k] + down_bias[e])

    A pair whose id is outside [0, num_experts) is skipped: it adds zero and gets zero gradient.

    One function for decode and prefill. Everything between the input and the output is float32 (float64 for float64)
    except ``a``, which is rounded to the dtype of the weights. Sums run in one fixed order, so a token's output has the
    same bits whatever tokens stand beside it and however many threads run.

    On the CPU neither permuted inputs nor permuted outputs exist, and a token adds its experts in rising order of their
    ids. On a GPU the experts' outputs are rounded to the dtype of the weights and lie in one tensor [num_tokens *
    top_k, hidden_size]; a token adds them in the order of ``topk_ids``' columns. The kernels there are CUDA C++ on
    compute capability 9.0 for bfloat16 and float16 where no gradient is needed (sizes multiples of 8, weights
    [num_experts, out, in] with 16-byte aligned rows), else Triton.

    Args:
        hidden_states: [num_tokens, hidden_size], float32, bfloat16, float16 or float64, any strides.
        topk_ids: [num_tokens, top_k], int32 or int64.
        topk_weights: [num_tokens, top_k], any of the float dtypes.
        gate_up_proj: [num_experts, 2 * intermediate_size, hidden_size] (ungated: [num_experts, intermediate_size,
            hidden_size]), dtype of ``hidden_states``, any strides: give a transposed layout as
            ``weights.transpose(1, 2)``, it is read in place. Or :func:`prepack` of it (inference only).
            Or :func:`quantize` of it, ``num_splits=2`` where gated (no gradient flows to it; native kernels want
            float32, bfloat16 or float16).
        down_proj: [num_experts, hidden_size, intermediate_size], likewise.
        gate_up_bias: [num_experts, 2 * intermediate_size].
        down_bias: [num_experts, hidden_size].
        activation: an :class:`Activation`; silu with gate and up by default.
        interleaved: whether gate and up rows alternate (GPT-OSS) instead of following each other.
        backend: see :mod:`moe_kernels`.

    Returns:
        [num_tokens, hidden_size], dtype of ``hidden_states``. Under ``torch.autocast`` the inputs are cast to the
        autocast dtype, and so is the result, as ``F.linear`` does.

        Differentiable in every floating tensor argument. Saved for backward, besides the arguments themselves:
        ``h`` [num_tokens * top_k, 2 * intermediate_size]; no gradient is computed for an argument that needs none, and
        ``hidden_states`` is not kept where ``gate_up_proj`` is frozen. Backward runs once (no double backward).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names the argument.

    Source: the recomputation follows SonicMoE (arXiv 2512.14080): ``grad topk_weights = <grad_out @ down_proj, a>``.
    """
    check_tensor(_OP, "hidden_states", hidden_states)
    check_tensor(_OP, "topk_ids", topk_ids)
    check_tensor(_OP, "topk_weights", topk_weights)
    packed = isinstance(gate_up_proj, PrepackedWeights)
    quantized = isinstance(gate_up_proj, QuantizedWeights)
    if not packed and not quantized:
        check_tensor(_OP, "gate_up_proj", gate_up_proj)
    if isinstance(down_proj, PrepackedWeights) != packed or isinstance(down_proj, QuantizedWeights) != quantized:
        expected = "prepacked where gate_up_proj is, quantised where it is quantised, else plain"
        raise value_error(_OP, "down_proj", expected, type(down_proj).__name__)
    if not packed and not quantized:
        check_tensor(_OP, "down_proj", down_proj)

    device_type = hidden_states.device.type
    if not packed and autocast_enabled(device_type):  # leaves quantised weights alone
        hidden_states, gate_up_proj, down_proj, gate_up_bias, down_bias = autocast(
            device_type, hidden_states, gate_up_proj, down_proj, gate_up_bias, down_bias
        )

    # conditions are written out: a tuple comparison costs 0.1 us, a checking function 0.5 us, the budget is 5 us
    if hidden_states.dim() != 2:
        raise shape_error(_OP, "hidden_states", "[num_tokens, hidden_size]", hidden_states)
    num_tokens, hidden_size = hidden_states.shape
    dtype = hidden_states.dtype
    if dtype not in FLOAT_DTYPES:
        raise dtype_error(_OP, "hidden_states", FLOAT_DTYPES, hidden_states)
    if topk_ids.dim() != 2 or topk_ids.shape[0] != num_tokens:
        raise shape_error(_OP, "topk_ids", f"[num_tokens={num_tokens}, top_k]", topk_ids)
    if topk_ids.dtype not in ID_DTYPES:
        raise dtype_error(_OP, "topk_ids", ID_DTYPES, topk_ids, "cast with .to(torch.int32)")
    if not torch.compiler.is_compiling() and topk_ids.numel() >= 2**31:  # the kernel checks again: no guard on the size
        raise value_error(_OP, "num_tokens * top_k", "below 2**31", topk_ids.numel(), "split the tokens")
    if topk_weights.shape != topk_ids.shape:
        raise shape_error(_OP, "topk_weights", f"{list(topk_ids.shape)} like topk_ids", topk_weights)
    if topk_weights.dtype not in FLOAT_DTYPES:
        raise dtype_error(_OP, "topk_weights", FLOAT_DTYPES, topk_weights)
    gate_up_shape = gate_up_proj.shape
    if len(gate_up_shape) != 3 or gate_up_shape[2] != hidden_size:
        expected = f"[num_experts, {'2 * ' if activation.gated else ''}intermediate_size, hidden_size={hidden_size}]"
        raise shape_error(
            _OP, "gate_up_proj", expected, gate_up_proj, "transposed weights are given as .transpose(1, 2)"
        )
    num_experts, gate_up_size, _ = gate_up_shape
    if activation.gated and gate_up_size % 2:
        raise shape_error(_OP, "gate_up_proj", "[num_experts, 2 * intermediate_size, hidden_size]", gate_up_proj)
    if interleaved and not activation.gated:
        raise value_error(_OP, "interleaved", "False where the activation is ungated", interleaved)
    if down_proj.shape != (num_experts, hidden_size, gate_up_size // 2 if activation.gated else gate_up_size):
        expected = f"[num_experts={num_experts}, hidden_size={hidden_size}, intermediate_size], where gate_up_proj is "
        raise shape_error(_OP, "down_proj", expected + str(list(gate_up_shape)), down_proj)
    if not quantized and (gate_up_proj.dtype != dtype or down_proj.dtype != dtype):
        name, wrong = ("gate_up_proj", gate_up_proj) if gate_up_proj.dtype != dtype else ("down_proj", down_proj)
        raise dtype_error(_OP, name, dtype, wrong, "it must equal that of hidden_states")
    if gate_up_bias is not None:
        check_bias(_OP, "gate_up_bias", gate_up_bias, (num_experts, gate_up_size), dtype)
    if down_bias is not None:
        check_bias(_OP, "down_bias", down_bias, (num_experts, hidden_size), dtype)
    device = hidden_states.device
    if (
        not (topk_ids.device == topk_weights.device == gate_up_proj.device == down_proj.device == device)
        or (gate_up_bias is not None and gate_up_bias.device != device)
        or (down_bias is not None and down_bias.device != device)
    ):
        check_same_device(
            _OP,
            hidden_states=hidden_states,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
            gate_up_proj=gate_up_proj,
            down_proj=down_proj,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
        )

    needs_grad = torch.is_grad_enabled() and (
        hidden_states.requires_grad
        or topk_weights.requires_grad
        or gate_up_proj.requires_grad
        or down_proj.requires_grad
        or (gate_up_bias is not None and gate_up_bias.requires_grad)
        or (down_bias is not None and down_bias.requires_grad)
    )
    chosen = resolve(_QUANTIZED_OP if quantized else _TRAINING_OP if needs_grad else _OP, backend, device_type)
    if chosen == "native" and device_type == "cuda":
        misfit = native.cuda_misfit(hidden_states, gate_up_proj, down_proj)
        if misfit is not None:
            if backend == "native":
                raise value_error(_OP, *misfit, "use backend='triton'")
            chosen = "triton" if missing_reason(_OP, "triton", device_type) is None else "reference"
    num_splits = 2 if activation.gated else 1
    weights = (gate_up_proj, down_proj)
    if packed:
        inputs = (hidden_states, topk_weights, gate_up_bias, down_bias)
        check_prepacked(_OP, "gate_up_proj", gate_up_proj, chosen, num_splits, interleaved, *inputs)
        check_prepacked(_OP, "down_proj", down_proj, chosen, 1, False)
    elif quantized:
        inputs = ("hidden_states", hidden_states)
        check_quantized(_OP, "gate_up_proj", gate_up_proj, *inputs, chosen, num_splits, interleaved)
        check_quantized(_OP, "down_proj", down_proj, *inputs, chosen, 1, False)
    if chosen == "reference":
        if quantized:
            weights = (gate_up_proj.dequantize(dtype), down_proj.dequantize(dtype))
        tensors = (hidden_states, topk_ids, topk_weights, *weights, gate_up_bias, down_bias)
        return reference.expert_ffn(*tensors, activation, interleaved)
    if packed or quantized:
        weights = (gate_up_proj.data, down_proj.data)
    arguments = (hidden_states, topk_ids, topk_weights, *weights, gate_up_bias, down_bias)
    if needs_grad:
        held = (gate_up_proj, down_proj) if quantized else None
        return autograd.ExpertFFN.apply(*arguments, activation, interleaved, held, chosen)
    arguments = (*arguments, *activation.kernel_arguments(), interleaved, gate_up_size, False)
    return autograd.kernels(chosen).expert_ffn(*arguments)[0]
