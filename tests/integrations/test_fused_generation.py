"""Generation by several sources against the same without any cache, recomputed from the start at every step."""

import random
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    LogitsProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from moe_kernels import fuse_logits
from moe_kernels.integrations.transformers import FusedGeneration, FusionSource, check_tokenizers, fusions
from moe_kernels.ops.logit_fusion import dynamic_fusion, presets
from tests.integrations.fused_models import EOS, PAD, VOCAB_SIZE, Recompute, prompts, tiny

NEW = 9


@pytest.fixture(scope="module")
def models() -> list[LlamaForCausalLM]:
    return [tiny(seed) for seed in range(3)]


def unpadded(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [ids[mask.bool()] for ids, mask in zip(*inputs.values(), strict=True)]


def last_token(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [ids[-1:] for ids in inputs["input_ids"]]


def cases(models, inputs, negative) -> dict:
    """name -> our generation, and the fuse and the other sources (model, own prompts) of the recomputation."""
    large, tuned, untuned = models
    pair = lambda base, a, b, **o: presets.emulated_fine_tuning(base, [(a, b)], [0.7], **o)  # noqa: E731
    dynamic = lambda base, a, b, **o: dynamic_fusion(base, [(a, b)], **o)  # noqa: E731
    small = [(tuned, None), (untuned, None)]
    return {
        "guidance": (
            fusions.guidance(1.7, *negative.values()),
            partial(presets.guidance, scale=1.7),
            [(None, unpadded(negative))],
        ),
        "unconditional": (fusions.guidance(1.7), partial(presets.guidance, scale=1.7), [(None, last_token(inputs))]),
        "context_aware": (
            fusions.context_aware(*negative.values(), strength=0.5),
            partial(presets.context_aware, strength=0.5),
            [(None, unpadded(negative))],
        ),
        "contrastive": (fusions.contrastive_decoding(untuned), presets.contrastive_decoding, [(untuned, None)]),
        "emulated_fine_tuning": (fusions.emulated_fine_tuning([(tuned, untuned)], [0.7]), pair, small),
        "dynamic": (fusions.dynamic_fusion([(tuned, untuned)]), dynamic, small),
    }


METHODS = ["guidance", "unconditional", "context_aware", "contrastive", "emulated_fine_tuning", "dynamic"]
SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "several_beams_returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.7},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("search", SEARCHES)
def test_every_row_is_the_exact_recomputation(models, method, search):
    arguments = {**SEARCHES[search], "max_new_tokens": NEW, "do_sample": False}
    finished = 0
    for seed in range(3):
        inputs, negative = prompts([5, 3, 8], seed), prompts([2, 6, 4], seed + 10)
        fusion, fuse, others = cases(models, inputs, negative)[method]
        recompute = Recompute(models[0], inputs, fuse, others, arguments.get("num_beams", 1))
        expected = models[0].generate(**inputs, **arguments, logits_processor=[recompute])
        actual = models[0].generate(**inputs, **arguments, custom_generate=fusion)
        assert actual.tolist() == expected.tolist()
        finished += torch.isin(actual[:, inputs["input_ids"].shape[1] : -1], torch.tensor(EOS)).sum().item()
    assert finished, "no row finished before the others: a weak test"


@pytest.mark.parametrize("seed", range(12))
def test_random_searches(models, seed):
    rng = random.Random(seed)
    batch_size, num_beams = rng.randint(1, 4), rng.choice([1, 2, 3, 5])
    inputs = prompts([rng.randint(1, 9) for _ in range(batch_size)], seed)
    negative = prompts([rng.randint(1, 14) for _ in range(rng.choice([1, batch_size]))], seed + 100)
    weights = [1.0, 0.5, -0.5, rng.uniform(-0.6, 0.6)]
    arguments = {"do_sample": False, "num_beams": num_beams, "max_new_tokens": rng.randint(1, 12)}
    if num_beams > 1:
        arguments |= {
            "num_return_sequences": rng.randint(1, num_beams),
            "length_penalty": rng.choice([0.5, 1.0, 2.0]),
            "early_stopping": rng.choice([True, False, "never"]),
        }

    def fuse(*logits: Tensor, **options) -> Tensor:
        return fuse_logits(logits, weights, **options)

    sources = [FusionSource(models[1]), FusionSource(models[2]), FusionSource(models[0], *negative.values())]
    own = unpadded(negative) * (batch_size // len(negative["input_ids"]))
    recompute = Recompute(models[0], inputs, fuse, [(models[1], None), (models[2], None), (None, own)], num_beams)
    expected = models[0].generate(**inputs, **arguments, logits_processor=[recompute])
    actual = models[0].generate(**inputs, **arguments, custom_generate=FusedGeneration(fuse, sources))
    assert actual.tolist() == expected.tolist()


def test_beams_keep_scores_and_one_negative_prompt_serves_all(models):
    inputs = prompts([4, 6])
    negative = prompts([3])["input_ids"]
    arguments = {"num_beams": 3, "max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
    fuse = partial(presets.guidance, scale=1.5)
    recompute = Recompute(models[0], inputs, fuse, [(None, [negative[0]] * 2)], 3)
    expected = models[0].generate(**inputs, **arguments, logits_processor=[recompute])
    actual = models[0].generate(**inputs, **arguments, custom_generate=fusions.guidance(1.5, negative))
    assert actual.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores)


SAMPLING = {"do_sample": True, "max_new_tokens": NEW, "top_k": 20, "temperature": 1.3}


def test_a_sample_is_its_own_beside_any_others(models):
    inputs, negative = prompts([5, 3, 8, 6]), prompts([2, 6, 4, 1], 1)
    ids = torch.tensor([7, 3, 11, 2])

    def generate(rows: list[int], **more) -> list[list[int]]:
        own = {name: tensor[rows] for name, tensor in inputs.items()}
        fusion = fusions.guidance(1.5, *(tensor[rows] for tensor in negative.values()))
        arguments = SAMPLING | {"seed": 5, "request_ids": ids[rows]} | more
        sequences = models[0].generate(**own, **arguments, custom_generate=fusion)
        # behind the end there may be more padding in company
        return [[t for t in new if t != PAD] for new in sequences[:, own["input_ids"].shape[1] :].tolist()]

    together = generate([0, 1, 2, 3])
    assert together == generate([0, 1, 2, 3])
    for row in range(4):
        assert generate([row]) == [together[row]]
    assert generate([2, 0]) == [together[2], together[0]]
    assert generate([0, 1, 2, 3], seed=6) != together
    # a wider temperature and no processors at all: drawn in one call of the fusion
    plain = {"top_k": 0, "temperature": 1.0}
    assert generate([1, 3], **plain) == [generate([row], **plain)[0] for row in (1, 3)]


def test_without_a_seed_the_generator_of_torch_draws_one(models):
    def generate() -> list[list[int]]:
        return models[0].generate(**prompts([5, 3]), **SAMPLING, custom_generate=fusions.guidance(1.1)).tolist()

    torch.manual_seed(1)
    first, second = generate(), generate()
    torch.manual_seed(1)
    assert generate() == first != second


def test_several_sequences_of_a_prompt_differ_and_the_first_is_that_of_one(models):
    inputs = prompts([5, 3])
    arguments = SAMPLING | {"custom_generate": fusions.guidance(1.5), "seed": 0}
    one = models[0].generate(**inputs, **arguments)
    three = models[0].generate(**inputs, **arguments, num_return_sequences=3)
    assert three.shape[0] == 6 and len({tuple(row) for row in three[:3].tolist()}) == 3
    for item in range(2):
        first, alone = ([t for t in row.tolist() if t != PAD] for row in (three[3 * item], one[item]))
        assert first == alone


def test_beams_that_sample_follow_the_generator_of_torch(models):
    inputs = prompts([5, 3])
    arguments = {"do_sample": True, "temperature": 5.0, "num_beams": 3, "max_new_tokens": 6}
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(models[0].generate(**inputs, **arguments, custom_generate=fusions.guidance(1.5)).tolist())
    assert runs[0] == runs[1] != runs[2]


def test_finished_rows_leave_the_models(models):
    inputs = prompts([5, 3, 8, 6])
    sizes = []
    hooks = [
        model.model.register_forward_pre_hook(
            lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
        )
        for model in models
    ]
    fusion = fusions.emulated_fine_tuning([(models[1], models[2])])
    sequences = models[0].generate(**inputs, do_sample=False, max_new_tokens=30, custom_generate=fusion)
    for hook in hooks:
        hook.remove()
    new = sequences[:, inputs["input_ids"].shape[1] :]
    ends = [next((i + 1 for i, token in enumerate(row) if token in EOS), len(row)) for row in new.tolist()]
    assert len(set(ends)) > 1, "all rows end together: a weak test"
    assert sum(sizes) == 3 * sum(ends)
    for row, end in zip(new.tolist(), ends, strict=True):
        assert set(row[end:]) <= {PAD}


@pytest.mark.parametrize("length", [6, 40], ids=["joined", "too long to join"])
def test_prompts_of_one_model_are_one_batch(models, length):
    inputs, negative = prompts([5, 3]), prompts([length, 2])
    calls = []
    hook = models[0].register_forward_hook(lambda *_: calls.append(1))
    arguments = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "num_beams": 2}
    actual = models[0].generate(**inputs, **arguments, custom_generate=fusions.guidance(1.5, *negative.values()))
    hook.remove()
    assert len(calls) == (NEW if length == 6 else 2 * NEW)
    recompute = Recompute(models[0], inputs, partial(presets.guidance, scale=1.5), [(None, unpadded(negative))], 2)
    assert actual.tolist() == models[0].generate(**inputs, **arguments, logits_processor=[recompute]).tolist()


def test_processors_see_every_row_in_its_place(models):
    class Forced(LogitsProcessor):
        """Row r: token 10 + r, and the end after r + 1 tokens."""

        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, -torch.inf)
            for row in range(scores.shape[0]):
                end = input_ids.shape[1] - 8 > row
                forced[row, EOS[0] if end else 10 + row] = 0
            return forced

    sequences = models[0].generate(
        **prompts([5, 3, 8]), max_new_tokens=6, logits_processor=[Forced()], custom_generate=fusions.guidance(1.5)
    )
    assert sequences[:, 8:].tolist() == [[10, 2, PAD, PAD], [11, 11, 2, PAD], [12, 12, 12, 2]]


def test_scores_and_streamer(models):
    class Streamer:
        def __init__(self):
            self.put_, self.ended = [], False

        def put(self, tokens):
            self.put_.append(tokens)

        def end(self):
            self.ended = True

    inputs, streamer = prompts([5]), Streamer()
    output = models[0].generate(
        **inputs,
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_scores=True,
        custom_generate=partial(fusions.guidance(1.5), streamer=streamer),
    )
    new = output.sequences[0, 5:]
    assert [score.argmax().item() for score in output.scores] == new.tolist()
    assert torch.cat(streamer.put_).tolist() == new.tolist() and streamer.ended


def test_a_model_without_a_pad_token():
    model = tiny(0)
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    fusion = fusions.guidance(1.5, torch.tensor([[12, 13]]))
    ids = model.generate(torch.tensor([[20, 21, 22]]), max_new_tokens=3, custom_generate=fusion, eos_token_id=None)
    assert ids.shape == (1, 6)


def test_another_vocabulary_and_architecture(models):
    wide = tiny(3, vocab_size=VOCAB_SIZE + 9)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE + 3, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.6, sliding_window=4, use_sliding_window=True, max_window_layers=0,
    )  # fmt: skip
    sliding = Qwen2ForCausalLM(config).eval()
    inputs = prompts([5, 3])
    fuse = lambda base, a, b, **o: presets.emulated_fine_tuning(base, [(a, b)], **o)  # noqa: E731
    recompute = Recompute(models[0], inputs, fuse, [(wide, None), (sliding, None)], 3)
    arguments = {"num_beams": 3, "max_new_tokens": NEW}
    expected = models[0].generate(**inputs, **arguments, logits_processor=[recompute])
    actual = models[0].generate(**inputs, **arguments, custom_generate=fusions.emulated_fine_tuning([(wide, sliding)]))
    assert actual.tolist() == expected.tolist()


class Tokenizer:
    def __init__(self, **vocab):
        self.vocab = vocab

    def get_vocab(self):
        return self.vocab


def test_bad_input(models):
    model, inputs = models[0], prompts([5, 3])
    right = {name: tensor.flip(1) for name, tensor in inputs.items()}
    two, three = prompts([2, 3])["input_ids"], prompts([2, 4, 5])["input_ids"]
    other = FusionSource(tiny(4, vocab_size=400))
    fuse = presets.context_aware
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    encoder_decoder = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB_SIZE, **sizes))

    def generate(fusion=fusions.guidance(1.5), inputs=inputs, **more):  # noqa: B008
        return model.generate(**inputs, max_new_tokens=2, custom_generate=fusion, **more)

    for call, message in [
        (lambda: generate(inputs=right), "the generating model's attention_mask must be 1 at the end of each row"),
        (lambda: generate(fusions.guidance(1.5, three)), r"input_ids must be of shape \[1 or batch_size=2, length"),
        (
            lambda: generate(fusions.guidance(1.5, two)),
            r"others\[0\]'s input_ids must be without padding where no mask",
        ),
        (
            lambda: generate(fusions.guidance(1.5, two, two[:1])),
            r"others\[0\]'s attention_mask must be of shape \[2, 3\]",
        ),
        (lambda: generate(FusedGeneration(fuse, [other])), "at most 256 tokens short .* tokenizers are the same"),
        (
            lambda: generate(FusedGeneration(fuse, [FusionSource(tiny(1).to("meta"))])),
            r"others\[0\] must be on cpu, as the prompt, got meta; move it with .to\(\)",
        ),
        (
            lambda: generate(FusedGeneration(fuse, [FusionSource(encoder_decoder)])),
            r"others\[0\] must be a decoder-only model, got T5ForConditionalGeneration",
        ),
        (lambda: generate(inputs_embeds=torch.randn(2, 5, 16)), "inputs must be input_ids and attention_mask, got"),
        (
            lambda: generate(position_ids=torch.arange(1, 6).expand(2, -1)),
            "position_ids must be left out, or the places of the tokens, got others",
        ),
        (lambda: generate(guidance_scale=1.5), "guidance_scale must be left at its default, got 1.5"),
        (
            lambda: generate(prompt_lookup_num_tokens=2),
            "the generation must be one of greedy_search, sample, beam_search, beam_sample, got assisted_generation",
        ),
        (lambda: generate(use_cache=False), "use_cache must be left at its default, got False"),
        (
            lambda: generate(output_attentions=True),
            "inputs must be input_ids and attention_mask, got output_attentions",
        ),
        (
            lambda: generate(output_logits=True, return_dict_in_generate=True),
            "output_logits must be left at its default, got True",
        ),
        (lambda: generate(request_ids=torch.arange(3)), r"request_ids must be of shape \[batch_size=2\]"),
        (lambda: generate(position_ids=None, labels=torch.ones(2)), "inputs must be input_ids and attention_mask, got"),
        (
            lambda: FusedGeneration(fuse, [], tokenizers=[Tokenizer(a=0, b=1), Tokenizer(a=0, c=1)]),
            r"tokenizers\[1\] must be the vocabulary of tokenizers\[0\], where 1 is 'b', got 'c'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    check_tokenizers("op", [Tokenizer(a=0, b=1), Tokenizer(a=0, b=1, c=2)])
    nothing = lambda a, b, **o: fuse(a, b.masked_fill(torch.ones_like(b, dtype=torch.bool), -torch.inf), **o)  # noqa: E731
    for beams in (1, 2):
        with pytest.raises(RuntimeError, match="the fused logits of row 0 must have a token to choose, got none"):
            generate(FusedGeneration(nothing, [FusionSource()]), num_beams=beams)
