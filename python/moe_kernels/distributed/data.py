"""Experts on one dimension of a mesh and data on the other: :func:`data_parallel` (DDP), :func:`fully_shard_experts`.

::

    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("data", "expert"))
    shard_experts(model, mesh["expert"])
    model = data_parallel(model, mesh["data"])                     # every rank keeps what is replicated, or

    world = init_device_mesh("cuda", (8,))
    fully_shard_experts(model, world, mesh["data"])                # every rank keeps a shard of everything
    fully_shard(model, mesh=world)

Every rank has tokens of its own. The gradients of all parameters are means over all ranks, so a step is that of one
process whose loss is the mean of the ranks' losses.
"""

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from moe_kernels._checks import value_error
from moe_kernels.nn import MoEFeedForward


def data_parallel(model: nn.Module, data_mesh: DeviceMesh, **options) -> DistributedDataParallel:
    """``DistributedDataParallel`` of a model whose experts are spread by :func:`shard_experts`.

    DDP averages over all ranks what they all have. An expert is on the ranks of ``data_mesh`` only; its gradient is
    averaged over them as soon as backward has it. Under ``no_sync()`` neither happens, and gradients accumulate.

    Args:
        model: with sharded experts.
        data_mesh: the mesh dimension whose ranks have the same experts.
        options: of ``DistributedDataParallel``. Its ranks are all ranks of the job, unless ``process_group`` says
            otherwise.
    """
    layers = _sharded_layers("data_parallel", model)
    ignored = [f"{path}{name}" for path, layer in layers for name in _own_state(layer)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    wrapped = DistributedDataParallel(model, **options)
    group, size = data_mesh.get_group(), data_mesh.size()

    def average(weight: nn.Parameter) -> None:
        if wrapped.require_backward_grad_sync and size > 1:
            grad = weight.grad.to_local()
            dist.all_reduce(grad, group=group)
            grad.div_(size)  # gloo has no average

    for _, layer in layers:
        for weight in _experts(layer):
            dist.broadcast(weight.detach().to_local(), group=group, group_src=0)  # as DDP does for the others
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(average)
    return wrapped


def fully_shard_experts(model: nn.Module, world_mesh: DeviceMesh, data_mesh: DeviceMesh, **options) -> None:
    """FSDP2's ``fully_shard`` of every :class:`MoEFeedForward` whose experts :func:`shard_experts` has spread.

    The experts are sharded once more, over the ranks of ``data_mesh``; the rest of the layer over ``world_mesh``.

    Args:
        model: wrap what else is in it afterwards, with ``fully_shard(..., mesh=world_mesh)``.
        world_mesh: one dimension with all ranks.
        data_mesh: the mesh dimension whose ranks have the same experts.
        options: of ``fully_shard``.

    Raises:
        RuntimeError: a PyTorch whose ``fully_shard`` has one mesh for all parameters of a module.
    """
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
    except ImportError as error:
        raise RuntimeError(
            "fully_shard_experts: fully_shard must take a mesh for each parameter, which this PyTorch's does not; use "
            "data_parallel or a later PyTorch"
        ) from error
    over_data = ShardPlacementResult(Shard(0), FSDPMeshInfo(mesh=data_mesh, shard_mesh_dim=0))
    for _, layer in _sharded_layers("fully_shard_experts", model):
        experts = {id(weight) for weight in _experts(layer)}
        place = lambda weight, experts=experts: over_data if id(weight) in experts else None  # noqa: E731
        if data_mesh.size() == world_mesh.size():  # one rank has all experts: fully_shard wants one mesh for one group
            fully_shard(layer, mesh=data_mesh, **options)
        else:
            fully_shard(layer, mesh=world_mesh, shard_placement_fn=place, **options)


def _sharded_layers(op: str, model: nn.Module) -> list[tuple[str, MoEFeedForward]]:
    """(path with its dot, layer) of each layer whose experts are spread."""
    found = [
        (f"{path}." if path else "", module)
        for path, module in model.named_modules()
        if isinstance(module, MoEFeedForward) and isinstance(module.gate_up_proj, DTensor)
    ]
    if not found:
        raise value_error(op, "model", "one with sharded experts", type(model).__name__, "call shard_experts first")
    return found


def _experts(layer: MoEFeedForward) -> tuple[Tensor, Tensor]:
    return layer.gate_up_proj, layer.down_proj


def _own_state(layer: MoEFeedForward) -> list[str]:
    """What is not the same on all ranks: experts, and the counts of a rank's own tokens."""
    counts = [] if layer.expert_counts is None else ["expert_counts"]
    return ["gate_up_proj", "down_proj", *counts]
