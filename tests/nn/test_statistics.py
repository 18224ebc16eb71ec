"""ModuleStatistics: counts by layer, label and expert, in our modules and in transformers' models."""

import pytest
import torch
from torch import nn

from moe_kernels import route_top_p
from moe_kernels.nn import ModuleStatistics, MoEFeedForward


def by_hand(routed, labels, num_experts):
    counts = torch.zeros(int(labels.max()) + 1, num_experts, dtype=torch.int64)
    weights = torch.zeros(int(labels.max()) + 1, num_experts, dtype=torch.float64)
    for label, ids, row in zip(labels.tolist(), routed.topk_ids.tolist(), routed.topk_weights.tolist(), strict=True):
        for expert, weight in zip(ids, row, strict=True):
            if label >= 0 and expert >= 0:
                counts[label, expert] += 1
                weights[label, expert] += weight
    return counts, weights


@pytest.mark.parametrize("routing", [None, lambda logits: route_top_p(logits, 0.6)])
def test_counts_by_token_label(routing):
    layer = MoEFeedForward(8, 4, 5, 2, routing=routing)
    model = nn.Sequential(nn.Identity(), layer)
    x, labels = torch.randn(2, 10, 8), torch.randint(-1, 3, (2, 10))
    with ModuleStatistics(model) as statistics:
        with statistics.label(labels):
            model(x)
    _, routed = layer(x, return_routed=True)
    counts, weights = by_hand(routed, labels.flatten(), 5)
    assert torch.equal(statistics.counts["1"], counts)
    assert torch.equal(statistics.weights["1"], weights)
    assert statistics.tokens["1"].tolist() == [(labels == label).sum().item() for label in range(3)]
    model(x)  # outside: not counted
    assert torch.equal(statistics.counts["1"], counts)


def test_labels_accumulate_and_tell_experts_apart():
    layer = MoEFeedForward(4, 4, 4, 1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4))
    with ModuleStatistics(layer) as statistics:
        for _ in range(2):
            with statistics.label(0):
                layer(torch.eye(4)[[0, 1]])
            with statistics.label(1):
                layer(torch.eye(4)[[2, 2, 1]])
    assert statistics.counts[""].tolist() == [[2, 2, 0, 0], [0, 2, 4, 0]]
    assert statistics.tokens[""].tolist() == [4, 6]
    ranked = statistics.distinctive(1, against=0)
    assert ranked[0][:2] == ("", 2) and ranked[-1][:2] == ("", 0)


def test_checkpointed_layers_count_once():
    layer = MoEFeedForward(8, 4, 5, 2)
    x = torch.randn(6, 8, requires_grad=True)
    with ModuleStatistics(layer) as statistics:
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert statistics.counts[""].sum() == 12


@pytest.mark.parametrize("implementation", ["eager", "moe_kernels"])
def test_a_transformers_model(implementation):
    transformers = pytest.importorskip("transformers")
    import moe_kernels.integrations.transformers  # noqa: F401  registers the name

    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation).eval()
    input_ids = torch.randint(0, 32, (2, 7))
    with ModuleStatistics(model) as statistics, statistics.label(input_ids), torch.no_grad():
        router_logits = model(input_ids, output_router_logits=True).router_logits
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        expected = torch.zeros(32, 4, dtype=torch.int64)
        for token, experts in zip(input_ids.flatten(), router_logits[layer].topk(2, dim=1).indices, strict=True):
            expected[token, experts] += 1
        counts = statistics.counts[name]
        assert torch.equal(counts, expected[: counts.shape[0]]) and counts.sum() == 28


def test_bad_input():
    with pytest.raises(ValueError, match="model must be one with mixture-of-experts layers, got Linear"):
        ModuleStatistics(nn.Linear(2, 2))
    layer = MoEFeedForward(8, 4, 5, 2)
    with ModuleStatistics(layer) as statistics:
        with pytest.raises(ValueError, match=r"labels must be of shape \[num_tokens=3\], got \[2\]"):
            with statistics.label(torch.zeros(2)):
                layer(torch.randn(3, 8))
        with pytest.raises(ValueError, match="label must be below the 0 that were seen"):
            layer(torch.randn(0, 8))
            statistics.distinctive(1, 0)
