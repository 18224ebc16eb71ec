"""AdapterPool, MultiLoRALinear and MultiLoRAEmbedding."""

import pytest
import torch
from torch import nn

from moe_kernels.nn import AdapterPool, AdapterRouting, MultiLoRAEmbedding, MultiLoRALinear
from moe_kernels.testing import assert_close_to_reference

RANKS = (4, 1, 7)


def filled(dtype: torch.dtype = torch.float32, num_rows: int = 16) -> tuple[AdapterPool, list]:
    pool = AdapterPool(12, 9, num_slots=4, num_rows=num_rows, dtype=dtype)
    adapters = [(torch.randn(r, 12).to(dtype), torch.randn(9, r).to(dtype), 1 / r) for r in RANKS]
    for slot, (a, b, scaling) in enumerate(adapters):
        pool.fill(f"adapter {slot}", slot, a, b, scaling)
    return pool, adapters


def test_slots_give_back_their_bits_and_leave_the_others_alone():
    pool, adapters = filled()
    assert pool.free_rows() == 16 - sum(RANKS)
    before = [tensor.data_ptr() for tensor in (pool.lora_a, pool.lora_b, pool.ranks, pool.rank_starts)]
    pool.evict(0)
    new = torch.randn(3, 12), torch.randn(9, 3)
    pool.fill("new", 3, *new)
    assert int(pool.rank_starts[3]) == 0  # the evicted rows are used again
    for slot, (a, b) in ((1, adapters[1][:2]), (2, adapters[2][:2]), (3, new)):
        assert torch.equal(pool.adapter(slot)[0], a) and torch.equal(pool.adapter(slot)[1], b)
    pool.fill("replaced", 2, *new)
    assert torch.equal(pool.adapter(2)[0], new[0]) and torch.equal(pool.adapter(3)[0], new[0])
    assert before == [tensor.data_ptr() for tensor in (pool.lora_a, pool.lora_b, pool.ranks, pool.rank_starts)]
    with pytest.raises(ValueError, match="AdapterPool: slot must be one that holds an adapter, got 0"):
        pool.adapter(0)


def test_what_does_not_fit_changes_nothing():
    pool, _ = filled()
    state = {name: tensor.clone() for name, tensor in pool.state_dict().items()}
    bad = [
        (ValueError, r"adapter 'x'.*: slot must be in \[0, num_slots=4\), got 9", (9, (2, 12), (9, 2), torch.float32)),
        (ValueError, r"adapter 'x'.*: lora_a must be of shape \[rank, in=12\]", (3, (2, 11), (9, 2), torch.float32)),
        (ValueError, r"adapter 'x'.*: lora_b must be of shape \[out=9, rank=2\]", (3, (2, 12), (9, 3), torch.float32)),
        (TypeError, r"adapter 'x'.*: lora_a must be torch.float32", (3, (2, 12), (9, 2), torch.bfloat16)),
        (ValueError, r"adapter 'x'.*: rank must be no more than the longest run", (3, (5, 12), (9, 5), torch.float32)),
        (ValueError, r"adapter 'x'.*: rank must be at most max_rank=16", (3, (17, 12), (9, 17), torch.float32)),
    ]
    for error, message, (slot, a, b, dtype) in bad:
        with pytest.raises(error, match=message):
            pool.fill("x", slot, torch.randn(a).to(dtype), torch.randn(b).to(dtype))
    assert all(torch.equal(state[name], tensor) for name, tensor in pool.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_equals_each_adapter_merged_into_the_weight(dtype, dora, bias):
    pool, adapters = filled(dtype)
    layer, routing = nn.Linear(12, 9, bias=bias).to(dtype), AdapterRouting()
    gains = [None] * 3
    if dora:
        gains[1] = (torch.rand(9) + 0.5).to(dtype)
        pool.fill("dora", 1, *adapters[1], gains[1])
    multi = MultiLoRALinear(layer, pool, routing)
    x = torch.randn(5, 3, 12).to(dtype)
    assert torch.equal(multi(x), layer(x))
    ids = torch.tensor([1, -1, 0, 2, 1])
    routing.set(ids)
    out = multi(x)

    def merged(cast):
        rows = []
        for t, e in enumerate(ids.tolist()):
            weight = cast(layer.weight)
            if e >= 0:
                a, b, scaling = adapters[e]
                weight = weight + scaling * (cast(b) @ cast(a))
                weight = weight if gains[e] is None else cast(gains[e])[:, None] * weight
            rows.append(nn.functional.linear(cast(x[t]), weight, cast(layer.bias) if bias else None))
        return torch.stack(rows)

    with torch.no_grad():
        assert_close_to_reference(out.detach(), merged(torch.Tensor.double), merged(lambda tensor: tensor))
    if not dora or not bias:
        assert torch.equal(out[1], layer(x)[1])


def test_per_token_and_weighted():
    pool, adapters = filled()
    layer, routing = nn.Linear(12, 9), AdapterRouting()
    multi = MultiLoRALinear(layer, pool, routing)
    x, weights = torch.randn(2, 3, 12), torch.rand(6, 2)
    routing.set(torch.tensor([[0, 2]] * 6), weights, per="token")
    expected = layer(x).double()
    for k, e in enumerate((0, 2)):
        a, b, scaling = adapters[e]
        expected += weights[:, k].reshape(2, 3, 1) * scaling * (x.double() @ a.double().T @ b.double().T)
    eager = layer(x) + (expected - layer(x).double()).float()
    assert_close_to_reference(multi(x).detach(), expected.detach(), eager.detach())
    with pytest.raises(ValueError, match="AdapterRouting: adapter_ids must be of shape"):
        routing.set(torch.tensor([0, 1, 2]))
        multi(x)
    with pytest.raises(ValueError, match="per must be 'sequence' or 'token'"):
        routing.set(torch.tensor([0]), per="request")


def test_an_evicted_slot_is_refused():
    pool, _ = filled()
    routing = AdapterRouting()
    multi = MultiLoRALinear(nn.Linear(12, 9), pool, routing)
    pool.evict(1)
    routing.set(torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="got 1.*whose slot is empty"):
        multi(torch.randn(2, 12))


@pytest.mark.parametrize("slot", [-1, 4])
@pytest.mark.parametrize("method", ["adapter", "evict", "leave_alone"])
def test_a_slot_outside_the_pool_is_refused(method, slot):
    pool, _ = filled()
    before = pool.ranks.clone()
    with pytest.raises(ValueError, match=rf"AdapterPool: slot must be in \[0, num_slots=4\), got {slot}"):
        getattr(pool, method)(slot)
    assert torch.equal(pool.ranks, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(dtype):
    pool, adapters = filled(dtype)
    embedding, routing = nn.Embedding(12, 9).to(dtype), AdapterRouting()
    multi = MultiLoRAEmbedding(embedding, pool, routing)
    tokens, ids = torch.randint(0, 12, (4, 5)), torch.tensor([2, -1, 0, 1])
    routing.set(ids)
    out = multi(tokens)

    def expected(cast):
        rows = []
        for t, e in enumerate(ids.tolist()):
            a, b, scaling = adapters[e]
            delta = (scaling if e >= 0 else 0) * (cast(a)[:, tokens[t]].T @ cast(b).T)
            rows.append(cast(embedding.weight)[tokens[t]] + delta)
        return torch.stack(rows)

    with torch.no_grad():
        assert_close_to_reference(out.detach(), expected(torch.Tensor.double), expected(lambda tensor: tensor))
    assert torch.equal(out[1], embedding(tokens[1]))


def test_training_reaches_the_pool():
    pool, _ = filled()
    pool.requires_grad_(True)
    routing = AdapterRouting()
    multi = MultiLoRALinear(nn.Linear(12, 9).requires_grad_(False), pool, routing)
    routing.set(torch.tensor([0, 2, -1]))
    multi(torch.randn(3, 12)).square().sum().backward()
    rows = [pool.lora_a.grad[int(pool.rank_starts[e]) :][: RANKS[e]].abs().sum() for e in range(3)]
    assert rows[0] > 0 and rows[1] == 0 and rows[2] > 0


def test_changing_adapters_does_not_compile_again():
    pool, _ = filled()
    routing = AdapterRouting()
    multi = MultiLoRALinear(nn.Linear(12, 9), pool, routing)
    traces = []

    def count(graph, inputs):
        traces.append(graph)
        return graph.forward

    compiled = torch.compile(multi, fullgraph=True, backend=count)
    x = torch.randn(3, 12)
    with torch.no_grad():
        for ids in ([0, 1, 2], [2, 2, -1], [1, 0, 0]):
            routing.set(torch.tensor(ids))
            assert torch.equal(compiled(x), multi(x))
        pool.evict(0)
        pool.fill("another", 0, torch.randn(2, 12), torch.randn(9, 2))
        assert torch.equal(compiled(x), multi(x))
    assert len(traces) == 1


def test_an_embedding_with_a_forward_of_its_own_is_refused():
    class Scaled(nn.Embedding):
        def forward(self, token_ids):
            return super().forward(token_ids) * 8

    with pytest.raises(ValueError, match="base_layer must be an Embedding with torch's own forward, got Scaled"):
        MultiLoRAEmbedding(Scaled(5, 4), None, AdapterRouting())
