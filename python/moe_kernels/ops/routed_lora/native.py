"""Schemas, fakes and handles of the compiled LoRA ops (csrc/ops/routed_lora)."""

import torch
from torch import Tensor

torch.library.define(
    "moe_kernels::lora_shrink",
    "(Tensor x, Tensor factor, Tensor? rank_starts, Tensor? ranks, Tensor adapter_ids, SymInt max_rank) -> Tensor",
)
torch.library.define(
    "moe_kernels::lora_expand",
    "(Tensor v, Tensor factor, Tensor? rank_starts, Tensor? ranks, Tensor adapter_ids, Tensor? adapter_weights, "
    "Tensor? scaling, Tensor? base) -> Tensor",
)
torch.library.define(
    "moe_kernels::lora_factor_grad",
    "(Tensor v, Tensor x, Tensor? rank_starts, Tensor? ranks, Tensor adapter_ids, SymInt num_adapters, "
    "SymInt? num_rows) -> Tensor",
)
torch.library.define("moe_kernels::lora_dropout", "(Tensor x, float p, Tensor seed) -> Tensor")
# both halves in one op, on a GPU. v, the product with A, is of rank 0 where it is not saved
torch.library.define(
    "moe_kernels::routed_lora",
    "(Tensor x, Tensor lora_a, Tensor lora_b, Tensor? rank_starts, Tensor? ranks, Tensor adapter_ids, "
    "Tensor? adapter_weights, Tensor? scaling, Tensor? base, SymInt max_rank, bool save) -> (Tensor out, Tensor v)",
)

lora_dropout = torch.ops.moe_kernels.lora_dropout.default
lora_shrink = torch.ops.moe_kernels.lora_shrink.default
lora_expand = torch.ops.moe_kernels.lora_expand.default
lora_factor_grad = torch.ops.moe_kernels.lora_factor_grad.default


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of ``dtype`` are added, and that of the r-vectors between shrink and expand."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("moe_kernels::lora_dropout")
def _(x: Tensor, p: float, seed: Tensor):
    return x.new_empty(x.shape)


@torch.library.register_fake("moe_kernels::lora_shrink")
def _(x: Tensor, factor: Tensor, rank_starts: Tensor | None, ranks: Tensor | None, adapter_ids: Tensor, max_rank: int):
    return x.new_empty(*adapter_ids.shape, max_rank, dtype=accumulator(x.dtype))


@torch.library.register_fake("moe_kernels::lora_expand")
def _(
    v: Tensor,
    factor: Tensor,
    rank_starts: Tensor | None,
    ranks: Tensor | None,
    adapter_ids: Tensor,
    adapter_weights: Tensor | None,
    scaling: Tensor | None,
    base: Tensor | None,
):
    return factor.new_empty(v.shape[0], factor.shape[-1])


@torch.library.register_fake("moe_kernels::lora_factor_grad")
def _(
    v: Tensor,
    x: Tensor,
    rank_starts: Tensor | None,
    ranks: Tensor | None,
    adapter_ids: Tensor,
    num_adapters: int,
    num_rows: int | None,
):
    rows = (num_adapters, v.shape[2]) if num_rows is None else (num_rows,)
    return x.new_empty(*rows, x.shape[1])


@torch.library.register_fake("moe_kernels::routed_lora")
def _(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    rank_starts: Tensor | None,
    ranks: Tensor | None,
    adapter_ids: Tensor,
    adapter_weights: Tensor | None,
    scaling: Tensor | None,
    base: Tensor | None,
    max_rank: int,
    save: bool,
):
    v = x.new_empty(*adapter_ids.shape, max_rank if save else 0, dtype=accumulator(x.dtype))
    return x.new_empty(x.shape[0], lora_b.shape[-1]), v
