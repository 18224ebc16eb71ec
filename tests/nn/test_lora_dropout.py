"""Dropout of the adapters' input in the layers that have adapters: in training mode alone, from torch's generator."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_kernels import routed_lora
from moe_kernels.nn import (
    AdapterPool,
    AdapterRouting,
    LoRAMoERouter,
    MixLoRAFeedForward,
    MultiLoRALinear,
    RoutedLoRALinear,
)

IN, OUT = 24, 10


def multi_lora(dropout: float) -> nn.Module:
    pool, routing = AdapterPool(IN, OUT, num_rows=8), AdapterRouting()
    for slot, rank in enumerate((3, 4)):
        pool.fill(f"adapter {slot}", slot, torch.randn(rank, IN), torch.randn(OUT, rank), 0.5)
    routing.set(torch.tensor([0, 1, -1, 1, 0, 1]))
    return MultiLoRALinear(nn.Linear(IN, OUT), pool.requires_grad_(), routing, dropout=dropout)


def routed(dropout: float) -> nn.Module:
    factors = torch.randn(5, 3, IN), torch.randn(5, OUT, 3)
    return RoutedLoRALinear(nn.Linear(IN, OUT), *factors, LoRAMoERouter(IN, 5), scaling=0.5, dropout=dropout)


def mixlora(dropout: float) -> nn.Module:
    sizes = ((IN, OUT), (IN, OUT), (OUT, IN))
    layer = MixLoRAFeedForward(*(nn.Linear(*size, bias=False) for size in sizes), 4, rank=3, dropout=dropout)
    for rows in layer.lora_b_rows.values():
        nn.init.normal_(rows)
    return layer


@pytest.mark.parametrize("make", [multi_lora, routed, mixlora])
def test_dropout_in_training_alone(make):
    layer, x = make(0.5), torch.randn(6, IN)

    def trained(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return layer.train()(x)

    assert torch.equal(layer.eval()(x), layer.eval()(x))
    assert torch.equal(trained(1), trained(1)) and not torch.equal(trained(1), trained(2))
    assert not torch.equal(layer.train()(x), layer.train()(x)) and not torch.equal(trained(1), layer.eval()(x))
    without, layer.dropout = layer.eval()(x), 0.0
    assert torch.equal(layer.train()(x), without)


@pytest.mark.parametrize("make", [multi_lora, routed, mixlora])
def test_a_checkpoint_drops_the_same_again(make):
    layer, x = make(0.5).train(), torch.randn(6, IN, requires_grad=True)
    results = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(3)
        out = call(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()], allow_unused=True)])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_base_sees_all_of_its_input():
    layer, x = routed(0.5).train(), torch.randn(6, IN)
    torch.manual_seed(4)
    out = layer(x)
    torch.manual_seed(4)
    seed = torch.randint(2**63 - 1, ())
    ids, weights = layer.router(x)
    factors = layer.lora_a, layer.lora_b
    expected = routed_lora(x, *factors, ids, weights, scaling=0.5, base=layer.base_layer(x), dropout=0.5, seed=seed)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("make", [multi_lora, mixlora])
def test_dropout_compiles_whole(make):
    layer, x = make(0.5).train(), torch.randn(6, IN)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    out = compiled(x)
    torch.manual_seed(5)
    assert torch.equal(out, layer(x)) and not torch.equal(out, compiled(x))
