"""Public functions of routed LoRA: :func:`routed_lora` and its halves :func:`lora_shrink`, :func:`lora_expand`."""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from moe_kernels._checks import (
    FLOAT_DTYPES,
    ID_DTYPES,
    check_same_device,
    check_tensor,
    dtype_error,
    shape_error,
    value_error,
)
from moe_kernels._dispatch import Backend, autocast, autocast_enabled, resolve
from moe_kernels.ops.routed_lora import autograd, native, reference

RankActivation = Literal["identity", "relu", "silu", "gelu", "softmax"]
_RANK_ACTIVATIONS = ("identity", "relu", "silu", "gelu", "softmax")
# rank_starts -> the versions of the tables in which no two adapters share rows
_rows_apart = WeakTensorKeyDictionary()


def routed_lora(
    x: Tensor,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    adapter_ids: Tensor,
    adapter_weights: Tensor | None = None,
    *,
    scaling: Tensor | float | None = None,
    ranks: Tensor | None = None,
    rank_starts: Tensor | None = None,
    max_rank: int | None = None,
    base: Tensor | None = None,
    combine: Literal["output", "factor"] = "output",
    activation: RankActivation = "identity",
    diagonal: Tensor | None = None,
    row_scale: Tensor | None = None,
    base_gate: Tensor | None = None,
    sparse: tuple[Tensor, Tensor, Tensor] | None = None,
    reduce: bool = True,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Adds each token's low-rank adapters, weighted, to its base output.

    With ``e = adapter_ids[t, k]``, ``w = adapter_weights[t, k]``, ``s = scaling[e]`` and ``A, B`` its factors:

    * ``combine="output"``: ``out[t] = base[t] + sum_k w * s * B_e (diagonal_e * act(A_e x[t]))``;
    * ``combine="factor"``: ``out[t] = base[t] + (sum_k w * s * B_e) (sum_k w * A_e) x[t]``: every token multiplies with
      one mixed pair of factors, so that cross terms ``B_e A_f`` appear. All adapters of a token then have one rank;
    * ``row_scale`` g (DoRA's ``m / |W + s B A|``): ``out[t] = base[t] + sum_k w * ((g_e - 1) * base[t] + g_e *
      s B_e A_e x[t])``, which is ``g_e * (base + delta)`` for one adapter of weight 1; ``base`` then excludes the bias;
    * ``sparse`` (DSEE's S2, arXiv 2111.00160): ``out[t, rows[e, j]] += sum_k w * values[e, j] * x[t, columns[e, j]]``,
      a few entries of the weight beside the low-rank term, not scaled by s;
    * ``reduce=False``: the pairs' own rows ``s * B_e (…)``, unweighted, without a base, zero for -1.

    An id of -1 is no adapter. A token without adapters returns its base to the bit. Sums run in float32 (float64 for
    float64) and are rounded once; a token's result has the same bits whatever tokens stand beside it and however many
    threads run. The equations of the two mixtures: "output" is X-LoRA's (arXiv 2402.07148), LoRAMoE's, PHATGOOSE's;
    "factor" is Poly's (2202.13914).

    Args:
        x: [num_tokens, in], or [num_tokens, top_k, in] where each pair has its own row (not with "factor"). float32,
            bfloat16, float16 or float64.
        lora_a: stacked [num_adapters, rank, in], or packed [num_rows, in] with ``rank_starts``; dtype of ``x``. A list
            of factors, with a list of ``lora_b``, computes slices of one output (q, k, v).
        lora_b: stacked [num_adapters, out, rank], read in place where it lies in memory as [num_adapters, rank, out],
            turned once a call where it does not; or packed [num_rows, out], row j the j-th column of its matrix.
        adapter_ids: [num_tokens] or [num_tokens, top_k], int32 or int64, -1 or in [0, num_adapters).
        adapter_weights: [num_tokens, top_k] (or [num_tokens]), any float dtype; None weighs every pair 1.
        scaling: [num_adapters] or a number, ``alpha / rank`` as a rule; None scales by 1.
        ranks: [num_adapters] int32, how many rows of its factor an adapter uses; -1 marks a slot without adapter. None:
            all of them.
        rank_starts: [num_adapters] int32, the first packed row of each adapter; needs ``ranks``. Adapters may share
            rows where the factors need no gradients, and with ``backend="reference"``.
        max_rank: the most rows of any packed adapter; None reads it from ``ranks``, which waits for a GPU.
        base: [num_tokens, out], dtype of ``x``; None adds to zero.
        activation: what happens to the rank's vector between the factors ("relu" gives bottleneck adapters, "softmax"
            prefix tuning in the unified view of arXiv 2110.04366).
        diagonal: [num_adapters, rank] or packed [num_rows]: scales the rank's vector (KaSA, 2412.06071).
        row_scale: [num_adapters, out], dtype of ``x``.
        base_gate: [num_tokens]: multiplies the base first.
        sparse: rows and columns, int32 or int64 in [0, out) and [0, in), and values, dtype of ``x``, each
            [num_adapters, num_entries]; an entry named twice counts twice. Not with "factor", ``row_scale``, slices or
            ``reduce=False``. It is composed of PyTorch's indexing on every backend.
        dropout: probability in [0, 1) with which an element of ``x`` is zero for the adapters; the others are divided
            by ``1 - dropout``, as ``torch.nn.functional.dropout`` does, but in the sums' precision. The base is the
            caller's. A row of ``x`` has one mask for all its adapters and slices, a function of the seed and the
            element's place in ``x`` alone (Philox4x32-10, Salmon et al., SC 2011): every backend has the same, and
            backward makes it again from the seed instead of saving it. Not with ``sparse``.
        seed: needed with a dropout, another in each step and layer: an int in [-2**63, 2**63), or a tensor [] of int64
            on the device of ``x``, which a captured CUDA graph reads anew.
        backend: see :mod:`moe_kernels`.

    Returns:
        [num_tokens, out], or [num_tokens, top_k, out] with ``reduce=False``; dtype of ``x``. Under ``torch.autocast``
        x, the factors and the base are cast to the autocast dtype. Differentiable in ``x``, the factors,
        ``adapter_weights``, ``scaling``, ``base``, ``diagonal``, ``row_scale``, ``base_gate`` and the sparse values.
        The router's gradient is a product of vectors of the rank's length: nothing of shape [num_tokens, top_k, out] is
        made for it.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; the message names the argument.
        RuntimeError: an id names no adapter or an empty slot (on the CPU; a GPU adds nothing), or a backend is missing.
    """
    if not isinstance(lora_a, Tensor):
        if sparse is not None:
            raise value_error("routed_lora", "sparse", "None with slices", "tensors", "call each slice on its own")
        return _slices(
            x, lora_a, lora_b, adapter_ids, adapter_weights, base, reduce, row_scale, diagonal,
            scaling=scaling, ranks=ranks, rank_starts=rank_starts, max_rank=max_rank, combine=combine,
            activation=activation, base_gate=base_gate, dropout=dropout, seed=seed, backend=backend,
        )  # fmt: skip
    op = "routed_lora"
    check_tensor(op, "x", x)
    check_tensor(op, "lora_b", lora_b)
    if autocast_enabled(x.device.type):
        x, lora_a, lora_b, base = autocast(x.device.type, x, lora_a, lora_b, base)
        sparse = None if sparse is None else (*sparse[:2], sparse[2].to(x.dtype))
    adapter_ids, adapter_weights = _check_pairs(op, x, adapter_ids, adapter_weights)
    num_tokens, top_k = adapter_ids.shape
    num_adapters, max_rank = _check_factor(op, "lora_a", x, lora_a, ranks, rank_starts, max_rank)
    lora_b = _check_lora_b(op, lora_a, lora_b)
    scaling = _check_scaling(op, scaling, num_adapters, x)
    out_features = lora_b.shape[-1]
    if base is not None:
        check_tensor(op, "base", base)
        if base.shape != (num_tokens, out_features):
            raise shape_error(op, "base", f"[num_tokens={num_tokens}, out={out_features}]", base)
        if base.dtype != x.dtype:
            raise dtype_error(op, "base", x.dtype, base, "it must equal that of x")
    if activation not in _RANK_ACTIVATIONS:
        raise value_error(op, "activation", f"one of {', '.join(_RANK_ACTIVATIONS)}", repr(activation))
    _check_epilogue(
        op, combine, activation, diagonal, row_scale, base_gate, base, reduce, x, lora_a, num_adapters, lora_b
    )
    rows, columns, values = (None, None, None) if sparse is None else sparse
    if sparse is not None:
        _check_sparse(op, combine, row_scale, reduce, rows, columns, values, x, num_adapters, out_features)
    check_same_device(
        op, x=x, lora_a=lora_a, lora_b=lora_b, adapter_ids=adapter_ids, adapter_weights=adapter_weights, ranks=ranks,
        rank_starts=rank_starts, base=base, scaling=scaling, diagonal=diagonal, row_scale=row_scale, rows=rows,
        columns=columns, values=values,
    )  # fmt: skip
    if base_gate is not None:
        base = (base * base_gate[:, None]).to(x.dtype)
    seed = _check_dropout(op, dropout, seed, sparse, x)
    backend = resolve(op, backend, x.device.type)
    if backend == "reference":
        if seed is not None:
            x = reference.lora_dropout(x.flatten(0, -2), dropout, seed).reshape(x.shape) / (1 - dropout)
        pair_rows = x if x.dim() == 3 else x[:, None].expand(-1, top_k, -1)
        return reference.routed_lora(
            pair_rows, lora_a, lora_b, adapter_ids, adapter_weights, scaling,
            rank_starts=rank_starts, ranks=ranks, max_rank=max_rank, base=base, combine=combine, activation=activation,
            diagonal=diagonal, row_scale=row_scale, reduce=reduce, sparse=sparse,
        )  # fmt: skip
    table = (rank_starts, ranks)
    plain = combine == "output" and activation == "identity" and diagonal is None and row_scale is None and reduce
    if backend == "triton" and plain and x.dim() == 2 and sparse is None:
        if seed is not None:  # what the kept elements are divided by
            scaling = 1.0 if scaling is None else scaling.to(native.accumulator(x.dtype))
            scaling = _check_scaling(op, scaling / (1 - dropout), num_adapters, x)
        return _fused(
            backend, x, lora_a, lora_b, *table, adapter_ids, adapter_weights, scaling, base, max_rank, dropout, seed
        )
    ids_of_rows = adapter_ids if x.dim() == 2 else adapter_ids.reshape(-1, 1)
    v = _shrink(backend, x.flatten(0, -2), lora_a, *table, ids_of_rows, max_rank, dropout, seed)
    v = v.reshape(num_tokens, top_k, max_rank)
    if seed is not None:
        v = v / (1 - dropout)
    if sparse is not None:  # only now: lora_shrink has refused ids that name no adapter
        base = _add_sparse(x, adapter_ids, adapter_weights, rows, columns, values, base, out_features)
    if combine == "factor":
        mixed = v if adapter_weights is None else v * adapter_weights.to(v.dtype)[..., None]
        v = mixed.sum(1, keepdim=True).expand(-1, top_k, -1)
    if activation != "identity" or diagonal is not None:
        mask = reference.rank_mask(adapter_ids, ranks, max_rank)
        v = reference.activate(v, activation, mask)
        if diagonal is not None:
            v = v * reference.gather_rows(diagonal, rank_starts, adapter_ids, max_rank, mask).to(v.dtype)
    if reduce and row_scale is None:
        return _expand(backend, v, lora_b, *table, adapter_ids, adapter_weights, scaling, base)
    pairs = v.reshape(-1, 1, max_rank)
    pairs = _expand(backend, pairs, lora_b, *table, adapter_ids.reshape(-1, 1), None, scaling, None)
    pairs = pairs.reshape(num_tokens, top_k, out_features)
    if not reduce:
        return pairs
    gain = row_scale[adapter_ids.clamp_min(0).long()].to(v.dtype)
    delta = (gain - 1) * base[:, None] + gain * pairs
    if adapter_weights is not None:
        delta = delta * adapter_weights.to(v.dtype)[..., None]
    used = (adapter_ids >= 0)[..., None]
    out = (base + torch.where(used, delta, 0).sum(1)).to(x.dtype)
    return torch.where(used.any(1), out, base)


def lora_shrink(
    x: Tensor,
    lora_a: Tensor,
    adapter_ids: Tensor,
    *,
    ranks: Tensor | None = None,
    rank_starts: Tensor | None = None,
    max_rank: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The first half of :func:`routed_lora`: ``v[t, k, j] = <row j of A_e, x[t]>`` for ``e = adapter_ids[t, k]``.

    Args:
        x: [num_tokens, in].
        lora_a, adapter_ids, ranks, rank_starts, max_rank, backend: as in :func:`routed_lora`.

    Returns:
        [num_tokens, top_k, max_rank], float32 (float64 for float64), not rounded to the dtype of ``x``; zero past the
        adapter's rank and for -1. ``adapter_ids`` [num_tokens] counts as top_k = 1. Differentiable in ``x`` and
        ``lora_a``.
    """
    op = "lora_shrink"
    check_tensor(op, "x", x)
    check_tensor(op, "lora_a", lora_a)
    if autocast_enabled(x.device.type):
        x, lora_a = autocast(x.device.type, x, lora_a)
    if x.dim() != 2:
        raise shape_error(op, "x", "[num_tokens, in]", x)
    adapter_ids, _ = _check_pairs(op, x, adapter_ids, None)
    _, max_rank = _check_factor(op, "lora_a", x, lora_a, ranks, rank_starts, max_rank)
    check_same_device(op, x=x, lora_a=lora_a, adapter_ids=adapter_ids, ranks=ranks, rank_starts=rank_starts)
    backend = resolve(op, backend, x.device.type)
    if backend == "reference":
        return reference.lora_shrink(x, lora_a, rank_starts, ranks, adapter_ids, max_rank)
    return _shrink(backend, x, lora_a, rank_starts, ranks, adapter_ids, max_rank, 0.0, None)


def lora_expand(
    v: Tensor,
    lora_b: Tensor,
    adapter_ids: Tensor,
    adapter_weights: Tensor | None = None,
    *,
    scaling: Tensor | float | None = None,
    ranks: Tensor | None = None,
    rank_starts: Tensor | None = None,
    base: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The second half: ``out[t] = base[t] + sum_k adapter_weights[t, k] * scaling[e] * B_e v[t, k]``.

    Args:
        v: [num_tokens, top_k, max_rank] of :func:`lora_shrink`.
        lora_b, adapter_ids, adapter_weights, scaling, ranks, rank_starts, base, backend: as in :func:`routed_lora`.

    Returns:
        [num_tokens, out], dtype of ``lora_b`` (under ``torch.autocast`` the factor and the base are cast to its dtype,
        ``v`` is not). Differentiable in ``v``, ``lora_b``, ``adapter_weights``, ``scaling``
        and ``base``.
    """
    op = "lora_expand"
    check_tensor(op, "v", v)
    check_tensor(op, "lora_b", lora_b)
    if autocast_enabled(v.device.type):
        lora_b, base = autocast(v.device.type, lora_b, base)
    if lora_b.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, "lora_b", FLOAT_DTYPES, lora_b)
    if v.dim() != 3 or v.dtype != native.accumulator(lora_b.dtype):
        expected = f"[num_tokens, top_k, max_rank] of {native.accumulator(lora_b.dtype)}, as lora_shrink returns it"
        raise shape_error(op, "v", expected, v)
    adapter_ids, adapter_weights = _check_pairs(op, v[:, 0], adapter_ids, adapter_weights)
    factor = lora_b.transpose(1, 2) if lora_b.dim() == 3 else lora_b
    num_adapters, _ = _check_factor(op, "lora_b", None, factor, ranks, rank_starts, v.shape[2])
    if adapter_ids.shape[1] != v.shape[1] or (lora_b.dim() == 3 and lora_b.shape[2] != v.shape[2]):
        raise shape_error(op, "v", f"[num_tokens, top_k={adapter_ids.shape[1]}, rank of lora_b]", v)
    scaling = _check_scaling(op, scaling, num_adapters, v)
    if base is not None and (base.shape != (len(v), factor.shape[-1]) or base.dtype != lora_b.dtype):
        raise shape_error(op, "base", f"[num_tokens={len(v)}, out={factor.shape[-1]}] of {lora_b.dtype}", base)
    check_same_device(
        op, v=v, lora_b=lora_b, adapter_ids=adapter_ids, adapter_weights=adapter_weights, ranks=ranks, scaling=scaling,
        rank_starts=rank_starts, base=base,
    )  # fmt: skip
    backend = resolve(op, backend, v.device.type)
    if backend == "reference":
        return reference.lora_expand(v, factor, rank_starts, ranks, adapter_ids, adapter_weights, scaling, base)
    return _expand(backend, v, factor, rank_starts, ranks, adapter_ids, adapter_weights, scaling, base)


def _slices(x, lora_a, lora_b, adapter_ids, adapter_weights, base, reduce, row_scale, diagonal, **arguments) -> Tensor:
    """One call of :func:`routed_lora` a slice; the slices lie beside each other in base and output."""
    if isinstance(lora_b, Tensor) or len(lora_a) != len(lora_b) or not lora_a:
        raise value_error(
            "routed_lora", "lora_b", f"a list of {len(lora_a)} factors like lora_a", type(lora_b).__name__
        )
    widths = [b.shape[-1] if b.dim() == 2 else b.shape[1] for b in lora_b]
    if base is not None and base.shape[-1] != sum(widths):
        raise shape_error("routed_lora", "base", f"[num_tokens, sum of the slices' out={sum(widths)}]", base)
    bases = [None] * len(lora_a) if base is None else base.split(widths, -1)
    scales = [None] * len(lora_a) if row_scale is None else row_scale.split(widths, -1)
    diagonals = [None] * len(lora_a) if diagonal is None else diagonal
    out = [
        routed_lora(x, a, b, adapter_ids, adapter_weights, base=y, row_scale=g, diagonal=d, reduce=reduce, **arguments)
        for a, b, y, g, d in zip(lora_a, lora_b, bases, scales, diagonals, strict=True)
    ]
    return torch.cat(out, -1)


def _add_sparse(x, adapter_ids, adapter_weights, rows, columns, values, base, out_features: int) -> Tensor:
    """The base with each token's sparse entries added, rounded once; without adapters, its bits."""
    num_tokens, top_k = adapter_ids.shape
    ids, accumulator = adapter_ids.clamp_min(0).long(), native.accumulator(x.dtype)
    entries = x[:, None].expand(-1, top_k, -1) if x.dim() == 2 else x
    terms = entries.gather(2, columns.long()[ids]).to(accumulator) * values[ids]
    if adapter_weights is not None:
        terms = terms * adapter_weights.to(accumulator)[..., None]
    used = adapter_ids >= 0
    terms = torch.where(used[..., None], terms, 0)
    total = x.new_zeros(num_tokens, out_features, dtype=accumulator) if base is None else base.to(accumulator)
    # index_put sorts where it accumulates: one order of sums, on a GPU too
    token = torch.arange(num_tokens, device=x.device)[:, None, None].expand(terms.shape)
    total = total.index_put((token, rows.long()[ids]), terms, accumulate=True).to(x.dtype)
    return total if base is None else torch.where(used.any(1, keepdim=True), total, base)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _shrink(backend: str, x, factor, rank_starts, ranks, adapter_ids, max_rank: int, dropout: float, seed) -> Tensor:
    arguments = (factor, rank_starts, ranks, adapter_ids, max_rank)
    if _needs_grad(x, factor):
        _check_rows_apart("lora_shrink", rank_starts, ranks, factor)
        return autograd.LoraShrink.apply(x, *arguments, dropout, seed, backend)
    return autograd.kernels(backend).lora_shrink(autograd.dropped(backend, x, dropout, seed), *arguments)


def _expand(backend: str, v, factor, rank_starts, ranks, adapter_ids, adapter_weights, scaling, base) -> Tensor:
    arguments = (v, factor, rank_starts, ranks, adapter_ids, adapter_weights, scaling, base)
    if _needs_grad(v, factor, adapter_weights, scaling, base):
        _check_rows_apart("lora_expand", rank_starts, ranks, factor)
        return autograd.LoraExpand.apply(*arguments, backend)
    return autograd.kernels(backend).lora_expand(*arguments)


def _fused(
    backend: str, x, lora_a, lora_b, rank_starts, ranks, adapter_ids, adapter_weights, scaling, base, max_rank: int,
    dropout: float, seed,
) -> Tensor:  # fmt: skip
    arguments = (lora_a, lora_b, rank_starts, ranks, adapter_ids, adapter_weights, scaling, base, max_rank)
    if _needs_grad(x, lora_a, lora_b, adapter_weights, scaling, base):
        _check_rows_apart("routed_lora", rank_starts, ranks, lora_a, lora_b)
        return autograd.RoutedLora.apply(x, *arguments, dropout, seed, backend)
    return autograd.kernels(backend).routed_lora(autograd.dropped(backend, x, dropout, seed), *arguments, False)[0]


def _check_rows_apart(op: str, rank_starts: Tensor | None, ranks: Tensor | None, *factors: Tensor) -> None:
    """Raises where adapters share packed rows that need a gradient: each would write its own there.

    Asks a GPU once for each change of the tables, and neither a captured graph nor a compiled one.
    """
    if rank_starts is None or torch.compiler.is_compiling() or not any(factor.requires_grad for factor in factors):
        return
    versions = (rank_starts._version, ranks.data_ptr(), ranks._version)
    if _rows_apart.get(rank_starts) == versions or (ranks.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    table = zip(rank_starts.tolist(), ranks.tolist(), strict=True)
    used = sorted((start, start + rank, e) for e, (start, rank) in enumerate(table) if rank > 0)
    for (_, end, first), (start, _, second) in itertools.pairwise(used):
        if start < end:
            expected = "rows of its own for each adapter whose factors need gradients"
            actual = f"rows that adapters {first} and {second} share"
            raise value_error(op, "rank_starts", expected, actual, "use backend='reference' or do not train them")
    _rows_apart[rank_starts] = versions


def _check_pairs(op: str, x: Tensor, adapter_ids: Tensor, adapter_weights: Tensor | None):
    """adapter_ids and adapter_weights as [num_tokens, top_k]."""
    check_tensor(op, "adapter_ids", adapter_ids)
    if x.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, "x", FLOAT_DTYPES, x)
    if adapter_ids.dtype not in ID_DTYPES:
        raise dtype_error(op, "adapter_ids", ID_DTYPES, adapter_ids, "cast with .to(torch.int32)")
    if adapter_ids.dim() == 1:
        adapter_ids = adapter_ids[:, None]
        if adapter_weights is not None and adapter_weights.dim() == 1:
            adapter_weights = adapter_weights[:, None]
    if x.dim() not in (2, 3):
        raise shape_error(op, "x", "[num_tokens, in] or [num_tokens, top_k, in]", x)
    if adapter_ids.dim() != 2 or adapter_ids.shape[0] != x.shape[0]:
        raise shape_error(op, "adapter_ids", f"[num_tokens={x.shape[0]}] or [num_tokens, top_k]", adapter_ids)
    if x.dim() == 3 and x.shape[1] != adapter_ids.shape[1]:
        raise shape_error(op, "x", f"[num_tokens, top_k={adapter_ids.shape[1]}, in]", x)
    if adapter_weights is not None:
        check_tensor(op, "adapter_weights", adapter_weights)
        if adapter_weights.shape != adapter_ids.shape:
            raise shape_error(op, "adapter_weights", f"{list(adapter_ids.shape)} like adapter_ids", adapter_weights)
        if adapter_weights.dtype not in FLOAT_DTYPES:
            raise dtype_error(op, "adapter_weights", FLOAT_DTYPES, adapter_weights)
    return adapter_ids, adapter_weights


def _check_factor(
    op: str, argument: str, x: Tensor | None, factor: Tensor, ranks, rank_starts, max_rank: int | None
) -> tuple[int, int]:
    """num_adapters and max_rank of a factor whose rows are its directions."""
    if factor.dim() not in (2, 3) or (x is not None and factor.shape[-1] != x.shape[-1]):
        expected = "[num_adapters, rank, in] or packed [num_rows, in]"
        raise shape_error(op, argument, expected if x is None else f"{expected} with in={x.shape[-1]}", factor)
    if x is not None and factor.dtype != x.dtype:
        raise dtype_error(op, argument, x.dtype, factor, "it must equal that of x")
    for name, table in (("ranks", ranks), ("rank_starts", rank_starts)):
        if table is not None:
            check_tensor(op, name, table)
            if table.dtype != torch.int32:
                raise dtype_error(op, name, torch.int32, table, "cast with .to(torch.int32)")
            if table.dim() != 1:
                raise shape_error(op, name, "[num_adapters]", table)
    if factor.dim() == 3:
        if rank_starts is not None:
            raise value_error(
                op, "rank_starts", f"None for a stacked {argument}", "a tensor", f"pass a packed {argument}"
            )
        if ranks is not None and ranks.shape != factor.shape[:1]:
            raise shape_error(op, "ranks", f"[num_adapters={factor.shape[0]}]", ranks)
        return factor.shape[0], factor.shape[1]
    if rank_starts is None or ranks is None or ranks.shape != rank_starts.shape:
        raise value_error(op, "rank_starts and ranks", f"given for a packed {argument}, each [num_adapters]", "others")
    if max_rank is None:
        max_rank = max(0, int(ranks.max())) if ranks.numel() else 0
    return rank_starts.shape[0], max_rank


def _check_lora_b(op: str, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """lora_b with a row for each direction, like lora_a."""
    if lora_b.dtype != lora_a.dtype:
        raise dtype_error(op, "lora_b", lora_a.dtype, lora_b, "it must equal that of lora_a")
    if lora_a.dim() == 3:
        if lora_b.dim() != 3 or (lora_b.shape[0], lora_b.shape[2]) != tuple(lora_a.shape[:2]):
            expected = f"[num_adapters={lora_a.shape[0]}, out, rank={lora_a.shape[1]}]"
            raise shape_error(op, "lora_b", expected, lora_b)
        return lora_b.transpose(1, 2)
    if lora_b.dim() != 2 or lora_b.shape[0] != lora_a.shape[0]:
        raise shape_error(op, "lora_b", f"[num_rows={lora_a.shape[0]}, out]", lora_b)
    return lora_b


def _check_scaling(op: str, scaling: Tensor | float | None, num_adapters: int, like: Tensor) -> Tensor | None:
    if scaling is None or isinstance(scaling, int | float):
        dtype = native.accumulator(like.dtype)
        return None if scaling is None else like.new_full((num_adapters,), scaling, dtype=dtype)
    check_tensor(op, "scaling", scaling)
    if scaling.shape != (num_adapters,):
        raise shape_error(op, "scaling", f"[num_adapters={num_adapters}]", scaling)
    if scaling.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, "scaling", FLOAT_DTYPES, scaling)
    return scaling


def _check_epilogue(
    op, combine, activation, diagonal, row_scale, base_gate, base, reduce, x, lora_a, num_adapters, lora_b
) -> None:
    if combine not in ("output", "factor"):
        raise value_error(op, "combine", "'output' or 'factor'", repr(combine))
    plain = activation == "identity" and diagonal is None and row_scale is None and reduce and x.dim() == 2
    if combine == "factor" and not plain:
        expected = "'output' with an activation, diagonal, row_scale, rows a pair or reduce=False"
        raise value_error(op, "combine", expected, "'factor'")
    if not reduce and (base is not None or row_scale is not None):
        raise value_error(op, "reduce", "True with a base or row_scale", False, "add the base to the reduced rows")
    if (row_scale is not None or base_gate is not None) and base is None:
        raise value_error(op, "base", "given with row_scale or base_gate", None)
    if diagonal is not None and diagonal.shape != lora_a.shape[:-1]:
        raise shape_error(op, "diagonal", f"{list(lora_a.shape[:-1])}, one value for each row of lora_a", diagonal)
    if row_scale is not None and row_scale.shape != (num_adapters, lora_b.shape[-1]):
        raise shape_error(op, "row_scale", f"[num_adapters={num_adapters}, out={lora_b.shape[-1]}]", row_scale)
    if base_gate is not None and base_gate.shape != x.shape[:1]:
        raise shape_error(op, "base_gate", f"[num_tokens={x.shape[0]}]", base_gate)


def _check_dropout(op: str, dropout: float, seed: int | Tensor | None, sparse, x: Tensor) -> Tensor | None:
    """The seed as a tensor beside x; None without a dropout."""
    if not 0 <= dropout < 1:
        raise value_error(op, "dropout", "in [0, 1)", dropout)
    if dropout == 0:
        return None
    if sparse is not None:
        raise value_error(op, "dropout", "0 with sparse", dropout)
    if seed is None:
        raise value_error(op, "seed", "given with a dropout", None, "pass another in each step and layer")
    if not isinstance(seed, Tensor):
        if not -(2**63) <= seed < 2**63:
            raise value_error(op, "seed", "in [-2**63, 2**63)", seed)
        return torch.full((), seed, dtype=torch.int64, device=x.device)
    if seed.dim() != 0:
        raise shape_error(op, "seed", "[]", seed)
    if seed.dtype != torch.int64:
        raise dtype_error(op, "seed", torch.int64, seed)
    check_same_device(op, x=x, seed=seed)
    return seed


def _check_sparse(op, combine, row_scale, reduce, rows, columns, values, x, num_adapters, out_features) -> None:
    if combine == "factor" or row_scale is not None or not reduce:
        expected = "None with combine='factor', row_scale or reduce=False"
        raise value_error(op, "sparse", expected, "rows, columns and values")
    for name, tensor, limit in (("rows", rows, out_features), ("columns", columns, x.shape[-1])):
        check_tensor(op, f"sparse {name}", tensor)
        if tensor.dtype not in ID_DTYPES:
            raise dtype_error(op, f"sparse {name}", ID_DTYPES, tensor)
        if tensor.dim() != 2 or tensor.shape != (num_adapters, values.shape[-1]):
            expected = f"[num_adapters={num_adapters}, num_entries={values.shape[-1]}] like values"
            raise shape_error(op, f"sparse {name}", expected, tensor)
        # a GPU or a compiled graph is not asked: indexing itself refuses
        asked = tensor.device.type == "cpu" and tensor.numel() and not torch.compiler.is_compiling()
        if asked and not 0 <= int(tensor.min()) <= int(tensor.max()) < limit:
            raise value_error(op, f"sparse {name}", f"in [0, {limit})", f"{int(tensor.min())} to {int(tensor.max())}")
    if values.dtype != x.dtype:
        raise dtype_error(op, "sparse values", x.dtype, values, "it must equal that of x")
