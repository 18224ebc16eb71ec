"""split_dense on whole transformers models: the dense model's logits, saving, loading, pruning."""

import copy
import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="models of transformers are split")

import transformers

import moe_kernels.integrations.transformers  # noqa: F401  registers the split classes
from moe_kernels.nn import ModuleStatistics, MoEFeedForward, merge_experts, prune_experts, split_dense
from moe_kernels.nn.split_models import DENSE_TYPES
from moe_kernels.testing import assert_close_to_reference
from tests.nn.test_upcycle import dense_model

NUM_LAYERS, NUM_EXPERTS = 2, 6
WINDOWS = torch.arange(3 * 12).view(3, 12) % 40


@pytest.mark.parametrize("name", DENSE_TYPES)
def test_all_experts_are_the_dense_model_and_load_again(name, tmp_path):
    dense = dense_model(name)
    before = copy.deepcopy(dense.state_dict())
    split = split_dense(dense, NUM_EXPERTS, NUM_EXPERTS, WINDOWS)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    input_ids = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        eager, expected = dense(input_ids).logits, copy.deepcopy(dense).double()(input_ids).logits
        actual = split(input_ids).logits
    assert_close_to_reference(actual, expected, eager)

    split.model.layers[1].mlp.top_k = 2
    with torch.no_grad():
        fewer = split(input_ids).logits
    split.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(split) and [layer.mlp.top_k for layer in loaded.model.layers] == [NUM_EXPERTS, 2]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, fewer)
        tokens = loaded.generate(input_ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(tokens, split.generate(input_ids, max_new_tokens=3, do_sample=False))


def test_the_layers_are_those_of_the_layers_own_tokens():
    dense = dense_model("llama")
    seen = []
    handle = dense.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for window in WINDOWS:
            dense.model(window[None], use_cache=False)
    handle.remove()
    split = split_dense(dense, NUM_EXPERTS, 2, WINDOWS)
    expected = split_dense(dense.model.layers[1].mlp, NUM_EXPERTS, 2, torch.cat(seen))
    actual = split.model.layers[1].mlp
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in actual.state_dict().items())


def test_loading_without_the_integration_is_refused(tmp_path):
    split_dense(dense_model("llama"), NUM_EXPERTS, 2, WINDOWS).save_pretrained(tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode and "moe_kernels_split_llama" in result.stderr


@pytest.mark.parametrize("change", ["prune", "merge"])
def test_pruned_and_merged_split_models_load_again(change, tmp_path):
    split = split_dense(dense_model("qwen3"), NUM_EXPERTS, 2, WINDOWS)
    with ModuleStatistics(split) as statistics, torch.no_grad():
        split(WINDOWS)
    if change == "prune":
        smaller = prune_experts(split, statistics.counts, 4)
    else:
        groups = [[[0, 1], [2], [3, 4], [5]], [[0, 1, 2], [3], [4, 5]]]  # layers of different size
        smaller = merge_experts(split, {f"model.layers.{i}.mlp": groups[i] for i in range(NUM_LAYERS)})
    smaller.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    numbers = [layer.mlp.num_experts for layer in loaded.model.layers]
    assert numbers == ([4, 4] if change == "prune" else [4, 3])
    assert json.loads((tmp_path / "config.json").read_text())["split"]["num_experts"] == numbers
    with torch.no_grad():
        assert torch.equal(loaded(WINDOWS).logits, smaller(WINDOWS).logits)


def test_moe_feed_forward_state_round_trip():
    layer = split_dense(dense_model("llama").model.layers[0].mlp, NUM_EXPERTS, 2, torch.randn(50, 16))
    fresh = MoEFeedForward(16, 24 // NUM_EXPERTS, NUM_EXPERTS, 2, weighted=False, router_bias=True)
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(fresh(x), layer(x))


def test_bad_input():
    dense = dense_model("llama")
    for model, calibration, message in [
        (dense_model("mistral", num_hidden_layers=1), torch.randn(3, 16), "calibration must be of shape"),
        (dense, WINDOWS[0], "calibration must be of shape"),
        (dense, WINDOWS[:1], r"calibration must be of shape \[num_tokens > 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            split_dense(model, NUM_EXPERTS, 2, calibration)
    with pytest.raises(ValueError, match="num_experts must be a divisor of the layer's 24 neurons, got 5"):
        split_dense(dense, 5, 2, WINDOWS)
    dense.config.model_type = "gpt2"
    with pytest.raises(ValueError, match="mlp must be a transformers llama, mistral, qwen2, qwen3, got gpt2"):
        split_dense(dense, NUM_EXPERTS, 2, WINDOWS)
