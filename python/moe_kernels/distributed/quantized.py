"""Quantised experts over ranks: :func:`quantize_experts`."""

from dataclasses import replace

from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from moe_kernels._checks import value_error
from moe_kernels.nn import MoEFeedForward, QuantizedExperts
from moe_kernels.nn.quantize import num_splits
from moe_kernels.ops.quantize import QuantizedWeights, quantize


class ShardedQuantizedExperts(QuantizedExperts):
    """:class:`QuantizedExperts` of which each rank has its own: ``data`` is a DTensor, cut by experts."""

    def _load_from_state_dict(self, *arguments, **options) -> None:
        nn.Module._load_from_state_dict(self, *arguments, **options)
        mine = QuantizedWeights.from_bytes(self.data.to_local())
        self._weights = replace(mine, shape=(self.data.shape[0], *mine.shape[1:]))


def spread_quantized(
    whole: QuantizedExperts, mesh: DeviceMesh, placements: list[Placement], source: int | None
) -> ShardedQuantizedExperts:
    weights = whole()
    data = distribute_tensor(weights.data, mesh, placements, src_data_rank=source)
    return ShardedQuantizedExperts(replace(weights, data=data))


def local_quantized(weights: QuantizedWeights) -> QuantizedWeights:
    """This rank's experts."""
    data = weights.data.to_local()
    return replace(weights, data=data, shape=(data.shape[0], *weights.shape[1:]))


def quantize_experts(model: nn.Module, format: str = "int8", *, group_size: int | None = None) -> list[str]:
    """:func:`moe_kernels.nn.quantize_experts` of layers whose experts are spread: each rank its own, nothing is sent.

    An expert has the bytes that it has in one process, and so has a checkpoint.

    Args:
        model: with :class:`MoEFeedForward` layers spread by :class:`ExpertParallel`, before DDP or FSDP.
        format, group_size: as in :func:`moe_kernels.quantize`.

    Returns:
        The names of the layers that were quantised; layers that are quantised already are left alone.

    Raises:
        ValueError: a layer whose experts are split over ranks or by FSDP; or as :func:`moe_kernels.quantize`.
    """
    names = []
    for name, layer in model.named_modules():
        spread = isinstance(layer, MoEFeedForward) and hasattr(layer, "expert_parallel")
        if not spread or isinstance(layer.gate_up_proj, QuantizedExperts):
            continue
        where, quantised = layer.expert_parallel, []
        for weight, splits in ((layer.gate_up_proj, num_splits(layer)), (layer.down_proj, 1)):
            if weight.device_mesh != where.mesh or where.tensor_ranks > 1:
                remedy = "quantise before FSDP, and without tensor_dim"
                raise value_error("quantize_experts", f"experts of {name!r}", "whole", weight.placements, remedy)
            options = {"format": format, "group_size": group_size, "num_splits": splits}
            mine = quantize(weight.detach().to_local(), **options)
            data = DTensor.from_local(mine.data, weight.device_mesh, weight.placements, run_check=False)
            quantised.append(replace(mine, data=data, shape=(data.shape[0], *mine.shape[1:])))
        for weight, whole in zip(("gate_up_proj", "down_proj"), quantised, strict=True):
            delattr(layer, weight)
            layer.add_module(weight, ShardedQuantizedExperts(whole))
        names.append(name)
    return names
