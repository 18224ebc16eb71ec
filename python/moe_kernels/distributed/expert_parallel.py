"""Experts spread over the ranks of a mesh: :class:`ExpertParallel`, :func:`expert_parallel_ffn`."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh, ProcessGroup
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from moe_kernels._checks import FLOAT_DTYPES, shape_error, value_error
from moe_kernels._dispatch import autocast, autocast_enabled
from moe_kernels.activation import Activation
from moe_kernels.distributed.chunks import run_in_chunks
from moe_kernels.distributed.sizes import raise_disagreement, tell_failure
from moe_kernels.distributed.trip import Trip
from moe_kernels.nn import MoEFeedForward, QuantizedExperts
from moe_kernels.ops.expert_ffn import expert_ffn

_OP = "ExpertParallel"
_SILU = Activation()


def expert_parallel_ffn(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    group: ProcessGroup,
    layer: str = "expert_parallel_ffn",
    activation: Activation = _SILU,
    chunk_tokens: int | None = None,
) -> Tensor:
    """:func:`moe_kernels.expert_ffn` where each rank has tokens of its own and its share of the experts.

    A token's row travels once to each rank that owns one of its experts, and one row comes back from each; see
    :class:`moe_kernels.distributed.trip.Trip` for what is sent. On each rank :func:`expert_ffn` runs.

    Args:
        hidden_states: [num_tokens, hidden_size], as many on each rank as it likes, also none.
        topk_ids: [num_tokens, top_k], int32 or int64, in [0, num_experts) over all ranks; others are skipped.
        topk_weights: [num_tokens, top_k].
        gate_up_proj, down_proj: this rank's experts, [num_experts / world_size, ...], as many on each rank: rank r has
            the r-th block.
        group: the ranks; all of them must call, and run backward where a gradient is needed.
        layer: name for errors.
        activation: see :func:`expert_ffn`.
        chunk_tokens: how many tokens of each rank travel at a time; None for all. It bounds the memory, also that kept
            for backward, where all tokens go to one rank; see :mod:`moe_kernels.distributed.chunks` for its price.

    Returns:
        [num_tokens, hidden_size], dtype of ``hidden_states`` (autocast as in :func:`expert_ffn`; rows then travel in
        the autocast dtype).

        Differentiable as :func:`expert_ffn`. A rank's sum over its experts is rounded to the dtype of the rows before
        it travels, and the sums are added in rising order of ranks. So a token's output has the same bits whichever
        rank it starts on and whatever tokens stand beside it or elsewhere; it equals a single process to rounding, and
        to the bit where all experts of a token are on one rank. The gradient of the experts adds rows in order of
        ranks, then tokens: it is that of one process which has the ranks' tokens one after another, to the bit.

    Raises:
        ValueError: on every rank, where the ranks' layers or dtypes differ; it names layer and rank.
    """
    out, _ = _run(
        hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, activation, chunk_tokens, group, layer
    )
    return out


def _run(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    activation: Activation,
    chunk_tokens: int | None,
    group: ProcessGroup,
    layer: str,
    beside: Callable[[], Tensor | None] = lambda: None,
) -> tuple[Tensor, Tensor | None]:
    """The experts' sum, and what ``beside`` returns, which runs while rows travel."""
    device_type = hidden_states.device.type
    if autocast_enabled(device_type):
        hidden_states, gate_up_proj, down_proj = autocast(device_type, hidden_states, gate_up_proj, down_proj)
    batch, weights = (hidden_states, topk_ids, topk_weights), (gate_up_proj, down_proj)
    where = (gate_up_proj.shape[0] * group.size(), group, layer)
    experts = partial(expert_ffn, activation=activation)
    if chunk_tokens is not None:
        return run_in_chunks(*batch, weights, experts, chunk_tokens, *where), beside()
    trip = Trip(*batch, *where)
    found = beside()
    return trip.run(lambda *rows: experts(*rows, *weights)).finish(), found


class ExpertParallel(ParallelStyle):
    """Spreads the experts of a :class:`MoEFeedForward` over a mesh dimension, for ``parallelize_module``.

    ::

        mesh = init_device_mesh("cuda", (8,), mesh_dim_names=("expert",))
        parallelize_module(model, mesh, {"layers.*.mlp": ExpertParallel()})     # or shard_experts(model, mesh)

    ``gate_up_proj`` and ``down_proj`` become DTensors with ``Shard(0)``: a rank keeps a block of num_experts /
    world_size experts. The router, the shared expert and the buffers stay plain tensors, the same on all ranks. Forward
    takes the rank's own tokens; see :func:`expert_parallel_ffn`. The shared expert runs while they travel.

    Gradients: each rank's loss is that of its own tokens, as in data parallelism. An expert's gradient is the mean over
    the ranks of the mesh (each adds ``1 / world_size`` of its tokens' gradient), as DDP and FSDP average those of what
    is replicated, which are left to them: see :mod:`moe_kernels.distributed.data`.

    Args:
        layer: name for errors; by default the layer's class and sizes. :func:`shard_experts` gives its path in the
            model.
        chunk_tokens: see :func:`expert_parallel_ffn`.

    Raises:
        TypeError: a module that is no :class:`MoEFeedForward`.
        ValueError: quantised experts, experts that the ranks cannot share equally, a mesh of several dimensions, or
            layers that are not the same on all ranks (raised on every rank).
    """

    def __init__(self, layer: str = "", *, chunk_tokens: int | None = None):
        super().__init__()
        self.layer = layer
        self.chunk_tokens = chunk_tokens

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, MoEFeedForward):
            raise TypeError(f"{_OP}: module must be a MoEFeedForward, got {type(module).__name__}")
        layer = self.layer or f"{type(module).__name__}({module.extra_repr()})"
        _check(module, device_mesh, layer)
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(module, name)
            shard = distribute_tensor(weight.detach(), device_mesh, [Shard(0)], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(shard, requires_grad=weight.requires_grad))
        if self.src_data_rank is not None:
            _replicate(module, device_mesh.get_group(), self.src_data_rank)
        module.register_forward_pre_hook(partial(_check_input, device_mesh, layer), with_kwargs=True)
        module.run_experts = ShardedExperts(device_mesh, layer, self.chunk_tokens)
        return module


def shard_experts(model: nn.Module, mesh: DeviceMesh, *, chunk_tokens: int | None = None) -> nn.Module:
    """Applies :class:`ExpertParallel` to every :class:`MoEFeedForward` of a model, and names it by its path."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, MoEFeedForward)]
    if not found:
        raise value_error("shard_experts", "model", "one with MoEFeedForward layers", type(model).__name__)
    for name, module in found:
        ExpertParallel(name, chunk_tokens=chunk_tokens)._apply(module, mesh)
    return model


class ShardedExperts(NamedTuple):
    """``run_experts`` of a sharded layer: :func:`expert_parallel_ffn` over the DTensors' shards."""

    mesh: DeviceMesh
    layer: str
    chunk_tokens: int | None

    def __call__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        gate_up_proj: DTensor,
        down_proj: DTensor,
        *,
        activation: Activation,
        beside: Callable[[], Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        batch, weights = (hidden_states, topk_ids, topk_weights), [gate_up_proj.to_local(), down_proj.to_local()]
        for weight in weights:
            if weight.requires_grad and self.mesh.size() > 1:
                weight.register_hook(lambda grad: grad / self.mesh.size())
        group = self.mesh.get_group()
        return _run(*batch, *weights, activation, self.chunk_tokens, group, self.layer, beside)


def _check(module: MoEFeedForward, mesh: DeviceMesh, layer: str) -> None:
    if mesh.ndim != 1:
        remedy = "give the dimension of the experts, mesh['expert']"
        raise value_error(f"{_OP}: {layer}", "device_mesh", "of one dimension", f"{mesh.ndim}", remedy)
    if isinstance(module.gate_up_proj, QuantizedExperts) or isinstance(module.gate_up_proj, DTensor):
        found = type(
            module.gate_up_proj if isinstance(module.gate_up_proj, QuantizedExperts) else module.gate_up_proj.data
        )
        raise value_error(
            f"{_OP}: {layer}", "gate_up_proj", "a plain parameter", found.__name__, "shard it once, first"
        )
    # the ranks look at each other's layers before one of them may raise and leave the others waiting
    group, weights = mesh.get_group(), (module.gate_up_proj, module.down_proj)
    if any(weight.dtype not in FLOAT_DTYPES for weight in weights):
        raise value_error(f"{_OP}: {layer}", "dtype", f"one of {FLOAT_DTYPES}", weights[0].dtype)
    told = [number for weight in weights for number in (*weight.shape, FLOAT_DTYPES.index(weight.dtype))]
    mine = torch.tensor(told, device=mesh.device_type)
    heard = [torch.empty_like(mine) for _ in range(mesh.size())]
    dist.all_gather(heard, mine, group=group)
    heard = [rank.tolist() for rank in heard]
    for at, name in enumerate(("gate_up_proj", "down_proj")):
        layouts = [rank[4 * at : 4 * at + 4] for rank in heard]
        if any(layout != layouts[0] for layout in layouts):
            raise_disagreement(layer, name, [f"{shape} {FLOAT_DTYPES[dtype]}" for *shape, dtype in layouts])
    if module.num_experts % mesh.size():
        expected = f"a multiple of the {mesh.size()} ranks"
        remedy = "choose a mesh dimension that divides it, or add experts"
        raise value_error(f"{_OP}: {layer}", "num_experts", expected, module.num_experts, remedy)


def _check_input(mesh: DeviceMesh, layer: str, module: MoEFeedForward, args: tuple, options: dict) -> None:
    """Before the router runs, which is before the other ranks would learn of an error here."""
    hidden_states = args[0] if args else options["hidden_states"]
    if hidden_states.dim() == 0 or hidden_states.shape[-1] != module.hidden_size:
        tell_failure(hidden_states.device, mesh.size(), mesh.get_group())
        expected = f"[..., hidden_size={module.hidden_size}]"
        raise shape_error(f"{_OP}: {layer}", "hidden_states", expected, hidden_states)


@torch.no_grad()
def _replicate(module: MoEFeedForward, group: ProcessGroup, source: int) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor) and not tensor.is_meta:
            dist.broadcast(tensor, group=group, group_src=source)
