"""MixLoRAFeedForward against experts whose weights are written out."""

import pytest
import torch
from torch import nn

from moe_kernels.nn import MixLoRAFeedForward
from moe_kernels.testing import assert_close_to_reference

HIDDEN, INTERMEDIATE, NUM, TOP_K = 12, 20, 4, 2


def layer(dtype: torch.dtype = torch.float32) -> MixLoRAFeedForward:
    sizes = ((HIDDEN, INTERMEDIATE), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN))
    return MixLoRAFeedForward(*(nn.Linear(*size, bias=False).to(dtype) for size in sizes), NUM, TOP_K, rank=3)


def written_out(ffn: MixLoRAFeedForward, x: torch.Tensor, cast) -> torch.Tensor:
    """Every expert's own three matrices on every token; experts outside the top k weigh nothing."""
    scores = (cast(x) @ cast(ffn.router.weight).T).softmax(1)
    top = scores.topk(TOP_K, dim=1)
    weights = torch.zeros_like(scores).scatter(1, top.indices, top.values)
    weights = weights / weights.sum(1, keepdim=True)
    out = torch.zeros(len(x), HIDDEN, dtype=weights.dtype)
    for e in range(NUM):
        w1, w3, w2 = (
            cast(base.weight) + ffn.scaling * cast(ffn.lora_b(name)[e]) @ cast(ffn.lora_a[name][e])
            for name, base in (("gate", ffn.gate_proj), ("up", ffn.up_proj), ("down", ffn.down_proj))
        )
        out += weights[:, e, None] * ((nn.functional.silu(cast(x) @ w1.T) * (cast(x) @ w3.T)) @ w2.T)
    return out


def test_equals_experts_written_out():
    ffn, x = layer(), torch.randn(9, HIDDEN)
    for rows in ffn.lora_b_rows.values():
        nn.init.normal_(rows)
    with torch.no_grad():
        out = ffn(x.reshape(3, 3, HIDDEN)).reshape(9, HIDDEN)
        assert_close_to_reference(
            out, written_out(ffn, x, torch.Tensor.double), written_out(ffn, x, torch.Tensor.float)
        )


def test_gradients_equal_those_of_experts_written_out():
    ffn, x = layer(), torch.randn(9, HIDDEN)
    for rows in ffn.lora_b_rows.values():
        nn.init.normal_(rows)
    parameters = dict(ffn.named_parameters())
    results = []
    for call in (
        lambda: ffn(x),
        lambda: written_out(ffn, x, torch.Tensor.double),
        lambda: written_out(ffn, x, torch.Tensor.float),
    ):
        out = call()
        results.append(torch.autograd.grad(out.square().sum(), list(parameters.values())))
    # the double graph ends in float32 parameters: its gradients are rounded there once
    for name, actual, expected, eager in zip(parameters, *results, strict=True):
        assert_close_to_reference(actual, expected.double(), eager, name)


def test_new_experts_are_the_dense_layer_and_the_state_comes_back():
    ffn, x = layer(), torch.randn(5, HIDDEN)
    with torch.no_grad():
        assert_close_to_reference(
            ffn(x), written_out(ffn, x, torch.Tensor.double), written_out(ffn, x, torch.Tensor.float)
        )
        other = layer()
        other.load_state_dict(ffn.state_dict())
        assert torch.equal(other(x), ffn(x))


def test_bias_is_refused():
    linear = nn.Linear(HIDDEN, HIDDEN, bias=True)
    with pytest.raises(ValueError, match="MixLoRAFeedForward: gate_proj must be a Linear without bias"):
        MixLoRAFeedForward(linear, linear, linear, 2)
