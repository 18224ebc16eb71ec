"""A :class:`MoEFeedForward` whose experts are spread."""

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from moe_kernels._checks import shape_error
from moe_kernels.activation import Activation
from moe_kernels.distributed.faults import announce
from moe_kernels.distributed.ffn import run_ffn
from moe_kernels.distributed.shards import Placed, local_factor, local_shard, place
from moe_kernels.distributed.sizes import tell_failure
from moe_kernels.nn import MoEFeedForward
from moe_kernels.nn.expert_lora import ExpertLoRA
from moe_kernels.nn.feed_forward import recomputes
from moe_kernels.ops.quantize import QuantizedWeights


def spread_feed_forward(module: MoEFeedForward, where: Placed, source: int | None) -> None:
    place(module, partial(_slices, module), where, source)
    module.run_experts = RunSharded(where, getattr(module, "expert_lora", None))
    module.register_forward_pre_hook(_before, with_kwargs=True)
    module.register_forward_hook(_after, always_call=True)


def _slices(module: MoEFeedForward) -> dict[str, Placement]:
    """How ranks that share an expert cut its intermediate dimension out of every parameter; what has none is whole."""

    def rows(dim: int) -> Placement:  # a slice of the gate rows, and the same of the up rows behind them
        return _StridedShard(dim, split_factor=2) if module.activation.gated else Shard(dim)

    slices = {"gate_up_proj": rows(1), "down_proj": Shard(2)}
    if hasattr(module, "expert_lora"):
        of_adapters = {
            "gate_up_a": Replicate(),
            "gate_up_b_rows": rows(2),
            "down_a": Shard(2),
            "down_b_rows": Replicate(),
        }
        slices |= {f"expert_lora.{name}": cut for name, cut in of_adapters.items()}
    return slices


class RunSharded:
    """``run_experts`` of the layer.

    Attributes:
        reached: whether this forward has come to it: the other ranks wait for rows, and before for their sizes.
    """

    def __init__(self, where: Placed, lora: ExpertLoRA | None):
        self.where = where
        self.lora = lora
        self.reached = False

    def __call__(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        gate_up_proj: DTensor | QuantizedWeights,
        down_proj: DTensor | QuantizedWeights,
        *,
        activation: Activation,
        beside: Callable[[], Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        where, self.reached = self.where, True
        weights = [local_shard(weight, where) for weight in (gate_up_proj, down_proj)]
        if self.lora is not None:
            weights += [local_factor(factor, where) for factor in self.lora.factors()]
        how = (activation, where.chunk_tokens, where.team(gate_up_proj.shape[0]))
        options = {"scaling": None if self.lora is None else self.lora.scaling, "beside": beside}
        return run_ffn(hidden_states, topk_ids, topk_weights, weights, *how, **options)


def _before(module: MoEFeedForward, args: tuple, options: dict) -> None:
    module.run_experts.reached = False
    hidden_states = args[0] if args else options["hidden_states"]
    if hidden_states.dim() == 0 or hidden_states.shape[-1] != module.hidden_size:
        op, expected = f"ExpertParallel: {module.expert_parallel.layer}", f"[..., hidden_size={module.hidden_size}]"
        raise shape_error(op, "hidden_states", expected, hidden_states)


def _after(module: MoEFeedForward, args: tuple, out: Tensor | None) -> None:
    """Tells the other ranks of an error of this one in the layer, be it the router's, a hook's or the experts'."""
    error, where = sys.exc_info()[1], module.expert_parallel
    if out is not None or error is None or recomputes():  # see announcing
        return
    if module.run_experts.reached:
        announce(error, where.group, where.layer)
    else:
        tell_failure(error, torch.device(where.mesh.device_type), where.group, where.layer)
