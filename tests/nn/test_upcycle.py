"""upcycle: the result computes what the dense model does, from one, from several, and loads again."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_kernels.nn import MoEFeedForward, upcycle
from moe_kernels.testing import assert_close_to_reference

DENSE = ["llama", "llama_tied", "mistral", "qwen3"]


class GatedMLP(nn.Module):
    def __init__(self, act_fn=F.silu, intermediate_size=10):
        super().__init__()
        self.gate_proj = nn.Linear(8, intermediate_size, bias=False)
        self.up_proj = nn.Linear(8, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, 8, bias=False)
        self.act_fn = act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def dense_model(name: str, seed: int = 0, **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    if name == "llama_tied":
        sizes |= dict(tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1234.0})
    config = transformers.AutoConfig.for_model(name.removesuffix("_tied"), **(sizes | options))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", DENSE)
def test_one_model_is_computed_exactly(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    dense = dense_model(name)
    mixture = upcycle(dense, 4, 2)
    input_ids = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        actual, eager = mixture(input_ids).logits, dense(input_ids).logits
        expected = copy.deepcopy(dense).double()(input_ids).logits
    assert_close_to_reference(actual, expected, eager)

    mixture.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(mixture)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, actual)


def test_several_models():
    first, second = dense_model("llama", 0), dense_model("llama", 1)
    mixture = upcycle([first, second], 4, 2)
    state, states = mixture.state_dict(), [first.state_dict(), second.state_dict()]
    gate_up = state["model.layers.1.mlp.experts.gate_up_proj"]
    for expert in range(4):
        own = states[expert % 2]
        parts = [own[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        assert torch.equal(gate_up[expert], torch.cat(parts))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(state[name], ((states[0][name].double() + states[1][name].double()) / 2).float())
    first_only = upcycle([first, second], 4, 2, rest="first").state_dict()
    assert torch.equal(first_only[name], states[0][name])


def test_router_is_drawn_by_its_seed():
    dense = dense_model("llama")
    name = "model.layers.0.mlp.gate.weight"
    routers = [upcycle(dense, 64, 2, seed=seed, router_std=0.5).state_dict()[name] for seed in (0, 0, 1)]
    assert torch.equal(routers[0], routers[1]) and not torch.equal(routers[0], routers[2])
    assert 0.4 < routers[0].std() < 0.6


@pytest.mark.parametrize("act_fn", [F.silu, F.gelu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_layers(act_fn, dtype):
    mlps = [GatedMLP(act_fn).to(dtype) for _ in range(2)]
    layer = upcycle(mlps, 4, 4)
    assert isinstance(layer, MoEFeedForward)
    x = torch.randn(5, 8).to(dtype)
    weights = (x @ layer.router.weight.T).double().softmax(1)

    def by_hand(mlps, x):
        outs = [mlps[expert % 2](x) * weights[:, expert, None].to(x.dtype) for expert in range(4)]
        return sum(outs)

    expected = by_hand([copy.deepcopy(mlp).double() for mlp in mlps], x.double())
    assert_close_to_reference(layer(x).detach(), expected.detach(), by_hand(mlps, x).detach())
    one = upcycle(mlps[0], 3, 2)
    assert_close_to_reference(
        one(x).detach(), copy.deepcopy(mlps[0]).double()(x.double()).detach(), mlps[0](x).detach()
    )


def test_refusals_name_what_is_wrong():
    mlp = GatedMLP()
    for call, message in [
        (lambda: upcycle([mlp, mlp], 3, 1), "num_experts must be a multiple of the number of models, 2, got 3"),
        (lambda: upcycle(mlp, 4, 5), r"top_k must be in \[1, num_experts=4\], got 5"),
        (lambda: upcycle([], 4, 1), "models must be at least one, got 0"),
        (lambda: upcycle(mlp, 4, 1, rest="last"), "rest must be one of average, first, got 'last'"),
        (lambda: upcycle(nn.Linear(2, 2), 4, 1), "upcycle: mlp.gate_proj must be an nn.Linear, got NoneType"),
        (lambda: upcycle([mlp, GatedMLP(intermediate_size=12)], 2, 1), "gate_proj must be of shape"),
        (lambda: upcycle([mlp, GatedMLP(F.gelu)], 2, 1), "act_fn must be silu in every layer"),
        (lambda: upcycle(dense_model("llama", mlp_bias=True), 2, 1), "config.mlp_bias must be False"),
        (lambda: upcycle(dense_model("gemma"), 2, 1), "models must be a transformers llama, mistral, qwen3, got gemma"),
        (lambda: upcycle(dense_model("llama").model, 2, 1), "models must be with a language model's head"),
        (lambda: upcycle([dense_model("llama"), dense_model("llama", vocab_size=41)], 2, 1), "of one architecture"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_layer_of_transformers_is_a_layer():
    mlp = dense_model("llama").model.layers[0].mlp
    assert isinstance(upcycle(mlp, 4, 2), MoEFeedForward)
