"""Experts as DTensors: how they are cut, and what a rank computes with."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moe_kernels._checks import FLOAT_DTYPES, value_error
from moe_kernels.distributed.sizes import raise_disagreement

_OP = "ExpertParallel"


class Placed(NamedTuple):
    """Where a module's experts are; its attribute ``expert_parallel``.

    Attributes:
        mesh: one dimension, the ranks that share the experts.
        layer: name for errors.
        chunk_tokens: see :func:`moe_kernels.distributed.expert_parallel_ffn`.
    """

    mesh: DeviceMesh
    layer: str
    chunk_tokens: int | None

    @property
    def group(self) -> ProcessGroup:
        return self.mesh.get_group()


def placed_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of each module whose experts are spread."""
    return [(path, module) for path, module in model.named_modules() if hasattr(module, "expert_parallel")]


def sharded_names(module: nn.Module) -> list[str]:
    """The module's own parameters that are spread."""
    return [name for name, weight in module.named_parameters(recurse=False) if isinstance(weight, DTensor)]


def place(module: nn.Module, names: list[str], where: Placed, source: int | None) -> None:
    """Spreads the named parameters [num_experts, ...] of a module, and makes the rest of it the same on all ranks.

    Args:
        source: the rank of the mesh whose values count; None takes each rank's own.

    Raises:
        ValueError: a parameter that cannot be spread, or is another one elsewhere (on every rank).
    """
    weights = {name: getattr(module, name) for name in names}
    _check(weights, where)
    for name, weight in weights.items():
        shard = distribute_tensor(weight.detach(), where.mesh, [Shard(0)], src_data_rank=source)
        module.register_parameter(name, nn.Parameter(shard, requires_grad=weight.requires_grad))
    if source is not None:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if not isinstance(tensor, DTensor) and not tensor.is_meta:
                    dist.broadcast(tensor, group=where.group, group_src=source)
    module.expert_parallel = where


def local_shard(weight: DTensor, where: Placed) -> Tensor:
    """What this rank computes with; its gradient counts as one of the mesh's ranks, whose mean is the expert's."""
    shard = weight.to_local()
    if shard.requires_grad and where.mesh.size() > 1:
        shard.register_hook(lambda grad: grad / where.mesh.size())
    return shard


def _check(weights: dict[str, Tensor], where: Placed) -> None:
    mesh, layer = where.mesh, where.layer
    op = f"{_OP}: {layer}"
    if mesh.ndim != 1:
        remedy = "give the dimension of the experts, mesh['expert']"
        raise value_error(op, "device_mesh", "of one dimension", mesh.ndim, remedy)
    for name, weight in weights.items():
        if not isinstance(weight, nn.Parameter) or isinstance(weight, DTensor):
            found = "DTensor" if isinstance(weight, DTensor) else type(weight).__name__
            raise value_error(op, name, "a plain parameter", found, "shard it once, before anything else")
        if weight.dtype not in FLOAT_DTYPES:
            raise value_error(op, name, f"one of {FLOAT_DTYPES}", weight.dtype, "shard it before it is quantised")
    # the ranks look at each other's layers before one of them may raise and leave the others waiting
    mine = {name: f"{list(weight.shape)} {weight.dtype}" for name, weight in weights.items()}
    heard: list[dict[str, str]] = [{}] * mesh.size()
    dist.all_gather_object(heard, mine, group=where.group)
    for name in mine:
        layouts = [rank.get(name, "nothing") for rank in heard]
        if len(set(layouts)) > 1:
            raise_disagreement(layer, name, layouts)
    num_experts = next(iter(weights.values())).shape[0]
    if num_experts % mesh.size():
        expected = f"a multiple of the {mesh.size()} ranks"
        remedy = "choose a mesh dimension that divides it, or add experts"
        raise value_error(op, "num_experts", expected, num_experts, remedy)
