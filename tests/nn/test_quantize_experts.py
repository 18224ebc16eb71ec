"""Layers whose experts are quantised: forward, backward, state_dict."""

import pytest
import torch
from torch import nn

from moe_kernels import Activation, QuantizedWeights
from moe_kernels.nn import MoEFeedForward, QuantizedExperts, quantize_experts
from moe_kernels.testing import assert_close_to_reference


def layer_of(**options) -> MoEFeedForward:
    return MoEFeedForward(64, 32, 4, 2, **options)


def with_weights(
    layer: MoEFeedForward, gate_up: QuantizedWeights, down: QuantizedWeights, dtype: torch.dtype
) -> nn.Module:
    """The layer before it was quantised, with the dequantised weights."""
    layer = layer.to(dtype)
    layer.gate_up_proj.data, layer.down_proj.data = gate_up.dequantize(dtype), down.dequantize(dtype)
    return layer


@pytest.mark.parametrize("activation", [Activation(), Activation("relu2", gated=False)], ids=["gated", "ungated"])
@pytest.mark.parametrize("format", ["int8", "int4", "mxfp4"])
def test_forward_and_backward(format, activation):
    torch.manual_seed(0)
    layer, plain = (layer_of(activation=activation, shared_intermediate_size=16) for _ in range(2))
    plain.load_state_dict(layer.state_dict())
    assert quantize_experts(nn.Sequential(layer), format) == ["0"]
    assert quantize_experts(nn.Sequential(layer), format) == []
    assert layer.num_experts == 4 and layer.hidden_size == 64 and "hidden_size=64" in repr(layer)
    x, grad_out = torch.randn(9, 64), torch.randn(9, 64)

    def run(module, dtype):
        leaf = x.to(dtype).requires_grad_()
        out = module(leaf)
        return [out.detach(), *torch.autograd.grad(out, (leaf, module.router.weight), grad_out.to(dtype))]

    quantized = run(layer, torch.float32)
    eager = run(with_weights(plain, layer.gate_up_proj(), layer.down_proj(), torch.float32), torch.float32)
    reference64 = run(with_weights(plain, layer.gate_up_proj(), layer.down_proj(), torch.float64), torch.float64)
    for results in zip(quantized, reference64, eager, strict=True):
        assert_close_to_reference(*results)


def test_state_dict():
    layer, other = layer_of(), layer_of()
    quantize_experts(layer, "int8", group_size=32)
    quantize_experts(other, "fp8")
    state = layer.state_dict()
    assert {"gate_up_proj.data", "down_proj.data", "router.weight"} == set(state)
    again = layer_of()
    quantize_experts(again, "int8", group_size=32)
    again.load_state_dict(state)
    x = torch.randn(5, 64)
    assert torch.equal(again(x), layer(x))
    with pytest.raises(RuntimeError, match="size mismatch for gate_up_proj.data"):
        other.load_state_dict(state)
    state["down_proj.data"] = torch.zeros_like(state["down_proj.data"])
    with pytest.raises((ValueError, RuntimeError), match="data must be of layout version 1, got other bytes"):
        again.load_state_dict(state)


def test_moves_like_a_module():
    layer = layer_of()
    quantize_experts(layer)
    assert isinstance(layer.to(torch.bfloat16).gate_up_proj, QuantizedExperts)
    assert layer(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert "format=int8" in repr(layer)


def test_a_layer_that_does_not_fit_stays_whole():
    layer = MoEFeedForward(64, 40, 4, 2)  # groups of 32 divide what gate_up_proj takes, not what down_proj does
    x = torch.randn(3, 64)
    before = layer(x)
    with pytest.raises(ValueError, match="group_size must be a divisor of in=40, got 32"):
        quantize_experts(layer, "int4")
    assert torch.equal(layer(x), before) and isinstance(layer.gate_up_proj, nn.Parameter)
