"""``demo route`` on a tiny Llama: the kinds, their dials, their training."""

import pytest
import torch

pytest.importorskip("transformers", reason="the demo runs a model of transformers")

from moe_kernels.demo import report_tuning, routers
from moe_kernels.demo.model import feed_forward_layers
from moe_kernels.demo.settings import RouterSettings
from moe_kernels.demo.text import Texts
from moe_kernels.nn import split_dense
from tests.demo.test_perplexity import _silent, language_model  # noqa: F401  a fixture

SETTINGS = RouterSettings(
    num_experts=8,
    active_experts=4,
    window_size=32,
    calibration_windows=6,
    evaluation_windows=2,
    num_steps=12,
    batch_size=64,
)
KINDS = routers.kinds(SETTINGS.active_experts)


@pytest.fixture
def layer_and_tokens(language_model):  # noqa: F811
    mlp = feed_forward_layers(language_model.model)[0]
    tokens = torch.randn(400, 32)
    return mlp, split_dense(mlp, 8, 4, tokens), tokens


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_takes_the_experts_it_is_given(layer_and_tokens, name):
    _, layer, tokens = layer_and_tokens
    routers.set_routing(layer, KINDS[name], tokens, 4)
    # a dial moves by whole picks of 400 tokens: within a tenth of an expert is what 8 experts allow
    assert abs(routers.mean_experts(layer, tokens) - 4) < 1 / 8


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_one_and_the_router_learns(layer_and_tokens, name):
    dense, layer, tokens = layer_and_tokens
    kind = KINDS[name]
    if kind.router:
        layer.router = kind.router(32, 8)
    routers.set_routing(layer, kind, tokens, 4)
    topk_ids, topk_weights = layer.routing(layer.router(tokens))
    real = (topk_ids >= 0) & (topk_ids < 8)
    assert torch.equal(topk_weights, real.to(topk_weights.dtype))
    before = [parameter.clone() for parameter in layer.router.parameters()]
    experts = layer.down_proj.clone()
    losses = routers.train_router(layer, dense.requires_grad_(False), tokens, SETTINGS, seed=0)
    assert len(losses) == SETTINGS.num_steps and all(loss > 0 for loss in losses)
    assert any(not torch.equal(a, b) for a, b in zip(before, layer.router.parameters(), strict=True))
    assert torch.equal(experts, layer.down_proj)


def test_run_measures_every_kind_and_leaves_the_model_dense(language_model, tmp_path, capsys):  # noqa: F811
    dense = feed_forward_layers(language_model.model)
    text = "The quick brown fox jumps over the lazy dog. " * 8
    result = routers.run(language_model, Texts(text, text.upper()), SETTINGS, 0, _silent)
    assert [row["kind"] for row in result["rows"]] == list(KINDS)
    for row in (*result["rows"], result["untrained"], result["random"]):
        assert row["perplexity"] > 1 and 0 < row["experts_per_token"] <= 8
    assert "experts_per_token" not in result["dense"]
    assert feed_forward_layers(language_model.model) == dense
    report_tuning.print_routers(result)
    out = capsys.readouterr().out
    assert all(name in out for name in KINDS)
    report_tuning.plot_routers(result, tmp_path / "route.png")
    assert (tmp_path / "route.png").read_bytes().startswith(b"\x89PNG")
