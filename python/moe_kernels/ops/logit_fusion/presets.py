"""Published methods as calls of :func:`fuse_logits`: each says its weights, its mask, and nothing else.

Every function takes the logits [num_rows, vocab] of its models and passes ``options`` on (``out``, ``temperature``,
``keep``, ``neg_inf``, ``vocab``). Where authors normalise each source first the result is the same after the softmax: a
source's constant moves all logits of a row alike. Methods that solve a weight for each row are in
:mod:`moe_kernels.ops.logit_fusion.tilt`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_kernels._checks import check_tensor, dtype_error, shape_error, value_error
from moe_kernels.ops.logit_fusion.api import fuse_logits
from moe_kernels.ops.logit_fusion.token_filter import TokenFilter


def emulated_fine_tuning(
    base: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], scales: Sequence[float] | None = None, **options
) -> Tensor:
    """Adds what fine-tuning did to small models to a large one: ``base + sum_i scale_i (tuned_i - untuned_i)``.

    Args:
        base: the large model's logits.
        pairs: (tuned, untuned) logits of each small model.
        scales: one for each pair, 1 by default.

    Sources: emulated fine-tuning, arXiv 2310.12962; proxy tuning, arXiv 2401.08565 (one pair); DExperts,
    arXiv 2105.03023 (``mask=TokenFilter(top_p=0.9)``); weak-to-strong jailbreaking, arXiv 2401.17256.
    """
    scales = [1.0] * len(pairs) if scales is None else list(scales)
    if len(scales) != len(pairs):
        raise value_error("emulated_fine_tuning", "scales", f"{len(pairs)} numbers, one for each pair", len(scales))
    sources = [base] + [logits for pair in pairs for logits in pair]
    weights = [1.0] + [sign * scale for scale in scales for sign in (1, -1)]
    return fuse_logits(sources, weights, **options)


def contrastive_decoding(
    expert: Tensor,
    amateur: Tensor,
    *,
    amateur_weight: float = 1.0,
    plausibility: float = 0.1,
    min_keep: int = 1,
    **options,
) -> Tensor:
    """What the expert likes and the amateur does not: ``expert - amateur_weight * amateur`` on plausible tokens.

    A token is plausible where the expert finds it at least ``plausibility`` times as likely as its likeliest.

    Source: arXiv 2210.15097 (``min_keep=2`` with beams). Its code masks with a large negative number instead of -inf.
    """
    mask = TokenFilter(min_p=plausibility, min_keep=min_keep)
    return fuse_logits([expert, amateur], [1.0, -amateur_weight], mask=mask, **options)


def contrastive_reasoning(
    expert: Tensor, amateur: Tensor, *, strength: float = 0.5, plausibility: float = 0.1, **options
) -> Tensor:
    """``(1 + strength) expert - strength amateur`` on the tokens that the expert finds plausible.

    Source: arXiv 2309.09117.
    """
    mask = TokenFilter(min_p=plausibility)
    return fuse_logits([expert, amateur], [1 + strength, -strength], mask=mask, **options)


def context_aware(with_context: Tensor, without_context: Tensor, *, strength: float = 1.0, **options) -> Tensor:
    """``(1 + strength) with_context - strength without_context``.

    Source: context-aware decoding, arXiv 2305.14739.
    """
    return fuse_logits([with_context, without_context], [1 + strength, -strength], **options)


def guidance(
    conditional: Tensor, unconditional: Tensor, scale: float, *, convention: str = "text", **options
) -> Tensor:
    """Classifier-free guidance, in the three scales that are in use.

    ========  ======================================================  ==============================
    text      ``unconditional + scale (conditional - unconditional)``  arXiv 2306.17806, transformers
    music     the same, on logits that nobody normalised               MusicGen
    dia       ``conditional + scale (conditional - unconditional)``    Dia
    ========  ======================================================  ==============================

    text and music differ by a constant of each row alone. Dia's code then chooses top-k of these logits and returns the
    conditional ones; that last step is not here.
    """
    if convention not in ("text", "music", "dia"):
        raise value_error("guidance", "convention", "one of text, music, dia", repr(convention))
    scale = scale + 1 if convention == "dia" else scale
    return fuse_logits([conditional, unconditional], [scale, 1 - scale], **options)


def steer(tuned: Tensor, base: Tensor, negative: Tensor, *, tuning: float, prompt: float, **options) -> Tensor:
    """``(1 + tuning) tuned - tuning base - prompt negative``; negative: the tuned model on a negative prompt.

    Source: STEER, arXiv 2308.07645.
    """
    return fuse_logits([tuned, base, negative], [1 + tuning, -tuning, -prompt], **options)


def contrastive_guided_editing(
    tuned: Tensor,
    pretrained: Tensor,
    *,
    strength: float = 1.0,
    plausibility: float = 0.1,
    floor: TokenFilter | None = None,
    **options,
) -> Tensor:
    """``tuned - strength pretrained`` on tokens that the tuned model finds plausible; optionally with a floor.

    Source: CGE, arXiv 2410.14765. Its code floors at the smallest value of the whole batch, here each row has its own.
    """
    mask = TokenFilter(min_p=plausibility)
    return fuse_logits([tuned, pretrained], [1.0, -strength], mask=mask, floor=floor, **options)


def composition_of_experts(sources: Sequence[Tensor], experts: Tensor, **options) -> Tensor:
    """Each row is the logits of one model alone, the one that a router chose for its prompt; the others are not read.

    Args:
        sources: K tensors [num_rows, vocab].
        experts: [num_rows] int64, in [0, K). On the CPU another number is an error; elsewhere, where to look would make
            the device wait, it breaks its row (NaN, -1 for a token).

    Source: Composition of Experts, arXiv 2412.01868.
    """
    op = "composition_of_experts"
    check_tensor(op, "experts", experts)
    if experts.dtype != torch.int64:
        raise dtype_error(op, "experts", torch.int64, experts)
    if not sources or experts.shape != sources[0].shape[:1]:
        expected = f"[num_rows={sources[0].shape[0]}]" if sources else "[0], as there are no sources"
        raise shape_error(op, "experts", expected, experts)
    outside = (experts < 0) | (experts >= len(sources))
    if experts.device.type == "cpu" and outside.any():
        raise value_error(op, "experts", f"in [0, {len(sources)}), the sources", experts[outside][0].item())
    weights = (experts[:, None] == torch.arange(len(sources), device=experts.device)).to(torch.float32)
    weights = weights.masked_fill(outside[:, None], math.nan)
    return fuse_logits(sources, weights, **options)


def multi_objective(sources: Sequence[Tensor], weights: Sequence[float], **options) -> Tensor:
    """``sum_k weight_k source_k``: models aligned to one objective each.

    Source: MOD, arXiv 2406.18853 (its reverse-KL form).
    """
    return fuse_logits(sources, weights, **options)


def emulated_disalignment(base: Tensor, aligned: Tensor, *, strength: float, **options) -> Tensor:
    """``(1 + strength) base - strength aligned``.

    Source: arXiv 2402.12343.
    """
    return fuse_logits([base, aligned], [1 + strength, -strength], **options)


def interpolate(first: Tensor, second: Tensor, share: float, **options) -> Tensor:
    """The mixture ``(1 - share) softmax(first) + share softmax(second)``: kNN-LM, memory decoders, weighted ensembles.

    Source: arXiv 1911.00172.
    """
    if not (math.isfinite(share) and 0 <= share <= 1):
        raise value_error("interpolate", "share", "in [0, 1]", share)
    return fuse_logits([first, second], [1 - share, share], mode="mixture", **options)
