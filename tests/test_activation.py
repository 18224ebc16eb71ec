"""Activation: the formula, its named forms, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F

from moe_kernels import Activation

X = torch.linspace(-30, 30, 601, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("relu", F.relu),
        ("relu2", lambda x: F.relu(x) ** 2),
    ],
)
def test_kinds(kind, function):
    assert torch.equal(Activation(kind, gated=False)(X), function(X))
    assert torch.equal(Activation(kind)(X, X.flip(0)), function(X) * X.flip(0))


def test_gpt_oss():
    up = X.flip(0)
    gate, clamped_up = X.clamp(max=7), up.clamp(-7, 7)
    assert torch.equal(Activation.gpt_oss()(X, up), gate * torch.sigmoid(gate * 1.702) * (clamped_up + 1))


def test_clamps_before_and_after():
    up = X.flip(0)
    assert torch.equal(Activation.clamped_swiglu(2)(X, up), F.silu(X.clamp(max=2)) * up.clamp(-2, 2))
    assert torch.equal(Activation.swiglu_step(2)(X, up), F.silu(X).clamp(max=2) * up.clamp(-2, 2))


def test_equal_activations_are_equal():
    assert Activation() == Activation("silu") and hash(Activation()) == hash(Activation("silu"))
    assert Activation.gpt_oss() != Activation.gpt_oss(limit=6.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kind="swish"), "kind must be one of silu, gelu, gelu_tanh, relu, relu2, got 'swish'"),
        (dict(clamp="both"), "clamp must be 'input' or 'output', got 'both'"),
        (dict(limit=-1.0), "limit must be positive, got -1.0"),
        (dict(limit=math.nan), "limit must be positive, got nan"),
        (dict(kind="gelu", alpha=1.702), "alpha must be finite, and 1 unless kind is 'silu'"),
        (dict(gated=False, up_offset=1.0), "up_offset must be finite, and 0 when ungated"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match="Activation: " + message):
        Activation(**arguments)


def test_refuses_the_wrong_number_of_halves():
    with pytest.raises(ValueError, match="a gated activation takes gate and up, got gate alone"):
        Activation()(X)
    with pytest.raises(ValueError, match="a non-gated activation takes gate alone, got gate and up"):
        Activation(gated=False)(X, X)
