"""The restricted head is the full computation, value and gradient, and multiplies no more than the candidates."""

import math

import pytest
import torch
import torch.nn.functional as F

from moe_kernels import TokenFilter, fuse_heads, fuse_logits
from moe_kernels.testing import assert_close_to_reference

OP = "fuse_logits"
INF, NAN = math.inf, math.nan
#: few tokens of many, a nucleus, and more than is worth gathering
MASKS = {
    "min_p": TokenFilter(min_p=0.3),
    "nucleus": TokenFilter(top_p=0.5, min_keep=2),
    "most": TokenFilter(min_p=1e-9),
}


def inputs(num_rows: int = 5, vocab_sizes=(700, 710, 700), dtype=torch.float32):
    sizes = (24, 16, 8)
    hidden_states = [torch.randn(num_rows, size).to(dtype) for size in sizes]
    heads = [(torch.randn(v, size) * 3 / size**0.5).to(dtype) for v, size in zip(vocab_sizes, sizes, strict=True)]
    return hidden_states, heads


def full(hidden_states, heads, weights, **options):
    return fuse_logits([F.linear(h, head) for h, head in zip(hidden_states, heads, strict=True)], weights, **options)


@pytest.mark.with_reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("anchor", [0, 1])
@pytest.mark.parametrize("out", ["logits", "log_probs", "probs"])
def test_is_the_full_computation(backend, dtype, mask, anchor, out):
    hidden_states, heads = inputs(dtype=dtype)
    weights = torch.tensor([1.0, 0.7, -0.7])
    options = dict(mask=MASKS[mask], anchor=anchor, temperature=0.8, keep=TokenFilter(top_k=9), out=out)
    leaves = [tensor.clone().requires_grad_() for tensor in (*hidden_states, *heads, weights)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in leaves]
    actual = fuse_heads(leaves[:3], leaves[3:6], leaves[6], **options, backend=backend)
    eager = full(leaves[:3], leaves[3:6], leaves[6], **options, backend="reference")
    # the candidates of the same dtype: rounded logits choose others
    reference64 = full(doubles[:3], doubles[3:6], doubles[6], **options, backend="reference")
    if dtype != torch.bfloat16:
        assert_close_to_reference(actual.detach(), reference64.detach(), eager.detach())
    else:
        assert torch.equal(actual.isfinite(), eager.isfinite())
    grad = torch.randn(actual.shape, dtype=torch.float64)
    grads = [
        torch.autograd.grad(result, of, grad.masked_fill(result.isinf(), 0).to(result.dtype), allow_unused=True)
        for result, of in ((actual, leaves), (reference64, doubles), (eager, leaves))
    ]
    for name, ours, exact, theirs in zip("hhhHHHw", *grads, strict=True):
        if dtype != torch.bfloat16:
            assert_close_to_reference(ours, exact, theirs, name)
        assert ours.dtype == theirs.dtype and ours.isfinite().all()


@pytest.mark.with_reference
@pytest.mark.parametrize("out", ["argmax", "sample"])
@pytest.mark.parametrize("mask", MASKS)
def test_tokens_are_those_of_the_full_computation(backend, out, mask):
    hidden_states, heads = inputs(num_rows=200, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.7, -0.7]) + 0.1 * torch.rand(200, 3)
    options = dict(mask=MASKS[mask], out=out, request_ids=torch.arange(200), seed=4, backend=backend)
    tokens = fuse_heads(hidden_states, heads, weights, **options)
    assert torch.equal(tokens, full(hidden_states, heads, weights, **options))


def test_other_heads_see_candidates_only(backend, monkeypatch):
    hidden_states, heads = inputs()
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda hidden, head: seen.append(head.shape[0]) or linear(hidden, head))
    fuse_heads(hidden_states, heads, [1.0, 0.7, -0.7], mask=MASKS["min_p"], backend=backend)
    kept = full(hidden_states[:1], heads[:1], [1.0], keep=MASKS["min_p"], out="logits") > -INF
    assert seen[:3] == [700] + [kept.any(0).sum().item()] * 2 and seen[1] < 50


@pytest.mark.with_reference
def test_broken_empty_and_unread_anchors(backend):
    hidden_states, heads = inputs(num_rows=4)
    hidden_states[0][0] = NAN
    hidden_states[1][1] = NAN  # another source than the anchor
    weights = torch.tensor([[1.0, 0.5, -0.5]] * 4)
    weights[2, 0] = 0.0  # the anchor is not read, so it masks nothing
    for out in ("log_probs", "argmax"):
        options = dict(mask=MASKS["min_p"], out=out, backend=backend)
        for rows in ([0], [1], [3], [0, 1, 3], [0, 1, 2, 3]):
            some = [hidden[rows] for hidden in hidden_states]
            actual = fuse_heads(some, heads, weights[rows], **options)
            expected = full(some, heads, weights[rows], **options)
            torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.with_reference
def test_no_rows(backend):
    hidden_states, heads = inputs(num_rows=0)
    assert fuse_heads(hidden_states, heads, [1.0, 1.0, -1.0], mask=MASKS["min_p"], backend=backend).shape == (0, 700)


def test_bad_input():
    hidden_states, heads = inputs()
    weights, mask = [1.0, 0.7, -0.7], MASKS["min_p"]
    for call, message in [
        (lambda: fuse_heads(hidden_states, heads[:2], weights, mask=mask), "heads must be as many as hidden_states"),
        (
            lambda: fuse_heads(hidden_states, heads[::-1], weights, mask=mask),
            r"heads\[0\] must be of shape \[vocab_size >= 1, hidden_size=24\], got \[700, 8\]",
        ),
        (lambda: fuse_heads(hidden_states, heads, weights, mask=mask, anchor=3), r"anchor must be in \[0, num_sources"),
        (
            lambda: fuse_heads(hidden_states, heads, weights, mask=mask, neg_inf="floor"),
            "neg_inf must be one of mask, zero, got 'floor'; a floor would need every logit",
        ),
        (
            lambda: fuse_heads(hidden_states, heads, weights, mask=mask, mode="mixture"),
            "mode must be left out, got mixture; use fuse_logits",
        ),
        (
            lambda: fuse_heads(hidden_states, [*heads[:2], torch.randn(99, 8)], weights, mask=mask),
            r"heads\[2\] must be at most 256 tokens short of the largest vocabulary, 710, got 99; .* give vocab=",
        ),
        (lambda: fuse_heads(hidden_states, heads, [1.0], mask=mask), r"weights must be of shape \[num_sources=3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"heads\[1\] must be torch.float32, as hidden_states\[1\], got torch.float64"):
        fuse_heads(hidden_states, [heads[0], heads[1].double(), heads[2]], weights, mask=mask)
