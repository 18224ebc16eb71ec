"""LoRA adapters spread over ranks: :func:`expert_parallel_lora`."""

from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from moe_kernels._checks import value_error
from moe_kernels._dispatch import autocast, autocast_enabled
from moe_kernels.distributed.faults import announcing
from moe_kernels.distributed.sizes import Team
from moe_kernels.distributed.trip import Trip
from moe_kernels.ops.routed_lora import routed_lora

_OP = "expert_parallel_lora"


def expert_parallel_lora(
    x: Tensor,
    lora_a: DTensor,
    lora_b: DTensor,
    adapter_ids: Tensor,
    adapter_weights: Tensor | None = None,
    *,
    scaling: float = 1.0,
    base: Tensor | None = None,
    layer: str = _OP,
) -> Tensor:
    """:func:`moe_kernels.routed_lora` where each rank has tokens of its own and its share of the adapters.

    ``out[t] = base[t] + sum_k adapter_weights[t, k] * scaling * B_e (A_e x[t])`` with ``e = adapter_ids[t, k]``

    A token's row travels once to each rank that owns one of its adapters: see
    :class:`moe_kernels.distributed.trip.Trip`.

    Args:
        x: [num_tokens, in], as many on each rank as it likes.
        lora_a, lora_b: [num_adapters, rank, in] and [num_adapters, out, rank], ``Shard(0)`` over one mesh dimension
            that divides num_adapters.
        adapter_ids: [num_tokens, top_k], int32 or int64 over all ranks' adapters; outside [0, num_adapters) is none.
        adapter_weights: [num_tokens, top_k]; None weighs every pair 1.
        scaling: of every adapter.
        base: [num_tokens, out], dtype of ``x``; it stays where it is.
        layer: name for errors.

    Returns:
        [num_tokens, out], dtype of ``x``. Differentiable in ``x``, ``adapter_weights``, ``base`` and the factors, whose
        gradients are the sum over the tokens of all ranks. A rank's sum over its adapters is rounded before it travels,
        and the result of all ranks before the base is added.

    Raises:
        ValueError: factors that do not lie as above; on every rank, where the ranks differ.
    """
    mesh = lora_a.device_mesh
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if factor.placements != (Shard(0),) or factor.device_mesh != mesh or factor.shape[0] % mesh.size():
            expected = f"a DTensor with Shard(0) over the {mesh.size()} ranks of lora_a's one mesh dimension"
            actual = f"{list(factor.shape)} with {factor.placements} over {factor.device_mesh}"
            raise value_error(_OP, name, expected, actual, "the ranks must share the adapters equally")
    factors = (lora_a.to_local(), lora_b.to_local())
    if autocast_enabled(x.device.type):
        x, base, *factors = autocast(x.device.type, x, base, *factors)
    if adapter_weights is None:
        adapter_weights = torch.ones(adapter_ids.shape, dtype=torch.float32, device=x.device)
    run = partial(routed_lora, scaling=scaling)
    team = Team(mesh.get_group(), layer, lora_a.shape[0])
    with announcing(team.group, layer):
        trip = Trip(x, adapter_ids, adapter_weights, team)
        out = trip.run(lambda rows, ids, weights: run(rows, *factors, ids, weights)).finish()
    return out if base is None else base + out
