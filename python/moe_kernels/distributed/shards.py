"""Experts as DTensors: how they are cut, and what a rank computes with."""

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from moe_kernels._checks import FLOAT_DTYPES, value_error
from moe_kernels.distributed.all_to_all import finish
from moe_kernels.distributed.checkpoint import need_checkpointable
from moe_kernels.distributed.faults import describe, known
from moe_kernels.distributed.quantized import local_quantized, spread_quantized
from moe_kernels.distributed.sizes import Team, raise_disagreement
from moe_kernels.nn import QuantizedExperts
from moe_kernels.ops.quantize import QuantizedWeights

_OP = "ExpertParallel"


class Placed(NamedTuple):
    """Where a module's experts are; its attribute ``expert_parallel``.

    Attributes:
        mesh: the ranks that share the experts; a second dimension splits the intermediate dimension of each.
        everyone: the same ranks in one dimension.
        layer: name for errors.
        chunk_tokens: see :func:`moe_kernels.distributed.expert_parallel_ffn`.
    """

    mesh: DeviceMesh
    everyone: DeviceMesh
    layer: str
    chunk_tokens: int | None

    @property
    def group(self) -> ProcessGroup:
        return self.everyone.get_group()

    @property
    def tensor_ranks(self) -> int:
        """How many ranks share each expert."""
        return self.mesh.size(1) if self.mesh.ndim == 2 else 1

    def team(self, num_experts: int) -> Team:
        return Team(self.group, self.layer, num_experts, self.tensor_ranks)


def locate(mesh: DeviceMesh, layer: str, chunk_tokens: int | None, tensor_dim: str | None) -> Placed:
    """Where experts go on a mesh of ranks.

    Raises:
        ValueError: the mesh is not of the experts' dimension, then ``tensor_dim`` where it is given.
    """
    op, names = f"{_OP}: {layer}", mesh.mesh_dim_names or ()
    if tensor_dim is None and mesh.ndim != 1:
        remedy = "give the dimension of the experts, mesh['expert'], or name the other one by tensor_dim"
        raise value_error(op, "device_mesh", "of one dimension", mesh.ndim, remedy)
    if tensor_dim is not None and (mesh.ndim != 2 or names[1:] != (tensor_dim,)):
        remedy = f"give mesh['expert', '{tensor_dim}']"
        raise value_error(op, "device_mesh", f"of two dimensions, the second '{tensor_dim}'", f"{names}", remedy)
    return Placed(mesh, mesh if mesh.ndim == 1 else mesh._flatten(), layer, chunk_tokens)


def placed_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of each module whose experts are spread."""
    return [(path, module) for path, module in model.named_modules() if hasattr(module, "expert_parallel")]


def sharded_names(module: nn.Module) -> list[str]:
    """The module's parameters that are spread."""
    return [name for name, weight in module.named_parameters() if isinstance(weight, DTensor)]


def place(
    module: nn.Module, find_slices: Callable[[], dict[str, Placement]], where: Placed, source: int | None
) -> None:
    """Spreads parameters [num_experts, ...] of a module, and makes the rest of it the same on all ranks.

    Args:
        find_slices: gives their names (also of :class:`QuantizedExperts` in their place), and how the ranks that share
            an expert cut it; or raises.
        source: the rank of the mesh whose values count; None takes each rank's own.

    Raises:
        ValueError: a parameter that cannot be spread, or is another one elsewhere (on every rank).
        RuntimeError: another rank cannot spread its own.
    """
    slices, weights = _agree(module, find_slices, where)
    for name, weight in weights.items():
        owner, _, own_name = name.rpartition(".")
        cut = slices[name] if where.tensor_ranks > 1 else Shard(0)  # which over one rank is the whole
        placements = [Shard(0), cut][: where.mesh.ndim]
        if isinstance(weight, QuantizedExperts):
            spread = spread_quantized(weight, where.mesh, placements, source)
            module.get_submodule(owner).add_module(own_name, spread)
            continue
        shard = distribute_tensor(weight.detach(), where.mesh, placements, src_data_rank=source)
        parameter = nn.Parameter(shard, requires_grad=weight.requires_grad)
        module.get_submodule(owner).register_parameter(own_name, parameter)
    if source is not None:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if not isinstance(tensor, DTensor) and not tensor.is_meta:
                    dist.broadcast(tensor, group=where.group, group_src=source)
    module.expert_parallel = where
    if where.tensor_ranks > 1:
        module.register_state_dict_post_hook(need_checkpointable)


def local_shard(weight: DTensor | QuantizedWeights, where: Placed) -> Tensor | QuantizedWeights:
    """What this rank computes with; its gradient counts as one of the mesh's ranks, whose mean is the expert's."""
    if isinstance(weight, QuantizedWeights):
        return local_quantized(weight)
    shard, ranks = weight.to_local(), where.mesh.size()
    if where.tensor_ranks > 1 and weight.placements[1].is_replicate():
        # a bias behind the sum over slices: each rank adds its part, and each knows the whole gradient
        shard, ranks = shard / where.tensor_ranks, ranks // where.tensor_ranks
    if shard.requires_grad and ranks > 1:
        shard.register_hook(lambda grad: grad / ranks)
    return shard


def local_factor(factor: DTensor, where: Placed) -> Tensor:
    """As :func:`local_shard`. Of a factor that all ranks of an expert have, each finds one slice's gradient."""
    shard, ranks = factor.to_local(), where.mesh.size()
    if where.tensor_ranks == 1 or not factor.placements[1].is_replicate():
        return local_shard(factor, where)

    def add_up(grad: Tensor) -> Tensor:
        group = where.mesh.get_group(1)
        pending = torch.ops._c10d_functional.all_reduce(grad.contiguous(), "sum", group.group_name)
        return finish(pending, group, where.layer) / ranks

    if shard.requires_grad:
        shard.register_hook(add_up)
    return shard


def _agree(
    module: nn.Module, find_slices: Callable[[], dict[str, Placement]], where: Placed
) -> tuple[dict[str, Placement], dict[str, nn.Parameter | QuantizedExperts]]:
    """What :func:`place` spreads. The ranks look at each other's layers before one of them may raise by itself."""
    problem, slices, weights = None, {}, {}
    try:
        slices = find_slices()
        weights = {name: operator.attrgetter(name)(module) for name in slices}
        _check(weights, slices, where)
    except Exception as error:
        problem = known(error)
    mine = {
        name: f"{list(weight.shape)} {weight.dtype if isinstance(weight, Tensor) else weight().format}"
        for name, weight in weights.items()
        if problem is None
    }
    heard: list[tuple[str, dict[str, str]]] = [("", {})] * where.mesh.size()
    dist.all_gather_object(heard, (describe(problem) if problem else "", mine), group=where.group)
    if problem is not None:
        raise problem
    if failed := "; ".join(f"rank {rank}: {text}" for rank, (text, _) in enumerate(heard) if text):
        raise RuntimeError(f"{_OP}: {where.layer}: all ranks must be able to spread the layer, but {failed}")
    for name in dict.fromkeys(name for _, layouts in heard for name in layouts):
        layouts = [layouts.get(name, "nothing") for _, layouts in heard]
        if len(set(layouts)) > 1:
            raise_disagreement(where.layer, name, layouts)
    return slices, weights


def _check(weights: dict[str, nn.Parameter | QuantizedExperts], slices: dict[str, Placement], where: Placed) -> None:
    """Raises where this rank by itself can see that the weights cannot be spread."""
    mesh, op = where.mesh, f"{_OP}: {where.layer}"
    for name, weight in weights.items():
        if type(weight) is QuantizedExperts:
            if where.tensor_ranks > 1:
                remedy = "quantised experts are spread whole, without tensor_dim"
                raise value_error(op, name, "a plain parameter", "QuantizedExperts", remedy)
            continue
        if not isinstance(weight, nn.Parameter) or isinstance(weight, DTensor):
            found = "DTensor" if isinstance(weight, DTensor) else type(weight).__name__
            raise value_error(op, name, "a plain parameter", found, "shard it once, before anything else")
        if weight.dtype not in FLOAT_DTYPES:
            raise value_error(op, name, f"one of {FLOAT_DTYPES}", weight.dtype, "quantise with quantize_experts")
    for name, weight in weights.items():
        if weight.shape[0] % mesh.size(0):
            expected = f"a multiple of the {mesh.size(0)} ranks"
            remedy = "choose a mesh dimension that divides it, or add experts"
            raise value_error(op, "num_experts", expected, weight.shape[0], remedy)
        if isinstance(slices[name], Shard | _StridedShard):
            parts = slices[name].split_factor if isinstance(slices[name], _StridedShard) else 1
            intermediate_size = weight.shape[slices[name].dim] // parts
            if intermediate_size % where.tensor_ranks:
                expected = f"a multiple of the {where.tensor_ranks} ranks that share an expert"
                raise value_error(op, f"intermediate size of {name}", expected, intermediate_size)
