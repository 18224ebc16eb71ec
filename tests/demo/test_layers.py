"""The layer comparison of the demo, on layers of the real classes at small sizes."""

import pytest
import torch

pytest.importorskip("transformers", reason="the demo compares with transformers")

import moe_kernels.integrations.transformers  # noqa: F401
from moe_kernels.demo import layers
from moe_kernels.demo.settings import LayerSettings
from moe_kernels.testing import assert_close_to_reference, random_routing


def _small(name: str) -> torch.nn.Module:
    from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    sizes = {"hidden_size": 64, "intermediate_size": 32}
    if name == "Qwen3-30B-A3B":
        return layers._experts(Qwen3MoeExperts, Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=32, num_experts=8))
    if name == "Mixtral-8x7B":
        return layers._experts(MixtralExperts, MixtralConfig(**sizes, num_local_experts=8))
    return layers._experts(GptOssExperts, GptOssConfig(**sizes, num_local_experts=8))


@pytest.fixture(params=layers.LAYERS, ids=lambda layer: layer.name)
def layer(request):
    return request.param


def test_float32_layer_is_the_eager_layer(layer):
    experts = _small(layer.name)
    x = torch.randn(9, 64).to(torch.bfloat16)
    topk_ids, topk_weights = random_routing(9, 8, layer.top_k)
    actual = layers.forward_float32(experts, x, topk_ids, topk_weights)
    experts.config._experts_implementation = "eager"
    eager = experts.float()(x.float(), topk_ids.long(), topk_weights)
    expected = experts.double()(x.double(), topk_ids.long(), topk_weights.double())
    assert_close_to_reference(actual, expected, eager)


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_every_implementation_is_measured(layer, num_tokens):
    row = layers.compare(layer, _small(layer.name), num_tokens, LayerSettings(repeats=1), seed=0)
    cells = row["implementations"]
    assert set(cells) == set(layers.IMPLEMENTATIONS)
    for name, cell in cells.items():
        assert cell["ms"] > 0, name
        # each rounds to bfloat16 a few times; a wrong gate or layout is off by the size of the result
        assert cell["error"] < torch.finfo(torch.bfloat16).eps * 8, name


def test_batched_mm_is_left_out_where_it_would_fill_the_memory(layer):
    row = layers.compare(layer, _small(layer.name), 4, LayerSettings(repeats=1, max_copied_bytes=0), seed=0)
    assert "would copy" in row["implementations"]["batched_mm"]["skipped"]


def test_copied_bytes_are_those_of_both_projections():
    experts = _small("Qwen3-30B-A3B")
    assert layers.copied_bytes(experts, pairs=3) == 3 * (2 * 32 * 64 + 64 * 32) * 2


def test_weights_are_filled_without_a_pattern():
    parameter = torch.empty(5, 7, dtype=torch.bfloat16)
    layers._fill_normal(parameter, 1.0, torch.Generator().manual_seed(0))
    assert parameter.isfinite().all()
    assert parameter.unique().numel() > 5
