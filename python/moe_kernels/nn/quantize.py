"""Quantises the experts of layers: :func:`quantize_experts`."""

from torch import nn

from moe_kernels._checks import value_error
from moe_kernels.nn.feed_forward import MoEFeedForward
from moe_kernels.nn.quantized_experts import QuantizedExperts, put_in_place
from moe_kernels.ops.quantize import quantize


def quantize_experts(module: nn.Module, format: str = "int8", *, group_size: int | None = None) -> list[str]:
    """Quantises the experts of every :class:`MoEFeedForward` in ``module``, in place; they are frozen from then on.

    ``gate_up_proj`` and ``down_proj`` become :class:`QuantizedExperts`; the router and the shared expert stay.
    To load a checkpoint of a quantised layer, quantise the layer first: ``load_state_dict`` then takes the bytes.

    Args:
        module: a layer, or a model that holds some.
        format, group_size: as in :func:`moe_kernels.quantize`.

    Returns:
        The names of the layers that were quantised; layers that are quantised already are left alone.

    Raises:
        ValueError: as :func:`moe_kernels.quantize`. Layers before the one that did not fit stay quantised.
    """
    names = []
    for name, layer in module.named_modules():
        if not isinstance(layer, MoEFeedForward) or isinstance(layer.gate_up_proj, QuantizedExperts):
            continue
        if hasattr(layer, "expert_parallel"):
            remedy = "call moe_kernels.distributed.quantize_experts"
            raise value_error("quantize_experts", f"experts of {name!r}", "on one device", "experts over ranks", remedy)
        options = {"format": format, "group_size": group_size}
        gate_up = quantize(layer.gate_up_proj, **options, num_splits=num_splits(layer))
        down = quantize(layer.down_proj, **options)  # both, before a layer is changed
        put_in_place(layer, "gate_up_proj", gate_up)
        put_in_place(layer, "down_proj", down)
        names.append(name)
    return names


def num_splits(layer: MoEFeedForward) -> int:
    """Whether the rows of gate and up are held apart, as the fused kernels want them. With adapters others run."""
    return 2 if layer.activation.gated and not hasattr(layer, "expert_lora") else 1
