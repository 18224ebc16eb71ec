"""MoEFeedForward: what it computes, what it trains, what it refuses."""

import pytest
import torch

from moe_kernels import Activation, route
from moe_kernels.nn import MoEFeedForward
from moe_kernels.testing import assert_close_to_reference


def _by_hand(module: MoEFeedForward, x: torch.Tensor) -> torch.Tensor:
    """The module's equation, one token at a time."""
    logits = module.router(x)
    ids, weights = route(logits, module.top_k, renormalize=module.renormalize, backend="reference")
    rows = []
    for token, experts, chosen_weights in zip(x, ids.tolist(), weights, strict=True):
        row = torch.zeros_like(token)
        for expert, weight in zip(experts, chosen_weights, strict=True):
            h = module.gate_up_proj[expert] @ token
            a = module.activation(*h.chunk(2)) if module.activation.gated else module.activation(h)
            row = row + module.down_proj[expert] @ a * (weight.to(x.dtype) if module.weighted else 1)
        rows.append(row)
    return torch.stack(rows)


# no expert, one, some, all; sizes that are no multiple of a vector
@pytest.mark.parametrize("top_k", [0, 1, 3, 5])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("activation", [Activation(), Activation(kind="relu2", gated=False)], ids=["silu", "ungated"])
def test_forward(top_k, weighted, activation):
    module = MoEFeedForward(19, 13, 5, top_k, activation=activation, weighted=weighted, router_bias=True)
    x = torch.randn(11, 19)
    eager = _by_hand(module, x)
    actual = module(x)
    expected = _by_hand(module.double(), x.double())
    assert_close_to_reference(actual, expected, eager)


@pytest.mark.parametrize("shape", [(0, 8), (8,), (2, 3, 8)])
def test_any_leading_shape(shape):
    module = MoEFeedForward(8, 4, 3, 2)
    x = torch.randn(shape)
    out = module(x)
    assert out.shape == x.shape
    assert torch.equal(out.reshape(-1, 8), module(x.reshape(-1, 8)))


def test_every_parameter_gets_its_gradient():
    def gradients(module, forward, x):
        module.zero_grad()
        forward(module, x).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}

    module = MoEFeedForward(16, 8, 4, 2)
    x = torch.randn(9, 16)
    actual = gradients(module, MoEFeedForward.forward, x)
    eager = gradients(module, _by_hand, x)
    expected = gradients(module.double(), _by_hand, x.double())
    for name, grad in actual.items():
        assert_close_to_reference(grad, expected[name], eager[name], name)


def test_state_dict_round_trip():
    source = MoEFeedForward(8, 4, 3, 2, router_bias=True)
    target = MoEFeedForward(8, 4, 3, 2, router_bias=True)
    assert set(source.state_dict()) == {"gate_up_proj", "down_proj", "router.weight", "router.bias"}
    target.load_state_dict(source.state_dict())
    x = torch.randn(5, 8)
    assert torch.equal(source(x), target(x))


def test_refusals_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"MoEFeedForward: top_k must be in \[0, num_experts=3\], got 4"):
        MoEFeedForward(8, 4, 3, 4)
    with pytest.raises(ValueError, match=r"hidden_states must be of shape \[..., hidden_size=8\], got \[5, 7\]"):
        MoEFeedForward(8, 4, 3, 2)(torch.randn(5, 7))
