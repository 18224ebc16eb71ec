"""X-LoRA, Poly, null adapters, balance losses, DMoERM, merging: against their authors' arithmetic written out."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moe_kernels.nn import (
    AdapterPool,
    AdapterRouting,
    DMoERewardModel,
    LayerMap,
    LoRAMoERouter,
    MixLoRAFeedForward,
    MultiLoRALinear,
    NullAdapterRouter,
    PolyLoRALinear,
    RoutedLoRALinear,
    XLoRA,
    XLoRAClassifier,
    merge_lora,
)
from moe_kernels.testing import assert_close_to_reference

HIDDEN, NUM, RANK = 12, 3, 4
CASTS = (torch.Tensor.double, torch.Tensor.float)


class Model(nn.Module):
    """Two adapted layers over an embedding; the last hidden states are the second's output."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, HIDDEN)
        self.layers = nn.ModuleList(
            MultiLoRALinear(nn.Linear(HIDDEN, HIDDEN), AdapterPool(HIDDEN, HIDDEN), AdapterRouting()) for _ in range(2)
        )
        self.factors = [
            [(torch.randn(RANK, HIDDEN) / HIDDEN, torch.randn(HIDDEN, RANK)) for _ in range(NUM)] for _ in range(2)
        ]
        for layer, adapters in zip(self.layers, self.factors, strict=True):
            for slot, (a, b) in enumerate(adapters):
                layer.pool.fill(f"adapter {slot}", slot, a, b, 0.5)

    def forward(self, token_ids, output_hidden_states=False):
        x = self.embed(token_ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return SimpleNamespace(last=x, hidden_states=(x,) if output_hidden_states else None)

    def written_out(self, token_ids, weights, cast):
        """weights [batch, length, 2, NUM], or None for the base model."""
        x = cast(self.embed.weight)[token_ids]
        for number, layer in enumerate(self.layers):
            y = x @ cast(layer.weight).T + cast(layer.bias)
            for e, (a, b) in enumerate(self.factors[number]):
                if weights is not None:
                    y = y + 0.5 * weights[:, :, number, e, None] * (x @ cast(a).T @ cast(b).T)
            x = torch.tanh(y)
        return x


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("pass_value", [0.0, 0.3])
@pytest.mark.parametrize(("top_k", "softmax_topk"), [(None, False), (2, False), (2, True)])
@torch.no_grad()
def test_x_lora(depth, pass_value, top_k, softmax_topk):
    model = Model()
    classifier = XLoRAClassifier(HIDDEN, 2, NUM, depth=depth, inner_size=7, layerwise=True, temperature=0.6)
    xlora = XLoRA(
        model, model.layers, classifier, top_k=top_k, softmax_topk=softmax_topk, global_scaling_weight=1.5,
        scaling_pass_value=pass_value,
    )  # fmt: skip
    tokens, results = torch.randint(0, 20, (2, 5)), []
    for cast in CASTS:
        first = cast(torch.full((2, 5, 2, NUM), pass_value)) if pass_value else None
        h = model.written_out(tokens, first, cast)
        linear = [layer for layer in classifier.layers if isinstance(layer, nn.Linear)]
        for number, layer in enumerate(linear):
            h = (h.clamp_min(0) if number else h) @ cast(layer.weight).T + cast(layer.bias)
        weights = (h.reshape(2, 5, 2, NUM) / 0.6).softmax(-1)
        if top_k is not None:
            kept = torch.zeros_like(weights).scatter(-1, weights.topk(top_k).indices, 1)
            chosen = weights.masked_fill(kept == 0, -torch.inf).softmax(-1) if softmax_topk else weights
            weights = chosen * kept
        results.append(model.written_out(tokens, 1.5 * weights, cast))
    assert_close_to_reference(xlora(tokens).last, *results)


def test_x_lora_trains_its_classifier_and_comes_back():
    model, tokens = Model(), torch.randint(0, 20, (2, 5))
    xloras = [XLoRA(model, model.layers, XLoRAClassifier(HIDDEN, 2, NUM)) for _ in range(2)]
    xloras[0](tokens)  # its routings were taken over: the base model runs
    xloras[1](tokens).last.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in xloras[1].classifier.parameters())
    state = xloras[1].state_dict()
    other = Model()
    again = XLoRA(other, other.layers, XLoRAClassifier(HIDDEN, 2, NUM))
    again.load_state_dict(state)
    assert torch.equal(again(tokens).last, xloras[1](tokens).last)
    with pytest.raises(ValueError, match="XLoRA: layers must be num_layers=2 layers, got 1"):
        XLoRA(model, model.layers[:1], XLoRAClassifier(HIDDEN, 2, NUM))
    with pytest.raises(ValueError, match=r"XLoRA: top_k must be in \[1, num_adapters=3\], got 4"):
        XLoRA(model, model.layers, XLoRAClassifier(HIDDEN, 2, NUM), top_k=4)


def poly(num_splits: int = 2) -> tuple[PolyLoRALinear, AdapterRouting]:
    routing = AdapterRouting()
    layer = PolyLoRALinear(nn.Linear(12, 8), 3, NUM, routing, rank=2, num_splits=num_splits)
    for parameter in (layer.task_logits, layer.lora_b_rows):
        nn.init.normal_(parameter)
    return layer, routing


def poly_written_out(layer, x, weights, cast):
    """Mixed A [in, rank] and B [rank, out] of every sequence, as matrices; weights [batch, splits, skills]."""
    a, b = (cast(factor) for factor in (layer.lora_a, layer.lora_b_rows))
    rows = []
    for sequence, w in zip(cast(x), cast(weights), strict=True):
        mixed_a = torch.cat([sum(w[q, e] * a[q, e] for e in range(NUM)).T for q in range(len(a))], 0)
        mixed_b = torch.cat([sum(w[q, e] * b[q, e] for e in range(NUM)) for q in range(len(b))], 1)
        base = sequence @ cast(layer.base_layer.weight).T + cast(layer.base_layer.bias)
        rows.append(base + sequence @ mixed_a @ mixed_b / layer.rank)
    return torch.stack(rows)


@pytest.mark.parametrize("num_splits", [1, 2, 4])
def test_poly_and_multi_head_routing(num_splits):
    layer, routing = poly(num_splits)
    layer.eval()
    x, tasks = torch.randn(4, 5, 12), torch.tensor([2, 0, 2, 1])
    routing.set(tasks)

    def written_out(cast):
        z = cast(layer.task_logits)[tasks].sigmoid()
        return poly_written_out(layer, x, z / z.sum(-1, keepdim=True), cast)

    results = [layer(x), *map(written_out, CASTS)]
    with torch.no_grad():
        assert_close_to_reference(*results)
    parameters = [layer.task_logits, layer.lora_a, layer.lora_b_rows]
    gradients = [torch.autograd.grad(out.square().sum(), parameters) for out in results]
    for actual, expected, eager in zip(*gradients, strict=True):
        assert_close_to_reference(actual, expected.double(), eager)
    routing.set(None)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_poly_draws_in_training_and_comes_back():
    layer, routing = poly()
    tasks = torch.zeros(2000, dtype=torch.int32)
    weights = layer.weights(tasks)
    assert weights.shape == (2000, 2, NUM) and weights.std(0).min() > 0
    torch.manual_seed(1)
    first = layer.weights(tasks[:3])
    torch.manual_seed(1)
    u = torch.distributions.utils.clamp_probs(torch.rand(3, 2, NUM))
    sample = (u.log() - (-u).log1p() + layer.task_logits[tasks[:3].long()]).sigmoid()  # temperature 1
    expected = sample.double() / sample.double().sum(-1, keepdim=True)
    assert_close_to_reference(first.detach(), expected.detach(), (sample / sample.sum(-1, keepdim=True)).detach())
    other, other_routing = poly()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 12)
    for r in (routing, other_routing):
        r.set(torch.tensor([1, 2]))
    assert torch.equal(layer.eval()(x), other.eval()(x))
    with pytest.raises(ValueError, match="num_splits must be a divisor of in and out"):
        PolyLoRALinear(nn.Linear(12, 8), 3, NUM, routing, num_splits=3)


def test_null_adapters():
    a, b, x = torch.randn(NUM, RANK, HIDDEN), torch.randn(NUM, 7, RANK), torch.randn(40, HIDDEN)
    router = NullAdapterRouter(HIDDEN, NUM, num_null=4, top_k=3)
    layer = RoutedLoRALinear(nn.Linear(HIDDEN, 7), a, b, router, scaling=0.5)
    out = layer(x)
    results, losses = [], []
    for cast in CASTS:
        p = (cast(x) @ cast(router.weight).T).softmax(1)
        chosen = torch.zeros_like(p).scatter(1, p.topk(3).indices, 1)
        weights = (p * chosen)[:, :NUM]
        weights = weights / weights.sum(1, keepdim=True).where(weights.sum(1, keepdim=True) > 0, torch.ones(()))
        deltas = torch.einsum("ti,eri,eor->teo", cast(x), cast(a), cast(b)) * 0.5
        base = cast(x) @ cast(layer.base_layer.weight).T + cast(layer.base_layer.bias)
        results.append(base + (weights[..., None] * deltas).sum(1))
        load = chosen.mean(0)
        load[NUM:] = load[NUM:].mean()
        losses.append((NUM + 4) * (load * p.mean(0)).sum())
    with torch.no_grad():
        assert_close_to_reference(out, *results)
        assert_close_to_reference(router.balance_loss(), *losses)
    alone = chosen[:, :NUM].sum(1) == 0
    assert alone.any() and torch.equal(out[alone], layer.base_layer(x)[alone])
    router.balance_loss().backward()
    assert router.weight.grad.abs().sum() > 0
    layer.eval()(x)
    with pytest.raises(RuntimeError, match="NullAdapterRouter: balance_loss must be called after a forward"):
        router.balance_loss()
    other = NullAdapterRouter(HIDDEN, NUM, num_null=4, top_k=3)
    other.load_state_dict(router.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(router(x), other(x), strict=True))


@pytest.mark.parametrize("form", ["paper", "official"])
def test_loramoe_balance(form):
    router, x = LoRAMoERouter(HIDDEN, 4), torch.randn(6 * 5, HIDDEN)
    expert_types, sample_types = torch.tensor([1, 1, 0, 0]), torch.tensor([0, 1, 1, 0, 1, 0])
    router(x)
    losses = []
    for cast in CASTS:
        q = (cast(x) @ cast(router.weight).T).softmax(1).reshape(6, 5, 4).sum(1)
        z = q * torch.where(sample_types[:, None] == expert_types, 1.2, 0.8).to(q.dtype)
        deviations = (z - z.mean()).square().sum()
        mean = z.mean()
        losses.append(deviations / z.numel() / mean if form == "paper" else deviations / (z.numel() - 1) / mean**2)
    loss = router.balance_loss(expert_types, sample_types, delta=0.2, form=form)
    assert_close_to_reference(loss.detach(), *(found.detach() for found in losses))
    loss.backward()
    assert router.weight.grad.abs().sum() > 0


def test_mixlora_auxiliary_loss():
    ffn = MixLoRAFeedForward(*(nn.Linear(*size, bias=False) for size in ((12, 20), (12, 20), (20, 12))), 4, 2, rank=3)
    x = torch.randn(2, 9, 12)
    with pytest.raises(RuntimeError, match="MixLoRAFeedForward: aux_loss must be called after a forward"):
        ffn.aux_loss()
    ffn(x)
    losses = []
    for cast in CASTS:
        p = (cast(x).reshape(18, 12) @ cast(ffn.router.weight).T).softmax(1)
        chosen = torch.zeros_like(p).scatter(1, p.topk(2).indices, 1)
        losses.append(1e-3 * 4 * (chosen.mean(0) * p.mean(0)).sum())
    loss = ffn.aux_loss()
    assert_close_to_reference(loss.detach(), *(found.detach() for found in losses))
    loss.backward()
    assert ffn.router.weight.grad.abs().sum() > 0


def test_dmoerm():
    model, routing = Model(), AdapterRouting()
    for layer in model.layers:
        layer.routing = routing
    capabilities = torch.tensor([[0, 1], [2, 0]])
    reward = DMoERewardModel(lambda ids: model(ids).last, routing, capabilities, HIDDEN, inner_size=5)
    tokens, lengths = torch.randint(0, 20, (6, 4)), torch.tensor([4, 1, 2, 4, 3, 4])
    last = torch.arange(6), lengths - 1
    results, chosen = [], []
    for cast in CASTS:
        h = model.written_out(tokens, None, cast)[last]
        tasks = (h @ cast(reward.router.weight).T + cast(reward.router.bias)).argmax(1)
        rows = []
        for i, task in enumerate(tasks.tolist()):
            z = []
            for adapter in capabilities[task].tolist():
                weights = cast(torch.eye(NUM)[adapter]).expand(1, 4, 2, NUM)
                z.append(model.written_out(tokens[i : i + 1], weights, cast)[0, lengths[i] - 1])
            w0, prelu, w1 = reward.heads[task]
            inner = torch.cat(z) @ cast(w0.weight).T + cast(w0.bias)
            inner = torch.where(inner > 0, inner, cast(prelu.weight) * inner)
            rows.append((inner @ cast(w1.weight).T + cast(w1.bias))[0])
        results.append(torch.stack(rows))
        chosen.append(tasks)
    assert set(chosen[0].tolist()) == {0, 1}  # the batch mixes tasks
    with torch.no_grad():
        assert_close_to_reference(reward(tokens, lengths), *(found.detach() for found in results))
        assert torch.equal(reward(tokens, lengths, tasks=chosen[0]), reward(tokens, lengths))
    reward(tokens, lengths).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in reward.heads.parameters())
    other = DMoERewardModel(reward.encode, routing, capabilities, HIDDEN, inner_size=5)
    other.load_state_dict(reward.state_dict())
    assert torch.equal(other(tokens), reward(tokens))


def test_merges():
    a = [torch.randn(rank, 10) for rank in (2, 3, 2)]
    b = [torch.randn(7, rank) for rank in (2, 3, 2)]
    weights, scaling = [0.5, -1.0, 2.0], [1.0, 0.5, 2.0]
    merged_a, merged_b = merge_lora(a, b, weights, scaling=scaling)
    assert merged_a.shape == (7, 10) and merged_b.shape == (7, 7)
    sums = [
        sum(w * s * (cast(y) @ cast(x)) for w, s, x, y in zip(weights, scaling, a, b, strict=True)) for cast in CASTS
    ]
    assert_close_to_reference(merged_b @ merged_a, *sums)
    # factor by factor: (sum of roots of A) and (sum of roots of B), which is another matrix
    linear_a, linear_b = merge_lora(a[::2], b[::2], [0.5, 2.0], scaling=[1.0, 2.0], method="linear")
    for found, factors in ((linear_a, a), (linear_b, b)):
        expected = [0.5**0.5 * cast(factors[0]) + 2 * cast(factors[2]) for cast in CASTS]
        assert_close_to_reference(found, *expected)
    exact = 0.5 * b[0] @ a[0] + 4 * b[2] @ a[2]
    assert (linear_b @ linear_a - exact).norm() > 0.1 * exact.norm()
    with pytest.raises(ValueError, match="weights must be at least 0 for method='linear'.*use method='cat'"):
        merge_lora(a[::2], b[::2], [0.5, -2.0], method="linear")
    with pytest.raises(ValueError, match=r"lora_a must be of one rank for method='linear', got \[2, 3\]"):
        merge_lora(a, b, [1, 1, 1], method="linear")
    with pytest.raises(ValueError, match=r"lora_b\[1\] must be of shape \[out=7, rank=3\], got \[7, 2\]"):
        merge_lora(a, [b[0], b[0], b[2]], weights)
    with pytest.raises(ValueError, match="weights must be one for each of 3 adapters, got 2"):
        merge_lora(a, b, [1, 1])
    with pytest.raises(ValueError, match="method must be 'cat' or 'linear', got 'ties'"):
        merge_lora(a, b, weights, method="ties")


def test_layer_map():
    swap = LayerMap.swap("language", "task", 8, bottom=2, top=1, transition=1)
    found = [swap(f"model.layers.{layer}.self_attn.q_proj") for layer in range(8)]
    half = {"language": 0.5, "task": 0.5}
    assert found == [{"language": 1.0}] * 2 + [half] + [{"task": 1.0}] * 3 + [half] + [{"language": 1.0}]
    assert swap("model.layers.10.mlp") == {} and swap.adapters == {"language", "task"}
    first = LayerMap({r"layers\.0\.": {"one": 1.0}, "layers": {"two": 2.0}})
    assert first("layers.0.q") == {"one": 1.0} and first("layers.3.q") == {"two": 2.0} and first("head") == {}
    with pytest.raises(ValueError, match="LayerMap.swap: bottom, top and transition must be at least 0"):
        LayerMap.swap("a", "b", 4, bottom=2, top=2)


def test_poly_leaves_what_is_no_task_to_the_base():
    layer, routing = poly()
    layer.lora_b_rows.data.normal_()
    x = torch.randn(4, 5, 12)
    layer.eval()
    routing.set(torch.tensor([0, -1, 2, 7]))
    out = layer(x)
    assert torch.equal(out[[1, 3]], layer.base_layer(x)[[1, 3]])
    routing.set(torch.tensor([0, 0, 2, 2]))
    assert torch.equal(out[[0, 2]], layer(x)[[0, 2]])


def test_poly_under_autocast():
    layer, routing = poly()
    layer.eval()
    x, tasks = torch.randn(2, 5, 12), torch.tensor([0, 1])
    routing.set(tasks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    z = layer.task_logits[tasks].sigmoid()
    with torch.no_grad():
        written_out = [
            poly_written_out(layer, x, z / z.sum(-1, keepdim=True), cast)
            for cast in (torch.Tensor.double, torch.Tensor.bfloat16)
        ]
        assert_close_to_reference(out, *written_out)
    out.float().sum().backward()
    assert layer.lora_b_rows.grad.dtype == torch.float32 and layer.lora_b_rows.grad.any()
