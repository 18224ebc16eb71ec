"""split_dense: exact with all experts, the best experts with fewer, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_kernels.nn import split_dense, upcycle
from moe_kernels.nn.split import expert_output_lengths, fit_router, group_neurons, recognize_activation
from moe_kernels.testing import assert_close_to_reference

HIDDEN_SIZE, NUM_NEURONS, NUM_EXPERTS = 24, 48, 6


class GatedMLP(nn.Module):
    """The shape of transformers' LlamaMLP, with neurons of very different importance."""

    def __init__(self, act_fn=F.silu, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN_SIZE, NUM_NEURONS, bias=bias)
        self.up_proj = nn.Linear(HIDDEN_SIZE, NUM_NEURONS, bias=bias)
        self.down_proj = nn.Linear(NUM_NEURONS, HIDDEN_SIZE, bias=bias)
        self.act_fn = act_fn
        with torch.no_grad():
            self.down_proj.weight.mul_(torch.logspace(-2, 0, NUM_NEURONS)[torch.randperm(NUM_NEURONS)])

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.fixture
def mlp():
    return GatedMLP().requires_grad_(False)


@pytest.fixture
def calibration():
    return torch.randn(200, HIDDEN_SIZE)


# one expert (the dense layer itself), some, one neuron each
@pytest.mark.parametrize("num_experts", [1, NUM_EXPERTS, NUM_NEURONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_experts_are_the_dense_layer(mlp, calibration, num_experts, dtype):
    x = torch.randn(4, 7, HIDDEN_SIZE).to(dtype)
    mlp = mlp.to(dtype)
    split = split_dense(mlp, num_experts, num_experts, calibration)
    assert_close_to_reference(split(x), copy.deepcopy(mlp).double()(x.double()), mlp(x))


# a layer in training mode counts its experts' tokens: one layer of a model in eval mode must not begin to
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_the_dense_layers(mlp, calibration, training):
    mlp.train(training)
    for layer in (split_dense(mlp, NUM_EXPERTS, 2, calibration), upcycle(mlp, NUM_EXPERTS, 2)):
        assert {module.training for module in layer.modules()} == {training}


def test_every_neuron_belongs_to_one_expert():
    neurons = group_neurons(torch.randn(50, NUM_NEURONS), torch.randn(HIDDEN_SIZE, NUM_NEURONS), NUM_EXPERTS)
    assert neurons.shape == (NUM_EXPERTS, NUM_NEURONS // NUM_EXPERTS)
    assert neurons.flatten().sort().values.tolist() == list(range(NUM_NEURONS))


def test_important_neurons_come_first():
    importance = torch.arange(NUM_NEURONS, 0, -1).float()
    shuffle = torch.randperm(NUM_NEURONS)
    neurons = group_neurons(importance[shuffle].expand(5, -1), torch.ones(HIDDEN_SIZE, NUM_NEURONS), NUM_EXPERTS)
    expected = torch.arange(NUM_NEURONS).view(NUM_EXPERTS, -1)
    assert torch.equal(shuffle[neurons].sort(1).values, expected)


def test_router_recovers_a_linear_rule(calibration):
    weight, bias = torch.randn(NUM_EXPERTS, HIDDEN_SIZE) / HIDDEN_SIZE, torch.randn(NUM_EXPERTS)
    tokens = calibration.double()
    lengths = (tokens @ weight.double().T + bias).exp()
    found_weight, found_bias = fit_router(tokens, lengths, ridge=0.0)
    eager = torch.linalg.lstsq(torch.cat([tokens, torch.ones(200, 1)], 1).float(), lengths.log().float()).solution
    assert_close_to_reference(found_weight.float(), weight.double(), eager[:-1].T, "weight")
    assert_close_to_reference(found_bias.float(), bias.double(), eager[-1], "bias")


def test_router_chooses_better_than_the_reverse(mlp, calibration):
    split = split_dense(mlp, NUM_EXPERTS, NUM_EXPERTS // 2, calibration)
    x = torch.randn(100, HIDDEN_SIZE)
    error = (split(x) - mlp(x)).norm()
    split.router.weight.data.neg_()
    split.router.bias.data.neg_()
    assert error < (split(x) - mlp(x)).norm()


def test_fewer_experts_cost_more(mlp, calibration):
    split = split_dense(mlp, NUM_EXPERTS, NUM_EXPERTS, calibration)
    errors = []
    for top_k in range(NUM_EXPERTS, 0, -1):
        split.top_k = top_k
        errors.append((split(calibration) - mlp(calibration)).norm().item())
    assert errors == sorted(errors)


def test_chosen_experts_have_weight_one(mlp, calibration):
    split = split_dense(mlp, NUM_EXPERTS, 1, calibration)
    x = torch.randn(20, HIDDEN_SIZE)
    activations = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    neurons = group_neurons(
        F.silu(mlp.gate_proj(calibration)) * mlp.up_proj(calibration), mlp.down_proj.weight, NUM_EXPERTS
    )
    lengths = expert_output_lengths(activations, mlp.down_proj.weight, neurons)
    chosen = lengths.gather(1, split.router(x).argmax(1, keepdim=True))[:, 0]
    lengths64 = expert_output_lengths(activations.double(), mlp.down_proj.weight.double(), neurons)
    expected = lengths64.gather(1, split.router(x).argmax(1, keepdim=True))[:, 0]
    assert_close_to_reference(split(x).norm(dim=1), expected.double(), chosen)


def test_deterministic_and_independent_of_the_source(mlp, calibration):
    before = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    first, second = (split_dense(mlp, NUM_EXPERTS, 2, calibration) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    for parameter in first.parameters():
        parameter.data.zero_()
    for name, tensor in mlp.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_saves_and_loads(mlp, calibration, tmp_path):
    source = split_dense(mlp, NUM_EXPERTS, 2, calibration)
    torch.save(source.state_dict(), tmp_path / "split.pt")
    target = split_dense(GatedMLP().requires_grad_(False), NUM_EXPERTS, 2, calibration)
    target.load_state_dict(torch.load(tmp_path / "split.pt"))
    x = torch.randn(5, HIDDEN_SIZE)
    assert torch.equal(source(x), target(x))


def test_a_layer_of_transformers():
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = transformers.LlamaConfig(hidden_size=HIDDEN_SIZE, intermediate_size=NUM_NEURONS, num_attention_heads=2)
    mlp = modeling.LlamaMLP(config).requires_grad_(False)
    x = torch.randn(30, HIDDEN_SIZE)
    split = split_dense(mlp, NUM_EXPERTS, NUM_EXPERTS, torch.randn(100, HIDDEN_SIZE))
    assert_close_to_reference(split(x), copy.deepcopy(mlp).double()(x.double()), mlp(x))


def test_recognizes_activations():
    assert recognize_activation(nn.SiLU()).kind == "silu"
    assert recognize_activation(nn.GELU()).kind == "gelu"
    assert recognize_activation(nn.GELU(approximate="tanh")).kind == "gelu_tanh"
    assert recognize_activation(torch.relu).kind == "relu"
    with pytest.raises(ValueError, match="mlp.act_fn must be one of silu, .*, got Mish"):
        recognize_activation(nn.Mish())


def test_refusals_name_what_is_wrong(mlp, calibration):
    with pytest.raises(ValueError, match="num_experts must be a divisor of the layer's 48 neurons, got 7"):
        split_dense(mlp, 7, 2, calibration)
    with pytest.raises(ValueError, match=r"top_k must be in \[0, num_experts=6\], got 7"):
        split_dense(mlp, 6, 7, calibration)
    with pytest.raises(ValueError, match=r"calibration must be of shape \[num_tokens > 24, hidden_size=24\], got \[24"):
        split_dense(mlp, 6, 2, calibration[:24])
    with pytest.raises(ValueError, match="mlp.gate_proj must be without bias"):
        split_dense(GatedMLP(bias=True), 6, 2, calibration)
    with pytest.raises(ValueError, match="mlp.gate_proj must be an nn.Linear, got NoneType"):
        split_dense(nn.Linear(2, 2), 6, 2, calibration)
