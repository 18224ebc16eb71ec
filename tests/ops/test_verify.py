"""Verified drafts: the tokens that come out are distributed as the fused target, counted exactly and by chance."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from moe_kernels import TokenFilter, fuse_logits, fused_verify
from moe_kernels.ops.logit_fusion import reference, verify_draft

OP = "fuse_logits"
INF, NAN = math.inf, math.nan

#: probabilities in quarters: ratios and residuals are then in twelfths, and a grid of twelve uniforms counts exactly
QUARTERS = [list(p) for p in product(range(5), repeat=3) if sum(p) == 4]
GRID = 12


@pytest.mark.parametrize("draft", QUARTERS, ids=str)
def test_every_outcome_counted(draft):
    p = torch.tensor(draft, dtype=torch.float64) / 4
    uniforms = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    for target in QUARTERS:
        q = torch.tensor(target, dtype=torch.float64) / 4
        cases = torch.cartesian_prod(torch.arange(3.0).double(), uniforms, uniforms)
        tokens, accept, resample = cases[:, :1].long(), cases[:, 1:2], cases[:, 2:]
        count, token = reference.verify(
            q.expand(len(cases), 2, 3), p.expand(len(cases), 1, 3), tokens, accept, resample.expand(-1, 2)
        )
        out = torch.where(count == 1, tokens[:, 0], token)
        mass = torch.zeros(3, dtype=torch.float64).index_add(0, out, p[tokens[:, 0]] / GRID**2)
        assert (mass - q).abs().max() < 1 / (2 * GRID**2)  # less than one case: every one fell where it must
        kept = (p[tokens[:, 0]] * (count == 1)).sum() / GRID**2
        assert abs(kept - torch.minimum(p, q).sum()) < 1 / (2 * GRID**2)


def by_hand(target: Tensor, draft: Tensor, tokens: Tensor, accept: Tensor, resample: Tensor) -> list[tuple[int, int]]:
    """Token by token in Python's floats."""
    results = []
    for row in range(tokens.shape[0]):
        count = 0
        for t, x in enumerate(tokens[row].tolist()):
            if x < 0 or not accept[row, t] * draft[row, t, x] < target[row, t, x]:
                break
            count += 1
        weights = target[row, count].tolist()
        if count < tokens.shape[1] and tokens[row, count] >= 0:
            weights = [max(q - p, 0.0) for q, p in zip(weights, draft[row, count].tolist(), strict=True)]
        goal, token = resample[row, count].item() * sum(weights), 0
        while goal >= weights[token]:
            goal -= weights[token]
            token += 1
        results.append((count, token))
    return results


def test_is_the_rule_by_hand():
    target, draft = torch.randn(200, 5, 9).softmax(2).double(), torch.randn(200, 4, 9).softmax(2).double()
    tokens = torch.randint(-1, 9, (200, 4))
    accept, resample = torch.rand(200, 4).double(), torch.rand(200, 5).double()
    counts, token = reference.verify(target, draft, tokens, accept, resample)
    expected = by_hand(target, draft, tokens, accept, resample)
    assert list(zip(counts.tolist(), token.tolist(), strict=True)) == expected
    assert len(set(counts.tolist())) == 5


def chi_squared(tokens: Tensor, probs: Tensor) -> float:
    """How many standard deviations above its mean."""
    expected = probs.double() * tokens.numel()
    counts = torch.bincount(tokens, minlength=probs.numel())
    common = expected > 20
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    used = expected > 0
    freedom = used.sum().item() - 1
    return (((counts - expected).square() / expected)[used].sum().item() - freedom) / (2 * freedom) ** 0.5


DRAFTS = {
    "plain": ({}, {}),
    "filtered": (dict(draft_temperature=0.7, draft_keep=TokenFilter(top_k=10)), dict(mask=TokenFilter(top_p=0.9))),
    "likeliest": (dict(draft_temperature=0.0), dict(temperature=1.3)),
}


@pytest.mark.with_reference
@pytest.mark.parametrize("name", DRAFTS)
def test_tokens_are_distributed_as_the_target(backend, name):
    num_rows, num_draft, vocab_size, weights = 20_000, 2, 40, [1.0, 0.8, -0.8]
    drafting, fusing = DRAFTS[name]
    # every row reads the same: position t has the same distribution in all
    logits = [1.5 * torch.randn(1, num_draft + 1, vocab_size) for _ in weights]
    ids = torch.arange(num_rows)
    draw = dict(out="sample", request_ids=ids, seed=3, backend=backend)
    tokens = torch.stack(
        [
            fuse_logits(
                [logits[1][:, t].expand(num_rows, -1)],
                [1.0],
                temperature=drafting.get("draft_temperature", 1.0),
                keep=drafting.get("draft_keep"),
                step=t,
                **draw,
            )
            for t in range(num_draft)
        ],
        1,
    )
    sources = [source.expand(num_rows, -1, -1) for source in logits]
    # the seed that drafted: the draws of the verification are others all the same
    verified = fused_verify(
        sources, weights, tokens, draft=1, request_ids=ids, seed=3, backend=backend, **drafting, **fusing
    )
    target = fuse_logits([source[0] for source in logits], weights, out="probs", backend=backend, **fusing)
    count, token = verified
    for t in range(num_draft + 1):
        reached = count >= t
        came = torch.where(count == t, token, tokens[:, min(t, num_draft - 1)])[reached]
        assert reached.sum() > 200
        assert chi_squared(came, target[t]) < 5
        assert (target[t][came] > 0).all()


def inputs(num_rows: int = 6, num_draft: int = 3, vocab_size: int = 30):
    sources = [torch.randn(num_rows, num_draft + 1, vocab_size) for _ in range(3)]
    return sources, torch.randint(0, vocab_size, (num_rows, num_draft))


def test_backends_agree_and_rows_stand_alone(backend, threads):
    sources, tokens = inputs(num_rows=40)
    ids = torch.arange(40) * 2**33
    arguments = dict(draft=2, seed=1, step=9, temperature=torch.linspace(0.5, 2, 40))
    weights = torch.tensor([1.0, 0.5, -0.5]) + 0.1 * torch.rand(40, 3)
    verified = fused_verify(sources, weights, tokens, request_ids=ids, backend=backend, **arguments)
    doubles = [source.double() for source in sources]
    expected = fused_verify(doubles, weights, tokens, request_ids=ids, backend="reference", **arguments)
    for ours, reference64 in zip(verified, expected, strict=True):
        assert torch.equal(ours, reference64)
    assert len(set(verified.num_accepted.tolist())) > 2
    rows = torch.tensor([7, 3, 30])
    arguments |= {"temperature": arguments["temperature"][rows], "request_ids": ids[rows]}
    some = fused_verify([s[rows] for s in sources], weights[rows], tokens[rows], backend=backend, **arguments)
    for ours, all_rows in zip(some, verified, strict=True):
        assert torch.equal(ours, all_rows[rows])


@pytest.mark.with_reference
def test_a_draft_that_is_the_target_stays(backend):
    sources, _ = inputs()
    tokens = fuse_logits([sources[0][:, :3].flatten(0, 1)], [1.0], out="argmax", backend=backend).view(6, 3)
    arguments = dict(draft=0, request_ids=torch.arange(6), seed=0, backend=backend)
    verified = fused_verify(sources, [1.0, 0.0, 0.0], tokens, **arguments)
    assert (verified.num_accepted == 3).all() and (verified.token >= 0).all()
    # at temperature 0 the target is a token: what it is stays, the first other one is replaced by it
    greedy = fused_verify(sources, [1.0, 0.0, 0.0], tokens, temperature=0.0, **arguments)
    assert (greedy.num_accepted == 3).all() and torch.equal(greedy.token, sources[0][:, 3].argmax(1))
    other = tokens.clone()
    other[:, 1] = (other[:, 1] + 1) % 30
    greedy = fused_verify(sources, [1.0, 0.0, 0.0], other, temperature=0.0, **arguments)
    assert (greedy.num_accepted == 1).all() and torch.equal(greedy.token, tokens[:, 1])


@pytest.mark.with_reference
def test_broken_empty_and_undrafted_rows(backend):
    sources, tokens = inputs(num_rows=4)
    sources = [sources[0], 0 * sources[1]]
    sources[0][0, 0, 2] = NAN
    sources[0][1, 0] = -INF
    tokens[2, 0] = -1
    tokens[3, 0], sources[0][3, 0, tokens[3, 0]] = 5, 0.0
    sources[0][3, 0, 5] = -INF  # drafted, and impossible
    arguments = dict(draft=1, request_ids=torch.arange(4), seed=0, backend=backend)
    verified = fused_verify(sources, [1.0, 0.0], tokens, **arguments)
    assert verified.num_accepted.tolist() == [0, 0, 0, 0]
    assert verified.token[:2].tolist() == [-1, -1] and (verified.token[2:] >= 0).all() and verified.token[3] != 5


@pytest.mark.with_reference
def test_the_draft_may_know_more_tokens(backend):
    sources, tokens = inputs()
    wide = torch.nn.functional.pad(sources[1], (0, 7))
    tokens[:, 0] = 33  # past what the target knows
    arguments = dict(draft=1, request_ids=torch.arange(6), seed=0, backend=backend)
    verified = fused_verify([sources[0], wide], [1.0, 0.5], tokens, **arguments)
    assert (verified.num_accepted == 0).all() and (verified.token < 30).all()


def test_bad_input():
    sources, tokens = inputs()
    ids = torch.arange(6)
    for call, message in [
        (
            lambda: fused_verify(sources, [1.0, 1, 1], tokens[:, :0], draft=0, request_ids=ids, seed=0),
            r"fused_verify: draft_tokens must be of shape \[num_rows, num_draft >= 1\]",
        ),
        (
            lambda: fused_verify(sources, [1.0, 1, 1], tokens[:, :2], draft=0, request_ids=ids, seed=0),
            r"sources\[0\] must be of shape \[num_rows=6, num_draft \+ 1 = 3, vocab_size\], got \[6, 4, 30\]",
        ),
        (
            lambda: fused_verify(sources, [1.0, 1, 1], tokens, draft=3, request_ids=ids, seed=0),
            r"draft must be in \[0, num_sources=3\), got 3",
        ),
        (
            lambda: fused_verify(sources, [1.0, 1, 1], tokens, draft=0, request_ids=ids[:2], seed=0),
            r"request_ids must be of shape \[num_rows=6\]",
        ),
        (
            lambda: verify_draft(torch.rand(6, 3, 5), torch.rand(6, 3, 5), tokens, request_ids=ids, seed=0),
            r"target_probs must be of shape \[num_rows=6, 4, vocab_size\]",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="draft_tokens must be torch.int64, got torch.int32"):
        fused_verify(sources, [1.0, 1, 1], tokens.int(), draft=0, request_ids=ids, seed=0)
