"""RoutedLoRALinear and its routers, against their authors' arithmetic written out."""

import math

import pytest
import torch
from torch import nn

from moe_kernels.nn import ArrowRouter, LoRAMoERouter, PhatgooseGate, PhatgooseRouter, RoutedLoRALinear
from moe_kernels.testing import assert_close_to_reference

IN, OUT, RANK, NUM = 24, 10, 3, 5


def factors():
    return torch.randn(NUM, RANK, IN), torch.randn(NUM, OUT, RANK)


def dense(x, base, a, b, weights, scaling):
    """sum over all adapters of weights [T, NUM], zero where an adapter is not chosen."""
    deltas = torch.einsum("ti,eri,eor->teo", x, a, b) * scaling
    return base.weight.to(x.dtype) @ x.mT + base.bias.to(x.dtype)[:, None] + (weights[..., None] * deltas).sum(1).mT


def check(layer, x, a, b, weights_of, scaling=0.5):
    results = []
    for cast in (torch.Tensor.double, torch.Tensor.float):
        results.append(dense(cast(x), layer.base_layer, cast(a), cast(b), weights_of(cast), scaling).mT)
    with torch.no_grad():
        assert_close_to_reference(layer(x), *results)


def only_top(weights, k):
    """Keeps the k largest of each row and divides by their sum."""
    top = weights.topk(k, dim=1)
    kept = torch.zeros_like(weights).scatter(1, top.indices, top.values)
    return kept / kept.sum(1, keepdim=True)


def standardized(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)


@pytest.mark.parametrize("gamma", [None, 3.0])
def test_phatgoose_and_glider(gamma):
    (a, b), x, gates = factors(), torch.randn(11, IN), torch.randn(NUM, IN)
    router = PhatgooseRouter(gates.clone(), 2, gamma=gamma or 1.0)
    queries, experts = torch.randn(11, 7), torch.randn(NUM, 7)
    if gamma is not None:
        router.set_queries(queries, experts)

    def weights(cast):
        scores = standardized(cast(x)) @ standardized(cast(gates)).T / math.sqrt(IN)
        if gamma is not None:
            q, e = cast(queries), cast(experts)
            scores = scores + gamma * (q @ e.T) / (q.norm(dim=1)[:, None] * e.norm(dim=1))
        return only_top(scores.softmax(1), 2)

    layer = RoutedLoRALinear(nn.Linear(IN, OUT), a, b, router, scaling=0.5)
    with torch.no_grad():
        check(layer, x, a, b, weights)
    if gamma is not None:
        with pytest.raises(ValueError, match="PhatgooseRouter: queries must be of shape"):
            layer(x[:3])


def test_phatgoose_gate_trains_the_gate_alone():
    (a, b), x = factors(), torch.randn(6, IN)
    gate = PhatgooseGate(IN)
    layer = RoutedLoRALinear(nn.Linear(IN, OUT), a[:1], b[:1], gate, scaling=0.5)
    with torch.no_grad():  # an untrained gate lets half through
        check(layer, x, a[:1], b[:1], lambda cast: cast(torch.full((6, 1), 0.5)))
    for parameter in (layer.lora_a, layer.lora_b_rows, *layer.base_layer.parameters()):
        parameter.requires_grad_(False)
    layer(x).square().sum().backward()
    assert gate.gate.grad.abs().sum() > 0


@pytest.mark.parametrize("combine", ["output", "factor"])
def test_arrow(combine):
    (a, b), x = factors(), torch.randn(11, IN)
    router = ArrowRouter(a, b, 2, temperature=0.7)
    # the definition: a decomposition of the whole matrix, whose sign is free
    first = {cast: torch.linalg.svd(cast(b) @ cast(a)).Vh[:, 0] for cast in (torch.Tensor.double, torch.Tensor.float)}
    along, eager = (
        (p * first[torch.Tensor.double]).sum(1).abs() for p in (router.prototypes, first[torch.Tensor.float])
    )
    assert_close_to_reference(along.float(), torch.ones(NUM).double(), eager.float())

    def weights(cast):
        return only_top(((cast(x) @ first[cast].T).abs() / 0.7).softmax(1), 2)

    layer = RoutedLoRALinear(nn.Linear(IN, OUT), a, b, router, scaling=0.5, combine=combine)
    with torch.no_grad():
        if combine == "output":
            return check(layer, x, a, b, weights)
        results = []
        for cast in (torch.Tensor.double, torch.Tensor.float):
            w, base = weights(cast), layer.base_layer
            mixed_a, mixed_b = (torch.einsum("te,eij->tij", w, cast(tensor)) for tensor in (a, b))
            delta = 0.5 * torch.einsum("ti,tri,tor->to", cast(x), mixed_a, mixed_b)
            results.append(cast(x) @ cast(base.weight).T + cast(base.bias) + delta)
        assert_close_to_reference(layer(x), *results)


def test_loramoe():
    (a, b), x = factors(), torch.randn(11, IN)
    router = LoRAMoERouter(IN, NUM)
    layer = RoutedLoRALinear(nn.Linear(IN, OUT), a, b, router, scaling=0.5)
    with torch.no_grad():
        check(layer, x, a, b, lambda cast: (cast(x) @ cast(router.weight).T).softmax(1))
    layer(x).square().sum().backward()
    assert router.weight.grad.abs().sum() > 0


def test_state_dict_round_trip():
    a, b = factors()
    layers = [
        RoutedLoRALinear(nn.Linear(IN, OUT), scale * a, b, PhatgooseRouter(torch.randn(NUM, IN))) for scale in (1, 2)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 3, IN)
    assert torch.equal(layers[0](x), layers[1](x)) and torch.equal(layers[0].lora_b, b)
