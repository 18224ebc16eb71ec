"""Adapters of experts: forward and gradients against experts with the adapters added; quantised experts; refusals."""

import copy

import pytest
import torch
from torch import Tensor, nn

from moe_kernels import Activation
from moe_kernels.nn import MoEFeedForward, add_expert_lora, quantize_experts
from moe_kernels.testing import assert_close_to_reference

SCALING = 0.5


def layer_of(seed: int = 0, **options) -> MoEFeedForward:
    torch.manual_seed(seed)
    return MoEFeedForward(32, 16, 4, 2, **options)


def with_adapters(**options) -> MoEFeedForward:
    """Trained for a while: no factor is zero."""
    layer = layer_of(**options)
    assert add_expert_lora(nn.Sequential(layer), 3, scaling=SCALING) == ["0"]
    for factor in layer.expert_lora.parameters():
        nn.init.normal_(factor, std=0.3)
    return layer


def run(layer, dtype: torch.dtype, x: Tensor, forced: Tensor | None = None) -> dict[str, Tensor]:
    layer = copy.deepcopy(layer).to(dtype)
    leaf = x.detach().to(dtype, copy=True).requires_grad_()
    out = layer(leaf, forced)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out))
    return {"out": out.detach(), "x": leaf.grad} | {
        name: weight.grad for name, weight in layer.named_parameters() if weight.grad is not None
    }


class Added(nn.Module):
    """The same, each expert's weight with its adapter added, in plain PyTorch."""

    def __init__(self, layer: MoEFeedForward):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, forced: Tensor | None) -> Tensor:
        layer, lora = self.layer, self.layer.expert_lora
        gate_up, down = (
            weight + SCALING * b_rows.transpose(1, 2) @ a
            for weight, a, b_rows in (
                (layer.gate_up_proj, lora.gate_up_a, lora.gate_up_b_rows),
                (layer.down_proj, lora.down_a, lora.down_b_rows),
            )
        )
        logits = layer.router(x)
        if forced is None:
            weights, ids = logits.softmax(1).topk(layer.top_k)
        else:
            ids, weights = forced, logits.softmax(1).gather(1, forced)
        weights = weights / weights.sum(1, keepdim=True)
        out = 0
        for k in range(ids.shape[1]):
            h = torch.einsum("toi,ti->to", gate_up[ids[:, k]], x)
            act = layer.activation(*h.chunk(2, 1)) if layer.activation.gated else layer.activation(h)
            out = out + weights[:, k : k + 1] * torch.einsum("toi,ti->to", down[ids[:, k]], act)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [Activation(), Activation("relu2", gated=False)], ids=["gated", "ungated"])
@pytest.mark.parametrize("num_tokens, forced", [(9, None), (1, None), (5, [2, 3]), (0, None)], ids=str)
def test_equals_experts_with_the_adapters_added(num_tokens, forced, activation, dtype):
    # where an expert is close to another one, two dtypes may choose otherwise: they are told what to choose
    x = torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(1))
    ids = with_adapters(activation=activation)(x, return_routed=True)[1].topk_ids.long()
    forced = ids if forced is None else torch.tensor(forced).expand(num_tokens, -1)
    actual = run(with_adapters(activation=activation), dtype, x, forced)
    eager = run(Added(with_adapters(activation=activation)), dtype, x, forced)
    expected = run(Added(with_adapters(activation=activation)), torch.float64, x, forced)
    assert {"expert_lora.gate_up_a", "expert_lora.down_b_rows", "router.weight"} <= actual.keys()
    assert not {"gate_up_proj", "down_proj"} & actual.keys()  # frozen
    for name, value in actual.items():
        also = name if name in ("out", "x") else f"layer.{name}"
        assert_close_to_reference(value, expected[also], eager[also], name)


def test_new_adapters_change_nothing():
    layer, x = layer_of(), torch.randn(7, 32)
    before = layer(x)
    names = set(layer.state_dict())
    add_expert_lora(layer, 2)
    assert_close_to_reference(layer(x), before, before)
    assert set(layer.state_dict()) - names == {
        f"expert_lora.{name}" for name in ("gate_up_a", "gate_up_b_rows", "down_a", "down_b_rows")
    }


def test_quantised_experts():
    layer = with_adapters()
    quantize_experts(layer, "int8")
    x = torch.randn(7, 32)
    plain = with_adapters()
    with torch.no_grad():
        plain.gate_up_proj.copy_(layer.gate_up_proj().dequantize())
        plain.down_proj.copy_(layer.down_proj().dequantize())
    ids = plain(x, return_routed=True)[1].topk_ids.long()
    actual, eager = run(layer, torch.float32, x, ids), run(plain, torch.float32, x, ids)
    expected = run(plain, torch.float64, x, ids)
    for name, value in actual.items():
        assert_close_to_reference(value, expected[name], eager[name], name)


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_state_dict_of_quantised_experts(format):
    layer, other = with_adapters(), layer_of(seed=3)
    quantize_experts(layer, format)
    add_expert_lora(other, 3, scaling=SCALING)
    quantize_experts(other, format)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 32)
    assert torch.equal(layer(x), other(x))


def test_refusals():
    with pytest.raises(ValueError, match="add_expert_lora: rank must be at least 1, got 0"):
        add_expert_lora(layer_of(), 0)
    with pytest.raises(ValueError, match="add_expert_lora: experts of '' must be without adapters, got experts with"):
        add_expert_lora(with_adapters(), 2)
    quantised = layer_of()
    quantize_experts(quantised)
    with pytest.raises(
        ValueError, match="experts of '' must be plain, got quantised for the fused kernels; add adapters"
    ):
        add_expert_lora(quantised, 2)
