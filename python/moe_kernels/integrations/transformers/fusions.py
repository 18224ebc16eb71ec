"""Published methods as generation: each gives a :class:`FusedGeneration` for ``model.generate(custom_generate=...)``.

The model that generates is the method's first: the conditional, the large, the expert. ``options`` go to
:func:`moe_kernels.fuse_logits` (``vocab``, ``neg_inf``, ``temperature`` before transformers' own). Methods that are not
here are :class:`FusedGeneration` with a preset of :mod:`moe_kernels.ops.logit_fusion.presets` and their sources.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from moe_kernels.integrations.transformers.fused_generation import FusedGeneration
from moe_kernels.integrations.transformers.source_state import FusionSource
from moe_kernels.ops import logit_fusion
from moe_kernels.ops.logit_fusion import presets

Pairs = Sequence[tuple[PreTrainedModel, PreTrainedModel]]


def guidance(
    scale: float, negative_ids: Tensor | None = None, negative_mask: Tensor | None = None, **options
) -> FusedGeneration:
    """Classifier-free guidance away from a negative prompt, by default from the prompt's last token alone.

    Args:
        negative_ids: [1 or batch_size, length], padded on the left where ``negative_mask`` is 0.

    Source: :func:`presets.guidance`.
    """
    other = FusionSource(input_ids="last_token" if negative_ids is None else negative_ids, attention_mask=negative_mask)
    return FusedGeneration(partial(presets.guidance, scale=scale, **options), [other])


def context_aware(
    without_ids: Tensor, without_mask: Tensor | None = None, *, strength: float = 1.0, **options
) -> FusedGeneration:
    """Context-aware decoding: the call's prompt has the context, ``without_ids`` is the question without it.

    Source: :func:`presets.context_aware`.
    """
    other = FusionSource(input_ids=without_ids, attention_mask=without_mask)
    return FusedGeneration(partial(presets.context_aware, strength=strength, **options), [other])


def contrastive_decoding(amateur: PreTrainedModel, *, num_draft: int = 0, **options) -> FusedGeneration:
    """What the generating model likes and ``amateur`` does not. ``options``: of the preset of this name.

    Args:
        num_draft: speculative contrastive decoding: how many tokens the amateur drafts at a time.
    """
    fuse = partial(presets.contrastive_decoding, **options)
    return FusedGeneration(fuse, [FusionSource(amateur)], **_drafted(num_draft))


def emulated_fine_tuning(
    pairs: Pairs, scales: Sequence[float] | None = None, *, num_draft: int = 0, **options
) -> FusedGeneration:
    """Adds what tuning did to small models, (tuned, untuned) each: emulated fine-tuning, proxy tuning, DExperts.

    Args:
        num_draft: how many tokens the first tuned model drafts at a time.

    Source: :func:`presets.emulated_fine_tuning`.
    """

    def fuse(base: Tensor, *others: Tensor, **draw) -> Tensor:
        return presets.emulated_fine_tuning(base, _in_pairs(others), scales, **options, **draw)

    return FusedGeneration(fuse, _sources(pairs), **_drafted(num_draft))


def dynamic_fusion(pairs: Pairs, *, num_draft: int = 0, **options) -> FusedGeneration:
    """The same with a scale that is solved for each token. ``options``: of the function of this name."""

    def fuse(base: Tensor, *others: Tensor, **draw) -> Tensor:
        return logit_fusion.dynamic_fusion(base, _in_pairs(others), **options, **draw)

    return FusedGeneration(fuse, _sources(pairs), **_drafted(num_draft))


def _drafted(num_draft: int) -> dict:
    """The first of the other sources drafts, or none does."""
    return {"draft": 0, "num_draft": num_draft} if num_draft else {}


def _sources(pairs: Pairs) -> list[FusionSource]:
    return [FusionSource(model) for pair in pairs for model in pair]


def _in_pairs(logits: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(logits[::2], logits[1::2], strict=True))
