"""A :class:`MoEFeedForward` whose experts are spread."""

from collections.abc import Callable

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from moe_kernels._checks import shape_error
from moe_kernels.activation import Activation
from moe_kernels.distributed.ffn import run_ffn
from moe_kernels.distributed.shards import Placed, local_shard, place
from moe_kernels.distributed.sizes import tell_failure
from moe_kernels.nn import MoEFeedForward


def spread_feed_forward(module: MoEFeedForward, where: Placed, source: int | None) -> None:
    if module.activation.gated:
        rows = _StridedShard(1, split_factor=2)  # a slice of the gate rows and the same of the up rows behind them
    else:
        rows = Shard(1)
    place(module, {"gate_up_proj": rows, "down_proj": Shard(2)}, where, source)
    module.run_experts = RunSharded(where)
    module.register_forward_pre_hook(_check_input, with_kwargs=True)


class RunSharded:
    """``run_experts`` of the layer."""

    def __init__(self, where: Placed):
        self.where = where

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
        where = self.where
        weights = [local_shard(weight, where) for weight in (gate_up_proj, down_proj)]
        how = (activation, where.chunk_tokens, where.team(gate_up_proj.shape[0]))
        return run_ffn(hidden_states, topk_ids, topk_weights, *weights, *how, beside=beside)


def _check_input(module: MoEFeedForward, args: tuple, options: dict) -> None:
    """Before the router runs, which is before the other ranks would learn of an error here."""
    hidden_states, where = args[0] if args else options["hidden_states"], module.expert_parallel
    if hidden_states.dim() == 0 or hidden_states.shape[-1] != module.hidden_size:
        tell_failure(hidden_states.device, where.mesh.size(), where.group)
        expected = f"[..., hidden_size={module.hidden_size}]"
        raise shape_error(f"ExpertParallel: {where.layer}", "hidden_states", expected, hidden_states)
