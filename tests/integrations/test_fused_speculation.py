"""Drafted generation: greedy it is the plain one, sampled it has its distribution; the large model runs less often."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from moe_kernels import fuse_logits
from moe_kernels.integrations.transformers import FusedGeneration, FusionSource, fusions
from moe_kernels.ops.logit_fusion import presets
from tests.integrations.fused_models import EOS, VOCAB_SIZE, last_logits, prompts, tiny


@pytest.fixture(scope="module")
def models():
    return [tiny(seed) for seed in range(3)]


def generate(model, fusion, seed: int = 0, **more):
    return model.generate(
        **prompts([6], seed), custom_generate=fusion, **{"max_new_tokens": 12, "seed": 0, **more}
    ).tolist()


@pytest.mark.parametrize("num_draft", [1, 3, 20])
def test_greedy_is_the_plain_generation(models, num_draft):
    large, tuned, untuned = models
    lengths = set()
    for seed in range(6):
        for method, arguments in (
            (fusions.emulated_fine_tuning, ([(tuned, untuned)], [0.8])),
            (fusions.contrastive_decoding, (untuned,)),
            (fusions.dynamic_fusion, ([(tuned, untuned)],)),
        ):
            drafted = method(*arguments, num_draft=num_draft)
            processed = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
            for more in ({}, processed):
                plain = generate(large, method(*arguments), seed, do_sample=False, **more)
                assert generate(large, drafted, seed, do_sample=False, **more) == plain
                lengths.add(len(plain[0]))
    assert len(lengths) > 1, "no generation ended early: a weak test"


def test_windows_go_back(models):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.6, sliding_window=4, use_sliding_window=True, max_window_layers=0,
    )  # fmt: skip
    sliding = Qwen2ForCausalLM(config).eval()
    for seed in range(4):
        plain, drafted = (
            fusions.emulated_fine_tuning([(models[1], sliding)], [0.5], num_draft=num_draft) for num_draft in (0, 3)
        )
        assert generate(models[0], drafted, seed, do_sample=False) == generate(models[0], plain, seed, do_sample=False)


def test_samples_have_the_distribution_of_the_fusion(models):
    large, tuned, untuned = models
    prompt = prompts([6])["input_ids"][0]

    def fused(tokens):
        logits = [last_logits(model, tokens) for model in models]
        return presets.emulated_fine_tuning(logits[0], [(logits[1], logits[2])], [0.3], out="probs", temperature=1.5)[0]

    first = fused(prompt)
    second = torch.stack([fused(torch.cat([prompt, torch.tensor([token])])) for token in range(VOCAB_SIZE)])
    second[EOS] = 0  # nothing follows the end
    second = first @ second
    fusion = fusions.emulated_fine_tuning([(tuned, untuned)], [0.3], num_draft=2)
    num_runs = 500
    arguments = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": 2}
    runs = [
        generate(large, fusion, **arguments, request_ids=torch.tensor([run]))[0][len(prompt) :]
        for run in range(num_runs)
    ]
    assert runs[3] == generate(large, fusion, **arguments, request_ids=torch.tensor([3]))[0][len(prompt) :]
    for position, probs in enumerate((first, second)):
        counts = torch.bincount(torch.tensor([new[position] for new in runs if len(new) > position]), minlength=61)
        common = probs * num_runs > 5
        expected = torch.cat([probs[common], 1 - probs[common].sum()[None]]).double() * num_runs
        counts = torch.cat([counts[common], num_runs - counts[common].sum()[None]])
        freedom = expected.numel() - 1
        assert freedom > 5
        # chi-squared: 5 standard deviations above its mean
        assert ((counts - expected).square() / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_a_draft_that_knows_more_tokens(models):
    wide = tiny(3, vocab_size=VOCAB_SIZE + 200)
    # all but surely drafted, were it not for the models that cannot read it
    wide.lm_head.weight.data[VOCAB_SIZE:] *= 30
    for more in ({"do_sample": False}, {"do_sample": True}):
        ids = generate(models[0], fusions.contrastive_decoding(wide, num_draft=3, plausibility=0.0), **more)
        assert max(ids[0]) < VOCAB_SIZE


def test_a_perfect_draft_spares_the_large_model(models):
    large, small, _ = models
    calls = []
    hook = large.register_forward_hook(lambda *_: calls.append(1))
    copy = FusedGeneration(
        lambda base, other, **o: fuse_logits([base, other], [0.0, 1.0], **o),
        [FusionSource(small)],
        draft=0,
        num_draft=3,
    )
    arguments = {"do_sample": True, "top_k": 0, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    tokens = generate(large, copy, **arguments)
    hook.remove()
    assert len(tokens[0]) == 18 and len(calls) == 1 + 3  # the prompt, then three drafted and one more each time


def test_bad_input(models):
    fusion = fusions.contrastive_decoding(models[1], num_draft=2)
    with pytest.raises(ValueError, match="a drafted generation must be one row, and token ids, got 2 rows"):
        models[0].generate(**prompts([5, 3]), custom_generate=fusion, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"draft must be in \[0, 1\), the other sources, got 1"):
        FusedGeneration(presets.context_aware, [FusionSource()], draft=1)
    with pytest.raises(ValueError, match="num_draft must be at least 1, got 0"):
        FusedGeneration(presets.context_aware, [FusionSource()], draft=0, num_draft=0)
