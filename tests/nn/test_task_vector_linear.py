"""TaskVectorLinear: the op with a layer's weight, and its state dict."""

import pytest
import torch
from torch import nn

from moe_kernels import TernaryDelta, ternary_linear
from moe_kernels.nn import TaskVectorLinear


def make(bias: bool = True) -> tuple[nn.Linear, list[TernaryDelta]]:
    linear = nn.Linear(70, 9, bias=bias)
    signs = [torch.randint(-1, 2, (9, 70)) for _ in range(3)]
    return linear, [TernaryDelta.from_signs(one, 0.1 + i) for i, one in enumerate(signs)]


@pytest.mark.parametrize("bias", [True, False])
def test_is_the_op(bias):
    linear, deltas = make(bias)
    layer = TaskVectorLinear.from_linear(linear, deltas, coefficients=[1.0, 2.0, -1.0])
    x, ids, weights = torch.randn(2, 2, 70), torch.tensor([[0, 2], [-1, 1], [2, 2], [-1, -1]]), torch.rand(4, 2)
    options = dict(bias=linear.bias, coefficients=[1.0, 2.0, -1.0])
    expected = ternary_linear(x, linear.weight, deltas, ids, weights, **options)
    assert torch.equal(layer(x, ids, weights), expected)
    layer.set_deltas(ids, weights)
    assert torch.equal(layer(x), expected)
    layer.set_deltas(None)
    assert torch.equal(layer(x), ternary_linear(x, linear.weight, deltas, **options))
    assert layer.weight is linear.weight


def test_state_dict_round_trip():
    layer, other = (TaskVectorLinear(*make()) for _ in range(2))
    other.scales.zero_()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 70)
    assert torch.equal(layer(x), other(x))
    assert [one.scale for one in other.deltas] == [0.1, 1.1, 2.1]


def test_gradients_and_dtypes():
    layer = TaskVectorLinear(*make())
    layer(torch.randn(4, 70)).sum().backward()
    assert layer.weight.grad.any() and layer.bias.grad.any()
    low = layer.bfloat16()
    assert low(torch.randn(4, 70).bfloat16()).dtype == torch.bfloat16
    assert low.scales.dtype == torch.float64 and low.planes_0.dtype == torch.int64


def test_compiles():
    layer = TaskVectorLinear(*make())
    x, ids = torch.randn(4, 70), torch.tensor([0, 1, -1, 2])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, ids), layer(x, ids))


def test_bad_input():
    linear, deltas = make()
    with pytest.raises(TypeError, match="linear must be an nn.Linear, got Identity"):
        TaskVectorLinear(nn.Identity(), deltas)
    with pytest.raises(ValueError, match=r"deltas must be of shape \[8, 70\], got \[9, 70\]"):
        TaskVectorLinear(nn.Linear(70, 8), deltas)
