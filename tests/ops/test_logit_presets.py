"""Each preset against its authors' arithmetic, written out in float64 as their papers and code have it."""

import pytest
import torch
from torch import Tensor

from moe_kernels import TokenFilter
from moe_kernels.ops.logit_fusion import presets
from moe_kernels.testing import assert_close_to_reference

NUM_ROWS, VOCAB_SIZE = 6, 700
EXPERTS = [2, 0, 1, 1, 0, 2]


def proxy_tuning(base, tuned, untuned):
    return (base + 1.0 * (tuned - untuned)).log_softmax(1)


def up_scaling(base, tuned, untuned):
    return (base.log_softmax(1) + 0.6 * (tuned.log_softmax(1) - untuned.log_softmax(1))).log_softmax(1)


def dexperts(base, expert, anti):
    # the nucleus of the base model alone, before the experts are added: sorted, up to and with the one that crosses 0.9
    probs, order = base.softmax(1).sort(dim=1, descending=True)
    outside = probs.cumsum(1) - probs >= 0.9
    outside = outside.scatter(1, order, outside)
    return (base + 2.0 * (expert - anti)).masked_fill(outside, -torch.inf).log_softmax(1)


def weak_to_strong(strong, unsafe, safe):
    strong, unsafe, safe = ((x / 0.7).log_softmax(1) for x in (strong, unsafe, safe))
    fused = strong + 1.5 * (unsafe - safe)
    return fused - fused.logsumexp(1, keepdim=True)


def contrastive_beams(expert, amateur, _):
    expert, amateur = expert.log_softmax(1), amateur.log_softmax(1)
    threshold = torch.minimum(
        expert.amax(1, keepdim=True) + torch.tensor(0.9, dtype=expert.dtype).log(), expert.topk(2, dim=1).values[:, -1:]
    )
    return (expert - amateur).masked_fill(expert < threshold, -torch.inf).log_softmax(1)


def composition(a, b, c):
    return torch.stack([(a, b, c)[expert][row] for row, expert in enumerate(EXPERTS)]).log_softmax(1)


def contrastive(expert, amateur, _):
    expert, amateur = expert.log_softmax(1), amateur.log_softmax(1)
    implausible = expert < expert.amax(1, keepdim=True) + torch.tensor(0.1, dtype=expert.dtype).log()
    return (expert - 0.5 * amateur).masked_fill(implausible, -torch.inf).log_softmax(1)


def contrastive_reasoning(expert, amateur, _):
    cutoff = torch.tensor(0.1, dtype=expert.dtype).log() + expert.amax(1, keepdim=True)
    return (1.5 * expert - 0.5 * amateur).masked_fill(expert < cutoff, -torch.inf).log_softmax(1)


def context_aware(with_context, without_context, _):
    return ((1 + 0.5) * with_context - 0.5 * without_context).log_softmax(1)


def text_guidance(conditional, unconditional, _):
    conditional, unconditional = conditional.log_softmax(1), unconditional.log_softmax(1)
    return (1.5 * (conditional - unconditional) + unconditional).log_softmax(1)


def music_guidance(conditional, unconditional, _):
    return (unconditional + (conditional - unconditional) * 3.0).log_softmax(1)


def dia_guidance(conditional, unconditional, _):
    return (conditional + 3.0 * (conditional - unconditional)).log_softmax(1)


def steer(tuned, base, negative):
    tuned, base, negative = (x.log_softmax(1) for x in (tuned, base, negative))
    return (tuned + 0.4 * (tuned - base) - 0.3 * negative).log_softmax(1)


def cge(tuned, pretrained, _):
    tuned, pretrained = tuned.log_softmax(1), pretrained.log_softmax(1)
    kept = pretrained.topk(20, dim=1).values[:, -1:]
    pretrained = torch.maximum(pretrained, kept)
    implausible = tuned.exp() < 0.1 * tuned.exp().amax(1, keepdim=True)
    return (tuned - pretrained).masked_fill(implausible, -torch.inf).log_softmax(1)


def multi_objective(a, b, c):
    return (0.2 * a + 0.3 * b + 0.5 * c).log_softmax(1)


def disalignment(base, aligned, _):
    return ((1 + 0.3) * base - 0.3 * aligned).log_softmax(1)


def interpolation(first, second, _):
    share = torch.tensor(0.3, dtype=first.dtype)
    return torch.logaddexp(first.log_softmax(1) + (1 - share).log(), second.log_softmax(1) + share.log())


METHODS = {
    "proxy_tuning": (proxy_tuning, lambda a, b, c, **o: presets.emulated_fine_tuning(a, [(b, c)], **o)),
    "up_scaling": (up_scaling, lambda a, b, c, **o: presets.emulated_fine_tuning(a, [(b, c)], [0.6], **o)),
    "dexperts": (
        dexperts,
        lambda a, b, c, **o: presets.emulated_fine_tuning(a, [(b, c)], [2.0], mask=TokenFilter(top_p=0.9), **o),
    ),
    "weak_to_strong": (
        weak_to_strong,
        lambda a, b, c, **o: presets.emulated_fine_tuning(a, [(b, c)], [1.5], temperature=0.7, **o),
    ),
    "contrastive_beams": (
        contrastive_beams,
        lambda a, b, c, **o: presets.contrastive_decoding(a, b, plausibility=0.9, min_keep=2, **o),
    ),
    "composition": (
        composition,
        lambda a, b, c, **o: presets.composition_of_experts([a, b, c], torch.tensor(EXPERTS), **o),
    ),
    "contrastive": (contrastive, lambda a, b, c, **o: presets.contrastive_decoding(a, b, amateur_weight=0.5, **o)),
    "reasoning": (contrastive_reasoning, lambda a, b, c, **o: presets.contrastive_reasoning(a, b, **o)),
    "context_aware": (context_aware, lambda a, b, c, **o: presets.context_aware(a, b, strength=0.5, **o)),
    "text_guidance": (text_guidance, lambda a, b, c, **o: presets.guidance(a, b, 1.5, **o)),
    "music_guidance": (music_guidance, lambda a, b, c, **o: presets.guidance(a, b, 3.0, convention="music", **o)),
    "dia_guidance": (dia_guidance, lambda a, b, c, **o: presets.guidance(a, b, 3.0, convention="dia", **o)),
    "steer": (steer, lambda a, b, c, **o: presets.steer(a, b, c, tuning=0.4, prompt=0.3, **o)),
    "cge": (cge, lambda a, b, c, **o: presets.contrastive_guided_editing(a, b, floor=TokenFilter(top_k=20), **o)),
    "multi_objective": (multi_objective, lambda a, b, c, **o: presets.multi_objective([a, b, c], [0.2, 0.3, 0.5], **o)),
    "disalignment": (disalignment, lambda a, b, c, **o: presets.emulated_disalignment(a, b, strength=0.3, **o)),
    "interpolation": (interpolation, lambda a, b, c, **o: presets.interpolate(a, b, 0.3, **o)),
}


@pytest.mark.with_reference
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_authors_arithmetic(backend, method, dtype):
    written_out, preset = METHODS[method]
    sources: list[Tensor] = [2 * torch.randn(NUM_ROWS, VOCAB_SIZE).to(dtype) for _ in range(3)]
    expected = written_out(*(source.double() for source in sources))
    assert_close_to_reference(preset(*sources, backend=backend), expected, written_out(*sources))


def test_bad_input():
    a = torch.randn(2, 8)
    for call, message in [
        (
            lambda: presets.emulated_fine_tuning(a, [(a, a)], [1.0, 2.0]),
            "scales must be 1 numbers, one for each pair, got 2",
        ),
        (lambda: presets.guidance(a, a, 2.0, convention="audio"), "convention must be one of text, music, dia"),
        (
            lambda: presets.composition_of_experts([a, a], torch.tensor([0, 2])),
            r"composition_of_experts: experts must be in \[0, 2\), the sources, got 2",
        ),
        (
            lambda: presets.composition_of_experts([a, a], torch.tensor([0])),
            r"composition_of_experts: experts must be of shape \[num_rows=2\], got \[1\]",
        ),
        (lambda: presets.composition_of_experts([], torch.tensor([0])), "as there are no sources"),
        (lambda: presets.interpolate(a, a, 1.5), r"share must be in \[0, 1\], got 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"composition_of_experts: experts must be torch.int64, got torch.int32"):
        presets.composition_of_experts([a, a], torch.tensor([0, 1], dtype=torch.int32))
