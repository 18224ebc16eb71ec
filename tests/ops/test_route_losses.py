"""Losses of routers: transformers' and the papers' arithmetic in loops, masks, gradients, the bias update."""

import math

import pytest
import torch

from moe_kernels import (
    balance_loss,
    consistency_loss,
    entropy_loss,
    expert_counts,
    localized_balance_loss,
    route,
    route_top_p,
    update_expert_bias_,
    z_loss,
)
from moe_kernels.testing import assert_close_to_reference

NUM_TOKENS, NUM_EXPERTS, TOP_K = 24, 6, 2


def switch_loss(logits, topk_ids, scale, mask=None):
    """Switch Transformer, eq. 4-6, with the two normalisations of f in use, one token at a time."""
    num_experts = logits.shape[1]
    rows = [t for t in range(len(logits)) if mask is None or mask[t]]
    picks = [e for t in rows for e in topk_ids[t].tolist() if 0 <= e < num_experts]
    loss = 0.0
    for expert in range(num_experts):
        f = picks.count(expert) / (len(rows) if scale == "hf" else len(picks))
        p = sum(logits[t].softmax(0)[expert].item() for t in rows) / len(rows)
        loss += f * p
    return torch.tensor(num_experts * loss, dtype=torch.float64)


def assert_close(actual, expected, eager):
    assert_close_to_reference(actual.detach().reshape(1), expected.detach().reshape(1), eager.detach().reshape(1))


@pytest.mark.parametrize("scale", ["hf", "megatron"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", ["top_k", "top_p"])
def test_balance_loss(scale, masked, method):
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS)
    ids, _ = route(logits, TOP_K) if method == "top_k" else route_top_p(logits, 0.5)
    mask = torch.rand(NUM_TOKENS) < 0.6 if masked else None
    if masked:
        logits[~mask] = torch.nan  # padding has no say, whatever it holds
    expected = switch_loss(logits.double(), ids, scale, mask)
    assert_close(balance_loss(logits, ids, scale=scale, token_mask=mask), expected, expected.float())


@pytest.mark.parametrize(("scale", "balanced"), [("hf", 2.0), ("megatron", 1.0)])
def test_balanced_routing_has_the_scale_that_is_written(scale, balanced):
    ids = torch.arange(24).view(12, 2) % 6
    expected = torch.tensor(balanced)
    assert_close(balance_loss(torch.zeros(12, 6), ids, scale=scale), expected.double(), expected)


def test_balance_loss_equals_transformers():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    layers = [torch.randn(2 * 12, NUM_EXPERTS) for _ in range(2)]
    attention_mask = torch.ones(2, 12)
    attention_mask[1, 7:] = 0
    for mask in (None, attention_mask):
        theirs = mixtral.load_balancing_loss_func(tuple(layers), NUM_EXPERTS, TOP_K, mask)
        logits = torch.cat(layers).double()
        token_mask = None if mask is None else mask.bool().flatten().repeat(2)
        ours = balance_loss(logits, route(logits, TOP_K)[0], token_mask=token_mask)
        assert_close(ours.float(), ours, theirs)


def test_null_experts_share_their_load():
    """AdaMoE, section 3.3: a null expert's f is the mean over the null experts."""
    logits = torch.randn(NUM_TOKENS, 7, dtype=torch.float64)
    ids, _ = route(logits, 3, num_null_experts=3)
    picks = ids.flatten().tolist()
    f = [picks.count(expert) / NUM_TOKENS for expert in range(7)]
    f[4:] = [sum(f[4:]) / 3] * 3
    p = [sum(row.softmax(0)[expert].item() for row in logits) / NUM_TOKENS for expert in range(7)]
    expected = torch.tensor(7 * sum(a * b for a, b in zip(f, p, strict=True)), dtype=torch.float64)
    assert_close(balance_loss(logits, ids, num_null_experts=3).float(), expected, expected.float())
    # which null was taken does not matter, only how many
    swapped = torch.where(ids >= 4, 4, ids)
    assert_close(balance_loss(logits, swapped, num_null_experts=3).float(), expected, expected.float())
    with pytest.raises(AssertionError, match="is allowed"):
        assert_close(balance_loss(logits, swapped).float(), expected, expected.float())


def test_balance_loss_takes_fractions_of_more_tokens():
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS)
    ids, _ = route(logits, TOP_K)
    counts = expert_counts(ids, NUM_EXPERTS)
    local = balance_loss(logits, ids)
    assert balance_loss(logits, ids, expert_fractions=counts / NUM_TOKENS) == local
    other = expert_counts(route(torch.randn(100, NUM_EXPERTS), TOP_K)[0], NUM_EXPERTS)
    assert balance_loss(logits, ids, expert_fractions=(counts + other) / (NUM_TOKENS + 100)) != local


def test_sigmoid_scores_are_normalised():
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS, dtype=torch.float64)
    ids, _ = route(logits, TOP_K, score="sigmoid")
    scores = logits.sigmoid() / logits.sigmoid().sum(1, keepdim=True)
    expected = NUM_EXPERTS * (expert_counts(ids, NUM_EXPERTS) / NUM_TOKENS * scores.mean(0)).sum()
    assert_close(balance_loss(logits, ids, score="sigmoid").float(), expected, expected.float())


@pytest.mark.parametrize("masked", [False, True])
def test_z_loss_and_entropy(masked):
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS)
    logits[:, 1] = -torch.inf  # a masked expert adds nothing
    mask = torch.rand(NUM_TOKENS) < 0.6 if masked else None
    rows = [row.tolist() for t, row in enumerate(logits.double()) if mask is None or mask[t]]
    z, entropy = 0.0, 0.0
    for row in rows:
        total = sum(math.exp(x) for x in row)
        z += math.log(total) ** 2 / len(rows)
        entropy -= sum(math.exp(x) / total * math.log(math.exp(x) / total) for x in row if x > -math.inf) / len(rows)
    for loss, expected in ((z_loss, z), (entropy_loss, entropy)):
        expected = torch.tensor(expected, dtype=torch.float64)
        assert_close(loss(logits, token_mask=mask), expected, expected.float())


def test_consistency_loss():
    p, q = torch.randn(10, 7, dtype=torch.float64), torch.randn(10, 7, dtype=torch.float64)
    expected = 0.0
    for first, second in zip(p.softmax(1).tolist(), q.softmax(1).tolist(), strict=True):
        there = sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))
        back = sum(b * math.log(b / a) for a, b in zip(first, second, strict=True))
        expected += 0.5 * (there + back) / 10
    expected = torch.tensor(expected, dtype=torch.float64)
    assert_close(consistency_loss(p, q).float(), expected, expected.float())
    assert consistency_loss(p, p).item() == 0


@pytest.mark.parametrize("form", ["paper", "official"])
def test_localized_balance(form):
    importance = torch.rand(4, 6, dtype=torch.float64)
    expert_types, sample_types = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 0])
    z = []
    for n in range(4):
        for e in range(6):
            coefficient = 1.2 if expert_types[e] == sample_types[n] else 0.8
            z.append(coefficient * importance[n, e].item())
    mean = sum(z) / len(z)
    squares = sum((x - mean) ** 2 for x in z)
    expected = squares / 24 / mean if form == "paper" else squares / 23 / (mean**2 + 1e-10)
    expected = torch.tensor(expected, dtype=torch.float64)
    actual = localized_balance_loss(importance, expert_types, sample_types, delta=0.2, form=form)
    assert_close(actual.float(), expected, expected.float())


def test_gradients():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    other = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    importance = torch.rand(5, 4, dtype=torch.float64, requires_grad=True)
    ids, mask = route(logits.detach(), 2)[0], torch.tensor([True, True, False, True, True])
    types = (torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1, 1]))
    for loss, inputs in [
        (lambda x: balance_loss(x, ids, token_mask=mask, num_null_experts=2), (logits,)),
        (lambda x: balance_loss(x, ids, score="sigmoid", scale="megatron"), (logits,)),
        (lambda x: z_loss(x, token_mask=mask), (logits,)),
        (lambda x: entropy_loss(x, token_mask=mask), (logits,)),
        (lambda x, y: consistency_loss(x, y, token_mask=mask), (logits, other)),
        (lambda x: localized_balance_loss(x, *types), (importance,)),
        (lambda x: localized_balance_loss(x, *types, form="official"), (importance,)),
    ]:
        assert torch.autograd.gradcheck(loss, inputs)
    masked = logits.masked_fill(torch.tensor([True, False, False, False]), -torch.inf)
    (grad,) = torch.autograd.grad(entropy_loss(masked) + z_loss(masked), logits)
    assert grad.isfinite().all() and (grad[:, 0] == 0).all()


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_no_token_that_counts(num_tokens):
    logits = torch.randn(num_tokens, 4, requires_grad=True)
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    ids = torch.zeros(num_tokens, 2, dtype=torch.int32)
    for loss in (
        balance_loss(logits, ids, token_mask=mask),
        balance_loss(logits, ids, token_mask=mask, scale="megatron"),
        z_loss(logits, token_mask=mask),
        entropy_loss(logits, token_mask=mask),
        consistency_loss(logits, logits, token_mask=mask),
    ):
        assert loss.item() == 0
        (grad,) = torch.autograd.grad(loss, logits)
        assert (grad == 0).all()


def test_low_precision_logits_are_summed_in_float32():
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS).bfloat16()
    ids, _ = route(logits, TOP_K)
    for loss in (balance_loss(logits, ids), z_loss(logits), entropy_loss(logits), consistency_loss(logits, logits * 2)):
        assert loss.dtype == torch.float32
    assert_close(z_loss(logits), z_loss(logits.double()), z_loss(logits.float()))


def test_expert_counts():
    ids = torch.tensor([[0, 3], [-1, 3], [9, 0]], dtype=torch.int32)
    assert expert_counts(ids, 4).tolist() == [2, 0, 0, 2]
    assert expert_counts(ids, 4, token_mask=torch.tensor([True, True, False])).tolist() == [1, 0, 0, 2]
    assert expert_counts(ids[:0], 4).tolist() == [0] * 4 and expert_counts(ids, 0).shape == (0,)


@pytest.mark.parametrize("center", [False, True])
def test_bias_update(center):
    """Loss-Free Balancing, algorithm 1: b_i += u * sign(mean(c) - c_i)."""
    bias, counts = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([8, 4, 3, 1])  # mean 4
    steps = [-1.0, 0.0, 1.0, 1.0]
    if center:
        steps = [step - sum(steps) / 4 for step in steps]
    expected = torch.tensor([b + 0.5 * step for b, step in zip([0.1, 0.2, 0.3, 0.4], steps, strict=True)])
    assert update_expert_bias_(bias, counts, rate=0.5, center=center) is bias
    assert_close_to_reference(bias, expected.double(), expected)
    assert not bias.requires_grad


def test_bias_update_balances():
    router = torch.randn(400, 8) + torch.linspace(-1, 1, 8)  # a router that prefers the last experts
    bias = torch.zeros(8)
    worst = []
    for _ in range(300):
        counts = expert_counts(route(router, 2, expert_bias=bias)[0], 8)
        worst.append(counts.max().item() / counts.double().mean().item())
        update_expert_bias_(bias, counts, rate=1e-3)
    assert worst[0] > 2 and worst[-1] < 1.2


def test_compile():
    def losses(logits, mask):
        ids, _ = route(logits, 2)
        balance = balance_loss(logits, ids, token_mask=mask, scale="megatron")
        return balance + z_loss(logits, token_mask=mask) + entropy_loss(logits), expert_counts(ids, 4)

    compiled = torch.compile(losses, fullgraph=True, dynamic=True)
    for num_tokens in (6, 9):
        logits, mask = torch.randn(num_tokens, 4, requires_grad=True), torch.arange(num_tokens) < 5
        (actual, counts), (expected, expected_counts) = compiled(logits, mask), losses(logits, mask)
        assert_close(actual, losses(logits.double(), mask)[0], expected)
        assert torch.equal(counts, expected_counts)
        grads = [torch.autograd.grad(loss, logits)[0] for loss in (actual, expected)]
        double = logits.detach().double().requires_grad_()
        assert_close_to_reference(grads[0], torch.autograd.grad(losses(double, mask)[0], double)[0], grads[1])


def test_bad_input():
    logits, ids = torch.randn(3, 4), torch.zeros(3, 2, dtype=torch.int32)
    for call, message in [
        (lambda: balance_loss(logits, ids, scale="switch"), "scale must be one of hf, megatron, got 'switch'"),
        (lambda: balance_loss(logits, ids[:2]), r"topk_ids must be of shape \[num_tokens=3, top_k\], got \[2, 2\]"),
        (
            lambda: balance_loss(logits, ids, token_mask=torch.ones(4).bool()),
            r"token_mask must be of shape \[num_tokens=3\]",
        ),
        (lambda: balance_loss(logits, ids, expert_fractions=torch.ones(3)), "expert_fractions must be of shape"),
        (lambda: consistency_loss(logits, logits[:, :3]), r"second_logits must be of shape \[3, 4\], got \[3, 3\]"),
        (lambda: localized_balance_loss(logits, torch.zeros(3), torch.zeros(3)), r"expert_types must be of shape"),
        (lambda: localized_balance_loss(logits, torch.zeros(4), torch.zeros(3), delta=2), r"delta must be in \[0, 1\]"),
        (lambda: localized_balance_loss(logits, torch.zeros(4), torch.zeros(3), form="x"), "form must be one of"),
        (
            lambda: update_expert_bias_(torch.zeros(4), torch.zeros(3)),
            r"counts must be of shape \[4\] like expert_bias",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="token_mask must be torch.bool"):
        z_loss(logits, token_mask=torch.ones(3))


LOSSES = {
    "balance": lambda logits, mask: balance_loss(logits, route(logits.detach(), TOP_K)[0], token_mask=mask),
    "sigmoid": lambda logits, mask: balance_loss(
        logits, route(logits.detach(), TOP_K)[0], score="sigmoid", token_mask=mask
    ),
    "z": lambda logits, mask: z_loss(logits, token_mask=mask),
    "entropy": lambda logits, mask: entropy_loss(logits, token_mask=mask),
    "consistency": lambda logits, mask: consistency_loss(logits, 2 * logits, token_mask=mask),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("padding", [float("nan"), float("inf"), float("-inf")])
def test_padding_has_no_gradient(name, padding):
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS, dtype=torch.float64)
    mask = torch.arange(NUM_TOKENS) % 3 > 0
    expected_logits = logits[mask].requires_grad_()
    expected = LOSSES[name](expected_logits, None)
    (expected_grad,) = torch.autograd.grad(expected, expected_logits)
    logits[~mask] = padding
    loss = LOSSES[name](logits.requires_grad_(), mask)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad[mask], expected_grad)
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))


@pytest.mark.parametrize("name", LOSSES)
def test_a_token_without_an_expert_does_not_count(name):
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS)
    mask = torch.arange(NUM_TOKENS) % 4 > 0
    logits[~mask] = -torch.inf
    logits.requires_grad_()
    loss = LOSSES[name](logits, None)
    assert torch.equal(loss, LOSSES[name](logits, mask)) and loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_consistency_of_classes_that_both_leave_out():
    logits = torch.randn(4, 5, dtype=torch.float64)
    expected = consistency_loss(logits[:, 1:], logits[:, 1:] ** 2)
    padded = torch.cat([torch.full((4, 1), -torch.inf), logits[:, 1:]], 1).requires_grad_()
    loss = consistency_loss(padded, torch.cat([padded[:, :1], padded[:, 1:] ** 2], 1))
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, padded)[0].isfinite().all()
