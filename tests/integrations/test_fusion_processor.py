"""The processor is the fusion where it can be right, and refuses where it cannot."""

from functools import partial

import pytest
import torch

from moe_kernels.integrations.transformers import FusionLogitsProcessor, FusionSource, fusions
from moe_kernels.ops.logit_fusion import presets
from tests.integrations.fused_models import Recompute, prompts, tiny

FUSE = partial(presets.guidance, scale=1.7)


@pytest.fixture(scope="module")
def models():
    return [tiny(seed) for seed in range(3)]


def tuned(base, a, b, **options):
    return presets.emulated_fine_tuning(base, [(a, b)], **options)


def test_greedy_is_the_exact_recomputation(models):
    inputs, negative = prompts([5, 3, 8]), prompts([2, 6, 4], 1)
    rows = [ids[mask.bool()] for ids, mask in zip(*negative.values(), strict=True)]
    small = [FusionSource(models[1]), FusionSource(models[2])]
    for processor, fuse, others in (
        (FusionLogitsProcessor(FUSE, [FusionSource(models[0], *negative.values())]), FUSE, [(models[0], rows)]),
        (
            FusionLogitsProcessor(tuned, small, attention_mask=inputs["attention_mask"]),
            tuned,
            [(models[1], None), (models[2], None)],
        ),
    ):
        arguments = {"max_new_tokens": 8, "do_sample": False}
        recompute = Recompute(models[0], inputs, fuse, others, 1)
        expected = models[0].generate(**inputs, **arguments, logits_processor=[recompute])
        actual = models[0].generate(**inputs, **arguments, logits_processor=[processor])
        assert actual.tolist() == expected.tolist()


def test_is_what_fused_generation_does(models):
    inputs = prompts([5])
    arguments = {"max_new_tokens": 8, "do_sample": False}
    processor = FusionLogitsProcessor(FUSE, [FusionSource(models[0], "last_token")])
    expected = models[0].generate(**inputs, **arguments, custom_generate=fusions.guidance(1.7))
    assert models[0].generate(**inputs, **arguments, logits_processor=[processor]).tolist() == expected.tolist()


def test_refuses_beams_and_reuse(models):
    def generate(processor, **more):
        return models[0].generate(**prompts([5, 5]), max_new_tokens=9, logits_processor=[processor], **more)

    processor = FusionLogitsProcessor(FUSE, [FusionSource(models[0], "last_token")])
    with pytest.raises(RuntimeError, match=r"beams need generate\(custom_generate=FusedGeneration"):
        generate(processor, num_beams=3)
    processor = FusionLogitsProcessor(FUSE, [FusionSource(models[0], "last_token")])
    generate(processor)
    with pytest.raises(RuntimeError, match="another generation a new processor"):
        generate(processor)


def test_bad_input(models):
    class Tokenizer:
        def __init__(self, **vocab):
            self.get_vocab = lambda: vocab

    with pytest.raises(ValueError, match=r"others\[0\]'s model must be given, got None; a processor does not see"):
        FusionLogitsProcessor(FUSE, [FusionSource(input_ids="last_token")])
    with pytest.raises(ValueError, match=r"tokenizers\[1\] must be the vocabulary of tokenizers\[0\], where 0 is 'a'"):
        FusionLogitsProcessor(FUSE, [], tokenizers=[Tokenizer(a=0), Tokenizer(b=0)])
    ids, scores = prompts([5, 3])["input_ids"], torch.randn(2, 61)
    with pytest.raises(ValueError, match=r"others\[0\]'s input_ids must be without padding where no mask is given"):
        FusionLogitsProcessor(FUSE, [FusionSource(models[0])])(ids, scores)
    with pytest.raises(ValueError, match="at most 256 tokens short .* check that the tokenizers are the same"):
        FusionLogitsProcessor(FUSE, [FusionSource(tiny(4, vocab_size=400), "last_token")])(ids, scores)
