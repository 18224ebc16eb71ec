"""The experts module of a transformers model, spread: any class that ``use_experts_implementation`` decorates.

Nothing of transformers is imported: the decorator leaves attributes by which its classes are known.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.func import functional_call

from moe_kernels._checks import shape_error, value_error
from moe_kernels.distributed.chunks import run_in_chunks
from moe_kernels.distributed.faults import announcing
from moe_kernels.distributed.quantized import local_quantized
from moe_kernels.distributed.shards import Placed, local_shard, place, sharded_names
from moe_kernels.distributed.trip import Trip
from moe_kernels.nn import QuantizedExperts


def is_experts_module(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "num_experts", "down_proj"))


def spread_experts_module(module: nn.Module, where: Placed, source: int | None) -> None:
    """Spreads the module's own parameters, all of them [num_experts, ...]; its class gets :func:`_forward`."""
    place(module, partial(_find_slices, module, where), where, source)
    module.__class__ = type(f"Sharded{type(module).__name__}", (type(module),), {"forward": _forward})


def _find_slices(module: nn.Module, where: Placed) -> dict[str, Placement]:
    own = dict(module.named_parameters(recurse=False))
    own |= {name: child for name, child in module.named_children() if isinstance(child, QuantizedExperts)}
    for name, weight in own.items():
        if len(weight.shape) == 0 or weight.shape[0] != module.num_experts:
            expected = f"[num_experts={module.num_experts}, ...]"
            raise shape_error(f"ExpertParallel: {where.layer}", name, expected, weight)
    if where.tensor_ranks > 1:
        _check_slices(module, where)
    cuts = _slices(module)
    return {name: cuts.get(name, Replicate()) for name in own}


def _slices(module: nn.Module) -> dict[str, Placement]:
    """How the ranks that share an expert cut its parameters. What is not named here is added behind the cut sums."""
    up, (rows, columns) = "gate_up_proj" if module.has_gate else "up_proj", (2, 1) if module.is_transposed else (1, 2)

    def halves(dim: int) -> Placement:  # gate rows and up rows one after another are cut alike; alternating ones are
        return _StridedShard(dim, split_factor=2) if module.has_gate and module.is_concatenated else Shard(dim)

    return {up: halves(rows), f"{up}_bias": halves(1), "down_proj": Shard(columns)}


def _check_slices(module: nn.Module, where: Placed) -> None:
    """Raises where a slice of the intermediate dimension by itself would be something else than a part of the whole."""
    op = f"ExpertParallel: {where.layer}"
    if getattr(module, "has_post_expert_norm", False):
        expected, remedy = "None where a norm follows each expert", "a norm needs the whole sum; spread whole experts"
        raise value_error(op, "tensor_dim", expected, where.mesh.mesh_dim_names[1], remedy)
    unknown = [
        name for name, _ in module.named_parameters(recurse=False) if name not in {*_slices(module), "down_proj_bias"}
    ]
    if unknown:
        remedy = "it is not known how to cut it; spread whole experts"
        raise value_error(op, "tensor_dim", "None for this class", f"a parameter {unknown[0]}", remedy)
    up, gate = (module.gate_up_proj, module._apply_gate) if module.has_gate else (module.up_proj, module.act_fn)
    if isinstance(up, QuantizedExperts) or up.is_meta:  # the first is refused, of the second nothing is known
        return
    h = torch.linspace(-3, 3, up.shape[2 if module.is_transposed else 1], dtype=up.dtype, device=up.device)[None]
    halves = 2 if module.has_gate and module.is_concatenated else 1
    parts = [part.flatten(1) for part in h.unflatten(1, (halves, -1)).chunk(where.tensor_ranks, 2)]
    with torch.no_grad():
        if not torch.allclose(torch.cat([gate(part) for part in parts], 1), gate(h)):
            remedy = "spread whole experts"
            raise value_error(op, "tensor_dim", "None for this class", "a gate that sees more than its element", remedy)


@torch.compiler.disable  # sizes that only the host knows break the graph anyway
def _forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [num_tokens, hidden_size] of this rank, top_k_index, top_k_weights [num_tokens, top_k]."""
    where: Placed = self.expert_parallel
    mine = _Local(self)
    own = set(sharded_names(self))
    weights = {
        f"experts.{name}": local_shard(weight, where) if name in own else weight
        for name, weight in self.named_parameters()
    }

    def experts(rows: Tensor, ids: Tensor, row_weights: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(mine, dict(zip(weights, parameters, strict=True)), (rows, ids, row_weights))

    batch, parameters = (hidden_states, top_k_index, top_k_weights), tuple(weights.values())
    team = where.team(self.num_experts)
    with announcing(team.group, team.layer):
        if where.chunk_tokens is not None:
            return run_in_chunks(*batch, parameters, experts, where.chunk_tokens, team)
        return Trip(*batch, team).run(lambda *rows: experts(*rows, *parameters)).finish()


class _Local(nn.Module):
    """This rank's experts as a module of the original class, without hooks, whatever implementation it runs."""

    def __init__(self, module: nn.Module):
        super().__init__()
        experts = copy.copy(module)  # shares everything but what is set below
        sharded = next(cls for cls in type(module).__mro__ if cls.__dict__.get("forward") is _forward)
        experts.__class__ = sharded.__mro__[1]
        experts._parameters = dict(module._parameters)
        experts._modules = {
            name: QuantizedExperts(local_quantized(child())) if isinstance(child, QuantizedExperts) else child
            for name, child in module._modules.items()
        }
        experts.num_experts = module.num_experts // module.expert_parallel.mesh.size(0)
        experts._is_expert_parallel = True  # transformers' own implementations then skip ids past the last expert
        self.experts = experts

    def forward(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids = ids.long().masked_fill(ids < 0, self.experts.num_experts)  # transformers' own count them one-hot
        return type(self.experts).forward(self.experts, rows, ids, weights)
