"""Fusing the logits of several models, or of one model on several inputs: :func:`fuse_logits`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels._checks import (
    FLOAT_DTYPES,
    check_same_device,
    check_tensor,
    dtype_error,
    shape_error,
    value_error,
)
from moe_kernels._dispatch import Backend, resolve
from moe_kernels.ops.logit_fusion import autograd, native, reference
from moe_kernels.ops.logit_fusion.token_filter import TokenFilter

#: position in these tuples is the code that the kernels take (csrc/ops/logit_fusion)
NEG_INF = ("mask", "floor", "zero")
OUTS = ("logits", "log_probs", "probs", "argmax", "sample")
MODES = ("linear", "mixture")
#: vocabularies padded for the hardware differ by less; more is another tokenizer until told otherwise
MAX_VOCAB_GAP = 256


def fuse_logits(
    sources: Sequence[Tensor] | Tensor,
    weights: Sequence[float] | Tensor,
    *,
    mode: str = "linear",
    rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    anchor: int = 0,
    mask: TokenFilter | None = None,
    floor: TokenFilter | None = None,
    neg_inf: str = "mask",
    keep: TokenFilter | None = None,
    vocab: int | None = None,
    out: str = "log_probs",
    request_ids: Tensor | None = None,
    seed: int | None = None,
    step: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """Fuses rows of logits into one distribution, and reads each logit once.

    With l_k the logits of source k, p_k their softmax and T the temperature::

        linear:   z = sum_k w_k l_k / T
        mixture:  z = log(sum_k w_k p_k) / T
        z = -inf                                       outside what ``mask`` keeps of the anchor's logits
        z = -inf                                       outside what ``keep`` keeps of z
        out = z | log_softmax(z) | softmax(z) | argmax(z) | one token drawn from softmax(z)

    A linear fusion needs no log-softmax of its sources: the constants cancel in the last one. Emulated fine-tuning,
    proxy tuning, DExperts, contrastive decoding, guidance, STEER and MOD are all this with different weights.

    What is not a number has one meaning:

    - a source of weight zero is not read (nor is its weight differentiated); one-hot rows of weights choose a source;
    - a source of positive weight at -inf, and the anchor at -inf, mask the token;
    - a source of negative weight at -inf: ``neg_inf="mask"`` masks the token, ``"floor"`` raises it to the source's
      smallest finite logit, ``"zero"`` leaves the anchor alone there, z = sum_k w_k l_anchor / T;
    - a row that reads NaN or +inf, whose fused logit overflows to +inf, or whose weights or temperature are not finite,
      or negative (temperature, weights of a mixture), is broken: NaN, and -1 for a token. With a ``mask``, linear
      fusion reads the other sources inside it only;
    - a row without any token has -inf, probabilities 0 and the token -1. A token of probability zero is never drawn.

    Sums run in float32 over blocks of 512 tokens and in float64 over the blocks, in one order: a row has the same bits
    whatever rows stand beside it.

    Args:
        sources: K tensors [num_rows, vocab_k], float32, bfloat16 and float16 in any mix, or all float64; rows may have
            any stride, other layouts than contiguous rows are copied. Or one tensor [n, vocab] with ``rows``.
        weights: K numbers, or a tensor [K] or [num_rows, K], float32 or float64.
        mode: "linear" or "mixture".
        rows: [num_rows, K] int64: which row of the one tensor is source k of a row (guidance within one batch). Where a
            gradient is needed the rows are copied.
        temperature: a number or a tensor [num_rows]; 0 makes "sample" take the largest; what is no token has no limit
            there: a number is refused, a row of a tensor broken. So is a number that is no normal one in the dtype of
            the weights, infinity for one.
        anchor: the source whose logits ``mask`` filters.
        mask: contrastive decoding's plausibility is ``TokenFilter(min_p=0.1)``, DExperts' nucleus
            ``TokenFilter(top_p=0.9)``.
        floor: raises the logits of each source of negative weight, the anchor excepted, to the smallest that this
            filter keeps (CGE).
        neg_inf: "mask", "floor" or "zero".
        keep: top-k, top-p and min-p of the result.
        vocab: how many tokens take part, the first ones; the smallest vocab_k by default, which must then not be more
            than 256 below the largest: vocabularies of one tokenizer are padded to different lengths.
        out: "logits", "log_probs", "probs", "argmax" or "sample".
        request_ids: [num_rows] int64, for "sample": a draw is a function of seed, request and step alone, never of the
            place in the batch.
        seed, step: in [0, 2**32), for "sample"; a generation counts its steps.
        backend: see :mod:`moe_kernels`.

    Returns:
        [num_rows, vocab] float32 (float64 for float64 sources), or [num_rows] int64 for "argmax" and "sample". The
        first three are differentiable in sources, weights and temperature; masks and floors are constants.

    Sources: arXiv 2310.12962 (emulated fine-tuning), 2401.08565 (proxy tuning), 2210.15097 (contrastive decoding),
    2306.17806 (guidance), 2410.14765 (CGE), 2406.18853 (MOD); the generator is Philox4x32-10, Salmon et al., SC 2011.
    """
    sources = [sources] if isinstance(sources, Tensor) else list(sources)
    num_rows, num_sources = _check_sources("fuse_logits", sources, rows)
    weights = check_weights("fuse_logits", weights, num_rows, num_sources, sources[0])
    named = {f"sources[{k}]": source for k, source in enumerate(sources)}
    vocab_size = check_vocab("fuse_logits", vocab, named)
    for name, value, choices in (("mode", mode, MODES), ("neg_inf", neg_inf, NEG_INF), ("out", out, OUTS)):
        if value not in choices:
            raise value_error("fuse_logits", name, f"one of {', '.join(choices)}", repr(value))
    if not 0 <= anchor < num_sources:
        raise value_error("fuse_logits", "anchor", f"in [0, num_sources={num_sources})", anchor)
    if isinstance(temperature, Tensor):
        if temperature.shape != (num_rows,):
            raise shape_error("fuse_logits", "temperature", f"[num_rows={num_rows}]", temperature)
        if not temperature.is_floating_point():
            raise dtype_error("fuse_logits", "temperature", FLOAT_DTYPES, temperature)
    else:
        if not temperature >= 0 or (temperature == 0 and out not in ("argmax", "sample")):
            expected = "above 0" + (" or 0" if out in ("argmax", "sample") else "; out='argmax' is the limit at 0")
            raise value_error("fuse_logits", "temperature", expected, temperature)
        info = torch.finfo(weights.dtype)
        if temperature != 0 and not info.tiny <= temperature <= info.max:
            expected = f"between {info.tiny:.3g} and {info.max:.3g}, the numbers of {weights.dtype}"
            raise value_error("fuse_logits", "temperature", expected, temperature)
        temperature = weights.new_full((num_rows,), float(temperature))
    if out == "sample":
        check_draw("fuse_logits", request_ids, num_rows, seed, step)
    else:
        request_ids, seed, step = None, 0, 0
    rest = {"weights": weights, "rows": rows, "temperature": temperature, "request_ids": request_ids}
    check_same_device("fuse_logits", **named, **rest)
    filters = [[] if one is None else one.numbers for one in (mask, floor, keep)]
    draw = (request_ids, seed, step)
    tensors = (*sources, weights, temperature)
    differentiable = out in ("logits", "log_probs", "probs") and any(tensor.requires_grad for tensor in tensors)
    differentiable = differentiable and torch.is_grad_enabled()
    op = "fuse_logits with gradients" if differentiable else "fuse_logits"
    chosen = resolve(op, backend, sources[0].device.type)
    if chosen == "triton" or (chosen == "native" and sources[0].device.type == "cuda"):
        misfit = native.gpu_misfit(chosen, num_sources, mask=mask, floor=floor, keep=keep)
        if misfit is not None:
            if backend != "auto":
                raise value_error("fuse_logits", *misfit, "use backend='reference'")
            chosen = "reference"
    if chosen == "reference":
        arguments = (vocab_size, mode == "mixture", anchor, neg_inf, *filters, out)
        return reference.fuse_logits(sources, rows, weights, temperature, *draw, *arguments)
    arguments = (vocab_size, mode == "mixture", anchor, NEG_INF.index(neg_inf), *filters, OUTS.index(out))
    if differentiable:
        if rows is not None:
            sources = [sources[0].index_select(0, rows[:, k]) for k in range(num_sources)]
        return autograd.FuseLogits.apply(weights, temperature, *arguments, *sources)
    return autograd.kernels(chosen).fuse_logits(sources, rows, weights, temperature, *draw, *arguments)[0]


def _check_sources(op: str, sources: list[Tensor], rows: Tensor | None) -> tuple[int, int]:
    """(num_rows, num_sources)"""
    if not sources:
        raise value_error(op, "sources", "at least one tensor", "none")
    for k, source in enumerate(sources):
        check_tensor(op, f"sources[{k}]", source)
        if source.dim() != 2 or source.shape[1] == 0 or source.shape[0] != sources[0].shape[0]:
            expected = f"[num_rows={sources[0].shape[0]}, vocab_size >= 1]" if k else "[num_rows, vocab_size >= 1]"
            raise shape_error(op, f"sources[{k}]", expected, source)
        if source.dtype not in FLOAT_DTYPES:
            raise dtype_error(op, f"sources[{k}]", FLOAT_DTYPES, source)
        if (source.dtype == torch.float64) != (sources[0].dtype == torch.float64):
            raise dtype_error(op, f"sources[{k}]", "float64 like all others or none", source)
    if rows is None:
        return sources[0].shape[0], len(sources)
    check_tensor(op, "rows", rows)
    if len(sources) != 1:
        raise value_error(op, "sources", "one tensor where rows are given", f"{len(sources)} tensors")
    if rows.dim() != 2 or rows.shape[1] == 0:
        raise shape_error(op, "rows", "[num_rows, num_sources >= 1]", rows)
    if rows.dtype != torch.int64:
        raise dtype_error(op, "rows", torch.int64, rows)
    return rows.shape[0], rows.shape[1]


def check_weights(
    op: str, weights: Sequence[float] | Tensor, num_rows: int, num_sources: int, source: Tensor
) -> Tensor:
    if not isinstance(weights, Tensor):
        dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
        if any(isinstance(weight, Tensor) for weight in weights):  # stacked: a gradient goes through
            weights = torch.stack([torch.as_tensor(weight, dtype=dtype, device=source.device) for weight in weights])
        else:
            weights = torch.tensor(list(weights), dtype=dtype, device=source.device)
    if weights.dtype not in (torch.float32, torch.float64):
        raise dtype_error(op, "weights", (torch.float32, torch.float64), weights)
    if weights.shape not in ((num_sources,), (num_rows, num_sources)):
        expected = f"[num_sources={num_sources}] or [num_rows={num_rows}, num_sources={num_sources}]"
        raise shape_error(op, "weights", expected, weights)
    return weights.expand(num_rows, num_sources)


def check_vocab(op: str, vocab: int | None, named: dict[str, Tensor]) -> int:
    """How many tokens take part. ``named``: argument -> its logits."""
    sizes = [source.shape[1] for source in named.values()]
    smallest, largest = min(sizes), max(sizes)
    name = list(named)[sizes.index(smallest)]
    if vocab is None:
        if largest - smallest > MAX_VOCAB_GAP:
            expected = f"at most {MAX_VOCAB_GAP} tokens short of the largest vocabulary, {largest}"
            remedy = "check that the tokenizers are the same and give vocab=, the number of tokens they share"
            raise value_error(op, name, expected, smallest, remedy)
        return smallest
    if not 1 <= vocab <= smallest:
        raise value_error(op, "vocab", f"in [1, {smallest}], the vocabulary of {name}", vocab)
    return vocab


def check_draw(op: str, request_ids: Tensor | None, num_rows: int, seed: int | None, step: int) -> None:
    if request_ids is None or seed is None:
        missing = "request_ids" if request_ids is None else "seed"
        raise value_error(op, missing, "given for out='sample'", None, "a draw is keyed by seed, request and step")
    check_tensor(op, "request_ids", request_ids)
    if request_ids.shape != (num_rows,):
        raise shape_error(op, "request_ids", f"[num_rows={num_rows}]", request_ids)
    if request_ids.dtype != torch.int64:
        raise dtype_error(op, "request_ids", torch.int64, request_ids)
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= value < 2**32:
            raise value_error(op, name, "in [0, 2**32)", value)
