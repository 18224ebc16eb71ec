"""The experts module of a transformers model, spread: any class that ``use_experts_implementation`` decorates.

Nothing of transformers is imported: the decorator leaves attributes by which its classes are known.
"""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moe_kernels._checks import shape_error
from moe_kernels.distributed.chunks import run_in_chunks
from moe_kernels.distributed.shards import Placed, local_shard, place, sharded_names
from moe_kernels.distributed.trip import Trip


def is_experts_module(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "num_experts", "down_proj"))


def spread_experts_module(module: nn.Module, where: Placed, source: int | None) -> None:
    """Spreads the module's own parameters, all of them [num_experts, ...]; its class gets :func:`_forward`."""
    own = dict(module.named_parameters(recurse=False))
    for name, weight in own.items():
        if weight.dim() == 0 or weight.shape[0] != module.num_experts:
            expected = f"[num_experts={module.num_experts}, ...]"
            raise shape_error(f"ExpertParallel: {where.layer}", name, expected, weight)
    place(module, list(own), where, source)
    module.__class__ = type(f"Sharded{type(module).__name__}", (type(module),), {"forward": _forward})


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
    there = (self.num_experts, where.group, where.layer)
    if where.chunk_tokens is not None:
        return run_in_chunks(*batch, parameters, experts, where.chunk_tokens, *there)
    return Trip(*batch, *there).run(lambda *rows: experts(*rows, *parameters)).finish()


class _Local(nn.Module):
    """This rank's experts as a module of the original class, without hooks, whatever implementation it runs."""

    def __init__(self, module: nn.Module):
        super().__init__()
        experts = copy.copy(module)  # shares everything but what is set below
        sharded = next(cls for cls in type(module).__mro__ if cls.__dict__.get("forward") is _forward)
        experts.__class__ = sharded.__mro__[1]
        experts._parameters = dict(module._parameters)
        experts.num_experts = module.num_experts // module.expert_parallel.mesh.size()
        experts._is_expert_parallel = True  # transformers' own implementations then skip ids past the last expert
        self.experts = experts

    def forward(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids = ids.long().masked_fill(ids < 0, self.experts.num_experts)  # transformers' own count them one-hot
        return type(self.experts).forward(self.experts, rows, ids, weights)
