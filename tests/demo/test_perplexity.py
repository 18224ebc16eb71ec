"""The perplexity part of the demo, on a tiny Llama with random weights."""

import pytest
import torch

pytest.importorskip("transformers", reason="the demo runs a model of transformers")

import transformers

from moe_kernels.demo import perplexity
from moe_kernels.demo.model import LanguageModel, feed_forward_layers, split_model
from moe_kernels.demo.settings import PerplexitySettings
from moe_kernels.demo.text import Texts
from moe_kernels.nn.split_models import recorded_inputs
from moe_kernels.testing import assert_close_to_reference

SETTINGS = PerplexitySettings(
    num_experts=4,
    active_experts=(4, 2),
    window_size=32,
    calibration_windows=3,
    evaluation_windows=2,
    timing_repeats=1,
)


class Bytes:
    """A tokenizer with one token for each byte."""

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": torch.tensor([list(text.encode())])})


def _silent(iterable, description):
    return iterable


@pytest.fixture
def language_model():
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return LanguageModel("tiny", transformers.LlamaForCausalLM(config).eval(), Bytes())


def test_all_experts_give_the_dense_logits(language_model):
    model = language_model.model
    windows = torch.randint(256, (3, 32))
    split = split_model(model, windows, 4, _silent)
    dense = feed_forward_layers(model)
    ids = torch.randint(256, (1, 20))
    with torch.no_grad():
        eager = model(ids).logits
        perplexity.select(model, dense, split, 4)
        actual = model(ids).logits
        perplexity.select(model, dense, split, 0)
        expected = model.double()(ids).logits
    assert_close_to_reference(actual, expected, eager)


def test_run_measures_every_setting_and_leaves_the_model_dense(language_model):
    dense = feed_forward_layers(language_model.model)
    text = "The quick brown fox jumps over the lazy dog. " * 4
    result = perplexity.run(language_model, Texts(text, text.upper()), SETTINGS, _silent)
    assert [row["active_experts"] for row in result["rows"]] == [4, 2]
    for row in (result["dense"], *result["rows"]):
        assert all(row[key] > 0 for key in row if key.startswith(("perplexity", "model_", "feed_")))
    assert result["all_active"]["max_logit_difference"] < result["all_active"]["max_logit"]
    assert feed_forward_layers(language_model.model) == dense


def test_recorded_inputs_are_the_tokens_of_each_layer(language_model):
    model = language_model.model
    layers = feed_forward_layers(model)
    with recorded_inputs(layers) as seen:
        model(torch.randint(256, (2, 7)))
    model(torch.randint(256, (2, 7)))  # no longer recorded
    assert [[tuple(x.shape) for x in tokens] for tokens in seen] == [[(14, 32)], [(14, 32)]]


def test_windows_are_spread_over_the_text():
    windows = perplexity.windows_of(torch.arange(100), 3, 10)
    assert windows[:, 0].tolist() == [0, 33, 66]
    assert windows[2].tolist() == list(range(66, 76))
    with pytest.raises(ValueError, match="at least 120 tokens, got 100"):
        perplexity.windows_of(torch.arange(100), 12, 10)


def test_every_setting_takes_its_turn_at_being_first():
    assert [perplexity.rotated([0, 16, 8], turn) for turn in range(4)] == [
        [0, 16, 8],
        [16, 8, 0],
        [8, 0, 16],
        [0, 16, 8],
    ]
