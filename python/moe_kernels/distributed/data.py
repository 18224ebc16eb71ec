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
from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from moe_kernels._checks import value_error
from moe_kernels.distributed.shards import placed_modules, sharded_names


def data_parallel(model: nn.Module, data_mesh: DeviceMesh, **options) -> DistributedDataParallel:
    """``DistributedDataParallel`` of a model whose experts are spread by :func:`shard_experts`.

    DDP averages over all ranks what they all have. An expert is on the ranks of ``data_mesh`` only; its gradient is
    averaged over them as soon as backward has it. Under ``no_sync()`` neither happens, and gradients accumulate.

    Args:
        model: with sharded experts.
        data_mesh: the mesh dimension whose ranks have the same experts.
        options: of ``DistributedDataParallel``. Its ranks are all ranks of the job, unless ``process_group`` says
            otherwise.

    Raises:
        ValueError: a model without sharded experts, or a ``data_mesh`` that is not across them.
    """
    placed = _placed("data_parallel", model)
    _check_mesh("data_parallel", placed, data_mesh, dist.get_world_size(options.get("process_group")))
    ignored = [name for path, module in placed for name in _own_state(path, module)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    wrapped = DistributedDataParallel(model, **options)
    group, size = data_mesh.get_group(), data_mesh.size()

    def average(weight: nn.Parameter) -> None:
        if wrapped.require_backward_grad_sync and size > 1:
            grad = weight.grad.to_local()
            dist.all_reduce(grad, group=group)
            grad.div_(size)  # gloo has no average

    for _, module in placed:
        for weight in map(module.get_parameter, sharded_names(module)):
            dist.broadcast(weight.detach().to_local(), group=group, group_src=0)  # as DDP does for the others
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(average)
    return wrapped


def fully_shard_experts(model: nn.Module, world_mesh: DeviceMesh, data_mesh: DeviceMesh, **options) -> None:
    """FSDP2's ``fully_shard`` of every module whose experts :func:`shard_experts` has spread.

    The experts are sharded once more, over the ranks of ``data_mesh``; the rest of the module over ``world_mesh``.

    Args:
        model: wrap what else is in it afterwards, with ``fully_shard(..., mesh=world_mesh)``.
        world_mesh: one dimension with all ranks.
        data_mesh: the mesh dimension whose ranks have the same experts.
        options: of ``fully_shard``.

    Raises:
        ValueError: a model without sharded experts, or a ``data_mesh`` that is not across them.
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
    placed = _placed("fully_shard_experts", model)
    _check_mesh("fully_shard_experts", placed, data_mesh, world_mesh.size())
    for _, module in placed:
        experts = {id(module.get_parameter(name)) for name in sharded_names(module)}
        place = lambda weight, experts=experts: over_data if id(weight) in experts else None  # noqa: E731
        if data_mesh.size() == world_mesh.size():  # one rank has all experts: fully_shard wants one mesh for one group
            fully_shard(module, mesh=data_mesh, **options)
        else:
            fully_shard(module, mesh=world_mesh, shard_placement_fn=place, **options)


def _placed(op: str, model: nn.Module) -> list[tuple[str, nn.Module]]:
    found = placed_modules(model)
    if not found:
        raise value_error(op, "model", "one with sharded experts", type(model).__name__, "call shard_experts first")
    return found


def _check_mesh(op: str, placed: list[tuple[str, nn.Module]], data_mesh: DeviceMesh, num_ranks: int) -> None:
    remedy = "cut both out of one mesh: mesh['data'], mesh['expert']"
    for path, module in placed:
        ranks, experts = data_mesh.mesh.tolist(), module.expert_parallel.everyone.mesh.tolist()
        # otherwise ranks would average experts that are not the same
        if data_mesh.ndim != 1 or {*ranks} & {*experts} != {dist.get_rank()} or len(ranks) * len(experts) != num_ranks:
            expected = f"the other dimension of the {num_ranks} ranks"
            actual = f"ranks {ranks} where {path or type(module).__name__} has its experts on ranks {experts}"
            raise value_error(op, "data_mesh", expected, actual, remedy)


def _own_state(path: str, module: nn.Module) -> list[str]:
    """What is not the same on all ranks: experts, and the counts of a rank's own tokens."""
    counts = ["expert_counts"] if getattr(module, "expert_counts", None) is not None else []
    quantised = [name for name, buffer in module.named_buffers() if isinstance(buffer, DTensor)]
    return [f"{path}.{name}" if path else name for name in (*sharded_names(module), *quantised, *counts)]
