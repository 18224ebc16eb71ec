"""Quantises the experts of transformers' models: :func:`quantize_experts`."""

from torch import Tensor, nn

from moe_kernels._checks import value_error
from moe_kernels.integrations.transformers.experts import fusable_gate, refuse_fp8
from moe_kernels.integrations.transformers.replace import IMPLEMENTATION, dispatches_by
from moe_kernels.nn.quantized_experts import QuantizedExperts, put_in_place
from moe_kernels.ops.quantize import QuantizedWeights, quantize, quantized_from_fp8

_OP = "quantize_experts"


def quantize_experts(model: nn.Module, format: str = "int8", *, group_size: int | None = None) -> list[str]:
    """Quantises the experts of a transformers model that runs on moe_kernels, in place; they are frozen from then on.

    Every module whose class ``use_experts_implementation`` decorates is turned over, whatever its layout. Weights that
    are stored as e4m3 with scales (``FP8Experts``) are taken over bit for bit and need ``format="fp8"``. The weights of
    a GPT-OSS checkpoint that was loaded dequantised fit ``format="mxfp4"`` exactly: they are what was released.

    Args:
        model: any module with ``experts_implementation="moe_kernels"``, or after :func:`.replace_modules`.
        format, group_size: as in :func:`moe_kernels.quantize`.

    Returns:
        The names of the modules that were quantised; modules that are quantised already are left alone.

    Raises:
        ValueError: a module runs on another implementation, which could not read the weights; or as
            :func:`moe_kernels.quantize`. Modules before the one that did not fit stay quantised.
    """
    names = []
    for name, experts in model.named_modules():
        if dispatches_by(type(experts)) is None or isinstance(experts.down_proj, QuantizedExperts):
            continue
        if experts.config._experts_implementation != IMPLEMENTATION:
            actual = repr(experts.config._experts_implementation)
            raise value_error(
                _OP, f"experts_implementation of {name}", repr(IMPLEMENTATION), actual, "call replace_modules"
            )
        up_name = "gate_up_proj" if experts.has_gate else "up_proj"
        gate = fusable_gate(experts)
        # where the gate is the module's own code, its rows are wanted as they were
        splits = {"num_splits": 2, "interleaved": gate.interleaved} if gate is not None and experts.has_gate else {}
        up = _quantized(experts, up_name, format, group_size, splits)
        down = _quantized(experts, "down_proj", format, group_size, {})  # both, before a module is changed
        put_in_place(experts, up_name, up)
        put_in_place(experts, "down_proj", down)
        names.append(name)
    return names


def _quantized(experts: nn.Module, name: str, format: str, group_size: int | None, options: dict) -> QuantizedWeights:
    weights: Tensor = getattr(experts, name).detach()
    if hasattr(experts, f"{name}_scale_inv") and weights.element_size() == 1:
        reason = refuse_fp8(experts)
        if reason is not None:
            raise value_error(_OP, *reason)
        if format != "fp8":
            raise value_error(_OP, "format", "'fp8' for weights that are stored so", repr(format))
        return quantized_from_fp8(weights, getattr(experts, f"{name}_scale_inv"), experts.block_size, **options)
    if getattr(experts, "is_transposed", False):
        weights = weights.transpose(1, 2)
    return quantize(weights, format, group_size=group_size, **options)
