"""prune_experts and merge_experts: what is kept, what is merged, models that load again."""

import copy
import itertools

import pytest
import torch

from moe_kernels.nn import ModuleStatistics, MoEFeedForward, merge_experts, prune_experts
from moe_kernels.nn.align import match_neurons
from moe_kernels.testing import assert_close_to_reference

MIXTURES = ["mixtral", "qwen3_moe", "olmoe", "qwen2_moe"]


def mixture(model_type: str):
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_experts_per_tok=2, max_position_embeddings=64,
        shared_expert_intermediate_size=8, initializer_range=0.3,
    )  # fmt: skip
    name = "num_local_experts" if model_type == "mixtral" else "num_experts"
    config = transformers.AutoConfig.for_model(model_type, **sizes, **{name: 6})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def layer_without(layer: MoEFeedForward, experts: list[int]):
    """The layer with experts that can never be chosen, which is what dropping them must equal."""
    allowed = copy.deepcopy(layer)
    allowed.expert_bias = torch.zeros(allowed.router.out_features)
    allowed.expert_bias[experts] = -torch.inf
    return allowed


@pytest.mark.parametrize("options", [dict(), dict(num_null_experts=2, num_identity_experts=1, balanced=True)])
def test_dropping_equals_never_choosing(options):
    layer = MoEFeedForward(8, 4, 6, 2, router_bias=True, **options)
    counts = {"": torch.tensor([[3, 9, 0, 9, 1, 5], [0, 0, 1, 0, 0, 0]])}
    pruned = prune_experts(layer, counts, 3)
    assert pruned.num_experts == 3 and layer.num_experts == 6  # kept: 1, 3, 5
    x = torch.randn(40, 8)
    masked = layer_without(layer, [0, 2, 4])
    eager, actual = masked(x).detach(), pruned(x).detach()
    assert_close_to_reference(actual, masked.double()(x.double()).detach(), eager)
    other = MoEFeedForward(8, 4, 3, 2, router_bias=True, **options)
    other.load_state_dict(pruned.state_dict())
    assert torch.equal(other(x), pruned(x))
    pruned(x).sum().backward()
    assert pruned.gate_up_proj.grad is not None


def test_the_lowest_expert_stays_among_equals():
    layer = MoEFeedForward(8, 4, 4, 1)
    pruned = prune_experts(layer, {"": torch.ones(4)}, 2)
    assert torch.equal(pruned.down_proj, layer.down_proj[:2])


@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize("merge", [False, True])
def test_transformers_models_load_again(model_type, merge, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = mixture(model_type)
    input_ids = torch.randint(0, 40, (2, 11))
    with ModuleStatistics(model) as statistics, torch.no_grad():
        before = model(input_ids).logits
    pruned = prune_experts(model, statistics.counts, 4, merge=merge)
    with torch.no_grad():
        actual = pruned(input_ids, output_router_logits=True)
        assert torch.equal(model(input_ids).logits, before)  # untouched
    assert actual.router_logits[0].shape[-1] == 4 and actual.aux_loss.isfinite()
    pruned.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, actual.logits)


def test_keeping_all_experts_changes_nothing():
    model = mixture("mixtral")
    counts = {f"model.layers.{layer}.mlp.experts": torch.ones(6) for layer in range(2)}
    input_ids = torch.randint(0, 40, (1, 5))
    with torch.no_grad():
        assert torch.equal(prune_experts(model, counts, 6)(input_ids).logits, model(input_ids).logits)


def test_merging_by_hand():
    layer = MoEFeedForward(8, 4, 4, 1)
    counts = {"": torch.tensor([3, 1, 0, 0])}
    merged = merge_experts(layer, [[0, 1], [2, 3]], counts=counts, align=False)
    for name in ("gate_up_proj", "down_proj"):
        old, new = getattr(layer, name).detach(), getattr(merged, name).detach()
        expected = torch.stack([old[0] * 0.75 + old[1] * 0.25, (old[2] + old[3]) / 2])
        double = old.double()
        expected64 = torch.stack([double[0] * 0.75 + double[1] * 0.25, (double[2] + double[3]) / 2])
        assert_close_to_reference(new, expected64, expected)
    assert merged.router.weight.shape == (2, 8)


def test_dropped_experts_join_the_nearest_router_row():
    layer = MoEFeedForward(4, 3, 4, 1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [2, 0.1, 0, 0], [0, 3, 0.1, 0]]))
    counts = {"": torch.tensor([4, 4, 1, 1])}
    merged = prune_experts(layer, counts, 2, merge=True, align=False)
    expected = merge_experts(layer, [[0, 2], [1, 3]], counts=counts, align=False)
    assert torch.equal(merged.down_proj, expected.down_proj) and torch.equal(
        merged.router.weight, expected.router.weight
    )


def test_experts_that_differ_by_the_order_of_their_neurons_merge_without_loss():
    layer = MoEFeedForward(8, 16, 2, 1)
    order = torch.randperm(16)
    with torch.no_grad():
        gate, up = layer.gate_up_proj[0].chunk(2)
        layer.gate_up_proj[1] = torch.cat([gate[order], up[order]])
        layer.down_proj[1] = layer.down_proj[0][:, order]
    x = torch.randn(10, 8)
    merged = merge_experts(layer, [[0, 1]])
    assert torch.equal(merged.gate_up_proj[0], layer.gate_up_proj[0])
    assert torch.equal(merged.down_proj[0], layer.down_proj[0])
    unmatched = merge_experts(layer, [[0, 1]], align=False)
    eager, expected = layer(x).detach(), copy.deepcopy(layer).double()(x.double()).detach()
    assert_close_to_reference(merged(x).detach(), expected, eager)
    with pytest.raises(AssertionError, match="is allowed"):
        assert_close_to_reference(unmatched(x).detach(), expected, eager)


# one neuron, few enough to try every order
@pytest.mark.parametrize("num_neurons", [1, 2, 6])
def test_matching_is_the_best_of_all_orders(num_neurons):
    for _ in range(5):
        leader, member = torch.randn(2, num_neurons, 3, dtype=torch.float64)
        order = match_neurons(leader, member)
        assert sorted(order.tolist()) == list(range(num_neurons))
        best = max((leader * member[list(p)]).sum().item() for p in itertools.permutations(range(num_neurons)))
        found = (leader * member[order]).sum()
        assert_close_to_reference(found.reshape(1), torch.tensor([best], dtype=torch.float64), found.reshape(1))


def test_refusals_name_what_is_wrong():
    layer = MoEFeedForward(8, 4, 4, 2)
    counts = {"": torch.ones(4)}
    for call, message in [
        (lambda: prune_experts(layer, counts, 1), r"num_experts must be in \[top_k=2, num_experts=4\], got 1"),
        (lambda: prune_experts(layer, counts, 5), r"num_experts must be in \[top_k=2, num_experts=4\], got 5"),
        (lambda: prune_experts(layer, {}, 2), "counts must be with an entry for layer ''"),
        (lambda: prune_experts(layer, {"": torch.ones(3)}, 2), r"counts must be of shape \[num_experts=4\], got \[3\]"),
        (lambda: merge_experts(layer, [[0, 1], [2]]), "groups must be a partition of the 4 experts"),
        (lambda: merge_experts(layer, [[0, 1, 2, 3], []]), "groups must be a partition of the 4 experts"),
        (lambda: merge_experts(layer, [[0, 1, 2, 3]]), r"num_experts must be in \[top_k=2, num_experts=4\], got 1"),
        (lambda: prune_experts(torch.nn.Linear(2, 2), counts, 2), "model must be one with MoEFeedForward layers or"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    model = mixture("mixtral")
    groups = {f"model.layers.{i}.mlp.experts": [[0, 1], [2, 3], [4, 5]] for i in range(2)}
    groups["model.layers.1.mlp.experts"] = [[0, 1, 2, 3], [4, 5]]
    with pytest.raises(ValueError, match="the number of experts must be the same in every layer"):
        merge_experts(model, groups)
