"""Routed LoRA in plain PyTorch: the specification.

Factors are rows: ``lora_a`` [..., in], ``lora_b`` [..., out], stacked [num_adapters, rank, …] or packed [num_rows, …].
"""

import torch
from torch import Tensor

from moe_kernels.ops.route.reference import philox


def check_ids(op: str, adapter_ids: Tensor, num_adapters: int, ranks: Tensor | None) -> None:
    """Raises where an id names no adapter; the kernels say the same."""
    outside = adapter_ids[(adapter_ids < -1) | (adapter_ids >= num_adapters)]
    if outside.numel():
        raise RuntimeError(
            f"{op}: adapter_ids must be -1 or in [0, num_adapters={num_adapters}), got {outside[0].item()}"
        )
    if ranks is not None and num_adapters:
        used = adapter_ids[adapter_ids >= 0].long()
        empty = used[ranks[used] < 0]
        if empty.numel():
            raise RuntimeError(
                f"{op}: adapter_ids must name loaded adapters, got {empty[0].item()}, whose slot is empty"
            )


def rank_mask(adapter_ids: Tensor, ranks: Tensor | None, max_rank: int) -> Tensor:
    """[num_tokens, top_k, max_rank]: whether the pair's adapter has a row j."""
    if ranks is None:
        mask = (adapter_ids >= 0)[..., None].expand(*adapter_ids.shape, max_rank)
    else:
        rank = torch.where(adapter_ids >= 0, ranks[adapter_ids.clamp_min(0).long()], 0)
        mask = torch.arange(max_rank, device=adapter_ids.device) < rank[..., None]
    return mask


def gather_rows(factor: Tensor, rank_starts: Tensor | None, adapter_ids: Tensor, max_rank: int, mask: Tensor) -> Tensor:
    """[num_tokens, top_k, max_rank, …]: the rows of each pair's adapter, zero where the mask is False."""
    ids = adapter_ids.clamp_min(0).long()
    if rank_starts is None:
        rows = factor[ids]
    else:
        index = rank_starts[ids].long()[..., None] + torch.arange(max_rank, device=factor.device)
        rows = factor[torch.where(mask, index, 0)]
    return torch.where(mask.reshape(*mask.shape, *[1] * (rows.dim() - mask.dim())), rows, 0)


def lora_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x, or zero where word i % 4 of Philox4x32-10 at (i // 4, t), of 64 bits each, is less than p * 2**32."""
    num_tokens, length = x.shape
    block = torch.arange(-(-length // 4), device=x.device).expand(num_tokens, -1)
    token = torch.arange(num_tokens, device=x.device)[:, None].expand_as(block)
    low = 0xFFFFFFFF
    counter = (block & low, block >> 32, token & low, token >> 32)
    words = torch.stack(philox(counter, seed & low, seed >> 32 & low), 2).flatten(1)
    return torch.where(words[:, :length] < int(p * 2**32), 0, x)


def lora_shrink(
    x: Tensor, factor: Tensor, rank_starts: Tensor | None, ranks: Tensor | None, adapter_ids: Tensor, max_rank: int
) -> Tensor:
    check_ids("lora_shrink", adapter_ids, len(factor) if rank_starts is None else len(rank_starts), ranks)
    if 0 in factor.shape[:-1]:
        return torch.zeros(*adapter_ids.shape, max_rank, dtype=_accumulator(x.dtype), device=x.device)
    mask = rank_mask(adapter_ids, ranks, max_rank)
    rows = gather_rows(factor, rank_starts, adapter_ids, max_rank, mask)
    return torch.einsum("ti,tkri->tkr", x, rows).to(_accumulator(x.dtype))


def lora_expand(
    v: Tensor,
    factor: Tensor,
    rank_starts: Tensor | None,
    ranks: Tensor | None,
    adapter_ids: Tensor,
    adapter_weights: Tensor | None,
    scaling: Tensor | None,
    base: Tensor | None,
) -> Tensor:
    check_ids("lora_expand", adapter_ids, len(factor) if rank_starts is None else len(rank_starts), ranks)
    if 0 in factor.shape[:-1]:
        return v.new_zeros(len(v), factor.shape[-1], dtype=factor.dtype) if base is None else base.clone()
    mask = rank_mask(adapter_ids, ranks, v.shape[2])
    rows = gather_rows(factor, rank_starts, adapter_ids, v.shape[2], mask)
    if adapter_weights is not None:
        v = v * adapter_weights[..., None]
    if scaling is not None:
        v = v * scaling[adapter_ids.clamp_min(0).long()][..., None]
    out = torch.einsum("tkr,tkro->to", torch.where(mask, v, 0).to(factor.dtype), rows)
    if base is None:
        return out
    return torch.where((adapter_ids >= 0).any(1, keepdim=True), base + out, base)


def activate(v: Tensor, activation: str, mask: Tensor | None) -> Tensor:
    """The activation between shrink and expand; softmax runs over the adapter's own rank."""
    if activation == "softmax":
        return torch.where(mask, v, torch.finfo(v.dtype).min).softmax(-1)
    return v if activation == "identity" else getattr(torch.nn.functional, activation)(v)


def routed_lora(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_ids: Tensor,
    adapter_weights: Tensor | None,
    scaling: Tensor | None,
    *,
    rank_starts: Tensor | None,
    ranks: Tensor | None,
    max_rank: int,
    base: Tensor | None,
    combine: str,
    activation: str,
    diagonal: Tensor | None,
    row_scale: Tensor | None,
    reduce: bool,
    sparse: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The equations of :func:`moe_kernels.routed_lora`, every pair's factors written out; ``x`` has a row a pair."""
    num_adapters = len(lora_a) if rank_starts is None else len(rank_starts)
    check_ids("routed_lora", adapter_ids, num_adapters, ranks)
    num_tokens, top_k = adapter_ids.shape
    if num_adapters == 0 or (max_rank == 0 and sparse is None):
        delta = x.new_zeros(num_tokens, top_k, lora_b.shape[-1])
        used = torch.zeros_like(adapter_ids, dtype=torch.bool)
    else:
        ids = adapter_ids.clamp_min(0).long()
        used = adapter_ids >= 0
        mask = rank_mask(adapter_ids, ranks, max_rank)
        a = gather_rows(lora_a, rank_starts, adapter_ids, max_rank, mask)
        b = gather_rows(lora_b, rank_starts, adapter_ids, max_rank, mask)
        ones = torch.ones(num_tokens, top_k, dtype=_accumulator(x.dtype), device=x.device)
        weights = (ones if adapter_weights is None else ones * adapter_weights).to(x.dtype)[..., None, None]
        scales = (ones if scaling is None else ones * scaling[ids]).to(x.dtype)[..., None, None]
        if combine == "factor":
            mixed_a, mixed_b = (weights * a).sum(1), (weights * scales * b).sum(1)
            out = torch.einsum("ti,tri,tro->to", x[:, 0], mixed_a, mixed_b)
            return out if base is None else torch.where(used.any(1, keepdim=True), base + out, base)
        v = activate(torch.einsum("tki,tkri->tkr", x, a), activation, mask)
        if diagonal is not None:
            v = v * gather_rows(diagonal, rank_starts, adapter_ids, max_rank, mask)
        delta = torch.einsum("tkr,tkro->tko", torch.where(mask, v, 0), b * scales)
        if sparse is not None:  # as a matrix for each adapter
            rows, columns, values = sparse
            adapter = torch.arange(num_adapters, device=x.device)[:, None].expand(rows.shape)
            matrices = values.new_zeros(num_adapters, delta.shape[2], x.shape[2])
            matrices = matrices.index_put((adapter, rows.long(), columns.long()), values, accumulate=True)
            delta = delta + torch.einsum("tki,tkoi->tko", x, matrices[ids])
        if not reduce:
            return delta
        if row_scale is not None:
            delta = (row_scale[ids] - 1) * base[:, None] + row_scale[ids] * delta
        delta = torch.where(used[..., None], delta * weights[..., 0], 0)
    if not reduce:
        return delta
    out = delta.sum(1)
    return out if base is None else torch.where(used.any(1, keepdim=True), base + out, base)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
