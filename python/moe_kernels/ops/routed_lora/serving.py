"""Routed LoRA under the names that serving engines give it: :func:`sgmv`, :func:`bgmv`, :func:`prepare_routing`."""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels._checks import ID_DTYPES, check_tensor, dtype_error, shape_error
from moe_kernels._dispatch import Backend
from moe_kernels.ops.routed_lora.api import routed_lora


class LoRARouting(NamedTuple):
    """vLLM's metadata of a batch; slot -1 (no adapter) counts as an adapter of its own."""

    token_indices_sorted_by_lora_ids: Tensor  #: [num_tokens] int32, stable
    lora_ids: Tensor  #: [num_adapters + 1] int32: the ids that occur, rising, then -1
    num_tokens_per_lora: Tensor  #: [num_adapters + 1] int32, of each of lora_ids, then 0
    lora_token_start_loc: Tensor  #: [num_adapters + 2] int32, where each one's tokens start in the sorted order


def bgmv(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    indices: Tensor,
    scaling: Tensor | float | None = None,
    *,
    base: Tensor | None = None,
    ranks: Tensor | None = None,
    rank_starts: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Batched gather matrix-vector product: ``out[t] = base[t] + scaling[e] * B_e A_e x[t]``, ``e = indices[t]``.

    :func:`moe_kernels.routed_lora` with one adapter a token (Punica, arXiv 2310.18547); its arguments and errors.

    Args:
        indices: [num_tokens] int32 or int64, -1: no adapter.
    """
    check_tensor("bgmv", "indices", indices)
    if indices.dim() != 1:
        raise shape_error("bgmv", "indices", "[num_tokens]", indices)
    return routed_lora(
        x, lora_a, lora_b, indices, scaling=scaling, base=base, ranks=ranks, rank_starts=rank_starts, backend=backend
    )


def sgmv(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    seg_indptr: Tensor,
    weight_indices: Tensor,
    scaling: Tensor | float | None = None,
    *,
    base: Tensor | None = None,
    ranks: Tensor | None = None,
    rank_starts: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Segmented gather matrix-vector product: tokens of segment i use adapter ``weight_indices[i]``.

    ``out[t] = base[t] + scaling[e] * B_e A_e x[t]`` for ``seg_indptr[i] <= t < seg_indptr[i + 1]`` and ``e =
    weight_indices[i]``; tokens outside all segments have no adapter. Segments need not be sorted by adapter, several
    may share one. :func:`moe_kernels.routed_lora` otherwise.

    Args:
        seg_indptr: [num_segments + 1] int32 or int64, never falls.
        weight_indices: [num_segments], -1: no adapter.
    """
    for name, tensor in (("seg_indptr", seg_indptr), ("weight_indices", weight_indices)):
        check_tensor("sgmv", name, tensor)
        if tensor.dtype not in ID_DTYPES:
            raise dtype_error("sgmv", name, ID_DTYPES, tensor)
    if weight_indices.dim() != 1 or seg_indptr.shape != (weight_indices.shape[0] + 1,):
        raise shape_error("sgmv", "seg_indptr", "[num_segments + 1] for weight_indices [num_segments]", seg_indptr)
    # segment i + 1 of the padded list: before the first and behind the last there is none
    token = torch.arange(x.shape[0], dtype=seg_indptr.dtype, device=x.device)
    none = weight_indices.new_full((1,), -1)
    indices = torch.cat([none, weight_indices, none])[torch.bucketize(token, seg_indptr, right=True)]
    return bgmv(x, lora_a, lora_b, indices, scaling, base=base, ranks=ranks, rank_starts=rank_starts, backend=backend)


def prepare_routing(adapter_ids: Tensor, num_adapters: int) -> LoRARouting:
    """The metadata that vLLM's ``lora_shrink`` and ``lora_expand`` kernels take, of fixed sizes and without a sync.

    Args:
        adapter_ids: [num_tokens] int32 or int64, -1 or in [0, num_adapters).
    """
    check_tensor("prepare_routing", "adapter_ids", adapter_ids)
    if adapter_ids.dim() != 1:
        raise shape_error("prepare_routing", "adapter_ids", "[num_tokens]", adapter_ids)
    if adapter_ids.dtype not in ID_DTYPES:
        raise dtype_error("prepare_routing", "adapter_ids", ID_DTYPES, adapter_ids)
    ids = torch.arange(-1, num_adapters, dtype=adapter_ids.dtype, device=adapter_ids.device)
    counts = (adapter_ids[None] == ids[:, None]).sum(1)
    order = (counts == 0).int().argsort(stable=True)  # ids that occur first, each in its order
    counts = counts[order]
    return LoRARouting(
        adapter_ids.argsort(stable=True).int(),
        torch.where(counts > 0, ids[order], -1).int(),
        counts.int(),
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
    )
