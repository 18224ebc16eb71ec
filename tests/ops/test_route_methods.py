"""Every way to choose experts by scores: its paper's arithmetic in plain loops, then gradients and edges."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import (
    cosine_logits,
    expert_ffn,
    identity_weights,
    mask_experts,
    plan_dispatch,
    route,
    route_expert_choice,
    route_forced,
    route_soft,
    route_top_p,
    route_two_level,
    route_weights,
    tune_experts,
)
from moe_kernels.ops.route import native
from moe_kernels.testing import assert_close_to_reference
from tests.ops.helpers import DTYPES, check, strided

GPU_KERNELS = ["native-simt", "native-cuda", "triton-cpu", "triton-cuda"]
OP = "route_weights"

BACKENDS = ["reference", "native"]
EPS = torch.finfo(torch.float32).eps

# each takes logits [num_tokens, 8] alone; no k of n <= 8 equal experts have probability 0.55 or 0.9, so that rounding
# does not decide
METHODS = {
    "top_p": partial(route_top_p, top_p=0.55),
    "top_p_narrow": partial(route_top_p, top_p=0.9, max_experts=3, renormalize=True, scaling_factor=2.0),
    "top_p_all": partial(route_top_p, top_p=1.0),
    "expert_choice": partial(route_expert_choice, capacity=4, scaling_factor=0.5),
    "null_experts": partial(route, top_k=4, num_null_experts=3, renormalize=True),
    "null_experts_sigmoid": partial(route, top_k=4, num_null_experts=3, score="sigmoid"),
    "soft": route_soft,
    "soft_sigmoid": partial(route_soft, score="sigmoid"),
}


def tokens(weights, ids):
    """{token: {expert: weight}} of the pairs that are not skipped."""
    return [
        {expert: weight for expert, weight in zip(row_ids, row, strict=True) if expert >= 0}
        for row_ids, row in zip(ids.tolist(), weights.tolist(), strict=True)
    ]


def assert_same(actual, expected):
    ids, weights = actual
    for token, (found, wanted) in enumerate(zip(tokens(weights, ids), expected, strict=True)):
        assert found.keys() == wanted.keys(), token
        for expert, weight in wanted.items():
            assert math.isclose(found[expert], weight, rel_tol=EPS), (token, expert)


def softmax(row):
    largest = max(row)
    exps = [math.exp(x - largest) for x in row]
    return [x / sum(exps) for x in exps]


# ---- the papers, one token at a time ----


def dynamic_moe(row, top_p):
    """Harder Tasks Need More Experts, eq. 3-5: the smallest set whose probability exceeds p; weights are P."""
    probs = softmax(row)
    chosen, total = {}, 0.0
    for expert in sorted(range(len(row)), key=lambda e: (-probs[e], e)):
        chosen[expert] = probs[expert]
        total += probs[expert]
        if total > top_p:
            break
    return chosen


def expert_choice(logits, capacity):
    """Expert Choice, section 3.2: S = softmax over experts; each expert (row of S^T) takes its top k tokens."""
    probs = [softmax(row) for row in logits]
    chosen = [{} for _ in logits]
    for expert in range(len(logits[0])):
        order = sorted(range(len(logits)), key=lambda t: (-probs[t][expert], t))
        for token in order[:capacity]:
            chosen[token][expert] = probs[token][expert]
    return chosen


def adamoe(row, top_k, num_null):
    """AdaMoE, eq. 4-6: top-k over real and null experts, normalised over the real ones of the choice."""
    probs = softmax(row)
    picked = sorted(range(len(row)), key=lambda e: (-probs[e], e))[:top_k]
    real = [expert for expert in picked if expert < len(row) - num_null]
    total = sum(probs[expert] for expert in real)
    return {expert: probs[expert] / total if expert in real else 0.0 for expert in picked}


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.4, 0.8, 0.999])
def test_top_p_equals_its_paper(which, top_p):
    logits = torch.randn(40, 9, dtype=torch.float64) * 2
    assert_same(route_top_p(logits, top_p, backend=which), [dynamic_moe(row, top_p) for row in logits.tolist()])


@pytest.mark.parametrize("which", BACKENDS)
# none, some, all tokens, more than all
@pytest.mark.parametrize("capacity", [0, 1, 5, 30, 99])
def test_expert_choice_equals_its_paper(which, capacity):
    logits = torch.randn(30, 7, dtype=torch.float64)
    assert_same(route_expert_choice(logits, capacity, backend=which), expert_choice(logits.tolist(), capacity))


@pytest.mark.parametrize("which", BACKENDS)
def test_null_experts_equal_adamoe(which):
    logits = torch.randn(60, 10, dtype=torch.float64)
    actual = route(logits, 4, num_null_experts=5, renormalize=True, backend=which)
    assert_same(actual, [adamoe(row, 4, 5) for row in logits.tolist()])
    # some tokens take null experts alone: nothing is divided by zero
    only_null = (actual[0] >= 5).all(1)
    assert only_null.any() and (actual[1][only_null] == 0).all()


@pytest.mark.parametrize("which", BACKENDS)
def test_null_and_dropped_pairs_are_no_work(which):
    logits = torch.randn(50, 12)
    ids, _ = route(logits, 4, num_null_experts=6, backend=which)
    plan = plan_dispatch(ids, 6, backend=which)
    real = ((ids >= 0) & (ids < 6)).sum().item()
    assert plan.expert_offsets[-1].item() == real < ids.numel()


@pytest.mark.parametrize("which", BACKENDS)
def test_longcat_identity_experts(which):
    """LongCat-Flash: softmax over real and zero experts, choice by score + bias; zero experts return the input."""
    num_experts, num_zero, hidden_size, intermediate_size = 4, 3, 8, 6
    x = torch.randn(20, hidden_size, dtype=torch.float64)
    logits, bias = torch.randn(20, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64) / 10
    gate_up = torch.randn(num_experts, 2 * intermediate_size, hidden_size, dtype=torch.float64)
    down = torch.randn(num_experts, hidden_size, intermediate_size, dtype=torch.float64)
    ids, weights = route(logits, 3, scaling_factor=1.5, expert_bias=bias, backend=which)
    out = expert_ffn(x, ids, weights, gate_up, down, backend=which)
    out = out + identity_weights(ids, weights, num_experts)[:, None] * x

    expected = torch.zeros_like(x)
    for t in range(20):
        probs = logits[t].softmax(0)
        for e in (probs + bias).topk(3).indices.tolist():
            if e < num_experts:
                gate, up = (gate_up[e] @ x[t]).chunk(2)
                y = down[e] @ (torch.nn.functional.silu(gate) * up)
            else:
                y = x[t]
            expected[t] += 1.5 * probs[e] * y
    eager = expected.float()
    assert_close_to_reference(out.float(), expected, eager)
    assert (ids >= num_experts).any() and num_zero == logits.shape[1] - num_experts


# ---- kernels against the reference ----


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
# 8 is one vector of AVX2 floats; the methods' arguments are made for it
def test_forward_and_backward(backend, dtype, name):
    logits = torch.randn(70, 8).to(dtype)
    method = METHODS[name]
    ids, _ = method(logits, backend=backend)
    expected_ids, _ = method(logits, backend="reference")
    assert torch.equal(ids, expected_ids)
    check(lambda x, backend: method(x, backend=backend)[1], [logits], backend)


# an odd number of vectors, a real model's 256
@pytest.mark.parametrize("num_experts", [60, 256])
@pytest.mark.parametrize("method", [partial(route_top_p, top_p=0.4), partial(route_expert_choice, capacity=9)])
def test_many_experts(backend, num_experts, method):
    logits = torch.randn(70, num_experts, dtype=torch.float64)  # no two scores within rounding of each other
    actual, expected = method(logits, backend=backend), method(logits, backend="reference")
    assert torch.equal(actual[0], expected[0])
    check(lambda x, backend: method(x, backend=backend)[1], [logits], backend)


@pytest.mark.parametrize("name", METHODS)
def test_gradcheck(backend, name):
    logits = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: METHODS[name](x, backend=backend)[1], logits)


@given(
    rows=st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, -math.inf]), min_size=8, max_size=8), max_size=8),
    name=st.sampled_from(sorted(METHODS.keys() - {"expert_choice"})),  # compares rows: equal scores only if equal rows
)
@settings(deadline=None)
def test_ties_and_masks_as_in_the_reference(rows, name):
    logits = torch.tensor(rows, dtype=torch.float64).reshape(-1, 8)
    ids, weights = METHODS[name](logits)
    expected_ids, expected = METHODS[name](logits, backend="reference")
    assert torch.equal(ids, expected_ids)
    assert_close_to_reference(weights.float(), expected, expected.float())


@given(rows=st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=6, max_size=6), min_size=1, max_size=8))
@settings(deadline=None)
def test_ties_take_the_lowest_expert(rows):
    for row, chosen in zip(rows, route_top_p(torch.tensor(rows), 0.7)[0].tolist(), strict=True):
        order = sorted(range(6), key=lambda e: (-row[e], e))
        assert [e for e in chosen if e >= 0] == order[: sum(e >= 0 for e in chosen)]


# no expert has one score in two of these rows
ROWS = ([0.0, 0.0, 0.0, 0.0], [2.0, 1.0, 0.0, 0.0], [0.0, 0.5, -math.inf, 3.0])


@given(rows=st.lists(st.sampled_from(ROWS), min_size=1, max_size=12), which=st.sampled_from(BACKENDS))
@settings(deadline=None)
def test_ties_take_the_lowest_token(rows, which):
    ids, weights = route_expert_choice(torch.tensor(rows, dtype=torch.float64), 3, backend=which)
    for expert in range(4):
        taken = [token for token, chosen in enumerate(tokens(weights, ids)) if expert in chosen]
        eligible = [token for token in range(len(rows)) if rows[token][expert] > -math.inf]
        order = sorted(eligible, key=lambda t: (-softmax(rows[t])[expert], t))
        assert taken == sorted(order[:3])


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("name", METHODS)
def test_masked_and_broken_rows(which, name):
    logits = torch.randn(4, 8)
    logits[1] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    logits.requires_grad_()
    ids, weights = METHODS[name](logits, backend=which)
    assert (ids[1:] == -1).all() and (weights[1:] == 0).all()
    (grad,) = torch.autograd.grad((weights * torch.randn_like(weights)).sum(), logits)
    assert (grad[1:] == 0).all() and grad[0].isfinite().all() and grad[0].any()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(backend, name, num_tokens):
    logits = torch.randn(num_tokens, 8, requires_grad=True)
    ids, weights = METHODS[name](logits, backend=backend)
    expected_ids, expected = METHODS[name](logits, backend="reference")
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert torch.equal(ids, expected_ids) and weights.shape == expected.shape
    weights.sum().backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("name", METHODS)
def test_strides_and_threads(backend, threads, name):
    logits = torch.randn(70, 8)
    expected = METHODS[name](logits, backend=backend)
    for view in (strided(logits), logits.T.contiguous().T):
        for actual, e in zip(METHODS[name](view, backend=backend), expected, strict=True):
            assert torch.equal(actual, e)


@pytest.mark.parametrize("name", METHODS)
def test_compile(backend, name):
    method = partial(METHODS[name], backend=backend)
    compiled = torch.compile(lambda x: method(x), fullgraph=True, dynamic=True)
    for num_tokens in (6, 9):
        logits = torch.randn(num_tokens, 8, requires_grad=True)
        (ids, weights), (expected_ids, expected) = compiled(logits), method(logits)
        assert torch.equal(ids, expected_ids) and torch.equal(weights, expected)
        grads = [torch.autograd.grad(w.square().sum(), logits)[0] for w in (weights, expected)]
        assert torch.equal(*grads)


def test_registration(backend):
    logits = torch.randn(5, 8)
    ids = torch.tensor([[0, -1], [3, 3], [9, 2], [7, 1], [4, 5]], dtype=torch.int32)
    torch.library.opcheck(native.route_weights, (logits, ids, 0, True, 1.0))
    torch.library.opcheck(native.route_top_p, (logits, 0.4, 8, False, 1.0))
    torch.library.opcheck(native.route_expert_choice, (logits, 2, 1.0))


# ---- weights of experts that something else chose ----


@pytest.mark.on_gpus
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_route_weights(backend, score, renormalize, ids_dtype):
    logits = torch.randn(6, 5)
    logits[0, 2] = -torch.inf
    logits[1, 0] = torch.nan
    # one masked, one broken row, ids outside, one expert twice, none, an id that must not wrap around
    far = 2**40 if ids_dtype == torch.int64 else 2**31 - 1
    ids = torch.tensor([[2, 1], [1, 2], [-1, 5], [3, 3], [-1, -1], [4, far]], dtype=ids_dtype)
    options = dict(score=score, renormalize=renormalize, scaling_factor=1.5)
    check(lambda x, backend: route_weights(x, ids, **options, backend=backend), [logits], backend)
    weights = route_weights(logits, ids, **options, backend=backend)
    assert (weights[[1, 2, 4]] == 0).all() and weights[0, 0] == 0 and weights[5, 1] == 0
    if renormalize:
        assert weights[3].tolist() == [0.75, 0.75]


def test_route_weights_gradcheck(backend):
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[2, 1], [3, 3], [-1, 4], [0, 9]])
    for options in (dict(), dict(renormalize=True), dict(score="sigmoid", renormalize=True)):
        assert torch.autograd.gradcheck(
            lambda x, options=options: route_weights(x, ids, **options, backend=backend), logits
        )


@pytest.mark.parametrize("which", BACKENDS)
def test_route_weights_gives_back_what_route_gave(which):
    logits = torch.randn(20, 8)
    ids, weights = route(logits, 3, renormalize=True, backend=which)
    assert torch.equal(route_weights(logits, ids, renormalize=True, backend=which), weights)


@pytest.mark.parametrize("which", BACKENDS)
def test_forced_ids(which):
    ids, weights = route_forced(torch.tensor([3, -1, 0]), backend=which)
    assert ids.tolist() == [[3], [-1], [0]] and weights.tolist() == [[1.0], [0.0], [1.0]]
    # sequences 1, 0, 0 and three that are not there
    sequence_ids = torch.tensor([1, 0, 0, -1, -2, 2])
    ids, weights = route_forced(torch.tensor([[2, 4], [1, -1]]), sequence_ids=sequence_ids, backend=which)
    assert ids.tolist() == [[1, -1], [2, 4], [2, 4]] + 3 * [[-1, -1]] and ids.dtype == torch.int32
    assert weights.tolist() == [[1, 0], [1, 1], [1, 1]] + 3 * [[0, 0]]
    logits = torch.randn(4, 5, requires_grad=True)
    ids, weights = route_forced(torch.tensor([0, 4, 2, 1]), logits=logits, score="sigmoid", backend=which)
    expected = logits.sigmoid()[torch.arange(4), [0, 4, 2, 1]]
    assert_close_to_reference(weights[:, 0].detach(), expected.detach().double(), expected.detach())
    weights.sum().backward()
    assert (logits.grad != 0).sum() == 4


@pytest.mark.parametrize("which", BACKENDS)
def test_soft_is_the_matrix_of_scores(which):
    logits = torch.randn(6, 5, dtype=torch.float64)
    logits[2, 3] = -torch.inf
    ids, weights = route_soft(logits, backend=which)
    assert ids[0].tolist() == [0, 1, 2, 3, 4] and ids[2].tolist() == [0, 1, 2, -1, 4]
    assert_close_to_reference(weights.float(), logits.softmax(1), logits.softmax(1).float())


# ---- two levels ----


def dmoerm(group_row, expert_row, top_groups, top_k):
    """DMoERM, section 3: an outer router sends the input to a task's model, whose experts an inner one mixes."""
    size = len(expert_row) // len(group_row)
    outer = softmax(group_row)
    groups = sorted(range(len(group_row)), key=lambda g: (-outer[g], g))[:top_groups]
    chosen = {}
    for group in groups:
        inner = softmax(expert_row[group * size : (group + 1) * size])
        picked = sorted(range(size), key=lambda e: (-inner[e], e))[:top_k]
        for expert in picked:
            share = outer[group] / sum(outer[g] for g in groups)
            chosen[group * size + expert] = share * inner[expert] / sum(inner[e] for e in picked)
    return chosen


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(("top_groups", "top_k"), [(1, 4), (2, 2), (3, 1)])
def test_two_levels(which, top_groups, top_k):
    group_logits, expert_logits = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 12, dtype=torch.float64)
    ids, weights = route_two_level(group_logits, expert_logits, top_groups, top_k, backend=which)
    assert ids.shape == (20, top_groups * top_k)
    rows = zip(group_logits.tolist(), expert_logits.tolist(), strict=True)
    assert_same((ids, weights), [dmoerm(*row, top_groups, top_k) for row in rows])


def test_two_levels_gradcheck(backend):
    inputs = [torch.randn(3, size, dtype=torch.float64, requires_grad=True) for size in (3, 12)]
    function = partial(route_two_level, top_groups=2, top_k=2, renormalize_groups=False, backend=backend)
    assert torch.autograd.gradcheck(lambda *logits: function(*logits)[1], inputs)


@pytest.mark.parametrize("which", BACKENDS)
def test_two_levels_with_known_tasks_and_broken_rows(which):
    expert_logits = torch.randn(3, 6)
    group_logits = torch.full((3, 3), -torch.inf)
    group_logits[0, 2] = 0
    group_logits[1] = torch.nan
    ids, weights = route_two_level(group_logits, expert_logits, 2, 2, backend=which)
    assert sorted(ids[0].tolist()) == [-1, -1, 4, 5] and (ids[1:] == -1).all() and (weights[1:] == 0).all()
    assert math.isclose(weights[0].sum().item(), 1, rel_tol=EPS)


# ---- masks, switches, cosine ----


@pytest.mark.parametrize("which", BACKENDS)
def test_masked_experts_are_never_chosen(which):
    logits = torch.randn(30, 6, requires_grad=True)
    allowed = torch.rand(30, 6) < 0.5
    for method in (partial(route, top_k=3), partial(route_top_p, top_p=0.9), partial(route_expert_choice, capacity=20)):
        ids, weights = method(mask_experts(logits, allowed), backend=which)
        for token, chosen in enumerate(tokens(weights, ids)):
            assert all(allowed[token, expert] for expert in chosen)
        (grad,) = torch.autograd.grad(weights.sum(), logits)
        assert (grad[~allowed] == 0).all()
    padding = torch.arange(30)[:, None] < 20
    ids, _ = route(mask_experts(logits, padding), 2, backend=which)
    assert (ids[:20] >= 0).all() and (ids[20:] == -1).all()


@pytest.mark.parametrize("which", BACKENDS)
def test_experts_are_switched_by_a_bias(which):
    logits = torch.randn(40, 8)
    plain_ids, _ = route(logits, 3, backend=which)
    bias = tune_experts(8, off=[1, 6], forced=[4], boost={2: 0.3})
    ids, weights = route(logits, 3, expert_bias=bias, backend=which)
    assert not ((ids == 1) | (ids == 6)).any() and (ids[:, 0] == 4).all()
    assert (ids == 2).sum() > (plain_ids == 2).sum()
    scores = logits.softmax(1)
    assert_close_to_reference(weights, logits.double().softmax(1).gather(1, ids.long()), scores.gather(1, ids.long()))


@pytest.mark.parametrize("which", BACKENDS)
def test_more_forced_experts_than_picks(which):
    ids, _ = route(torch.randn(5, 6), 2, expert_bias=tune_experts(6, forced=[5, 1, 3]), backend=which)
    assert ids.tolist() == [[1, 3]] * 5


@pytest.mark.parametrize("which", BACKENDS)
def test_a_forced_expert_forces_its_group(which):
    bias = tune_experts(6, forced=[5], off=[4])
    for group_score in ("max", "top2_sum"):
        ids, _ = route(
            torch.zeros(1, 6), 1, num_groups=3, topk_groups=1, group_score=group_score, expert_bias=bias, backend=which
        )
        assert ids.tolist() == [[5]]


def test_cosine_logits():
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    embeddings = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    logits = cosine_logits(x, embeddings, temperature)
    for t in range(7):
        for e in range(3):
            angle = torch.dot(x[t], embeddings[e]) / (x[t].norm() * embeddings[e].norm())
            assert math.isclose(logits[t, e].item(), (angle / temperature).item(), rel_tol=EPS)
    assert torch.autograd.gradcheck(cosine_logits, (x, embeddings, temperature))
    assert (cosine_logits(torch.zeros(1, 4), torch.randn(3, 4)) == 0).all()


def test_bad_input():
    logits = torch.randn(3, 8)
    for call, message in [
        (lambda: route_top_p(logits, 0), "route_top_p: top_p must be above 0, got 0"),
        (lambda: route_top_p(logits, math.nan), "top_p must be above 0, got nan"),
        (lambda: route_top_p(logits, 0.4, max_experts=9), r"max_experts must be in \[0, num_experts=8\], got 9"),
        (lambda: route_expert_choice(logits, -1), "capacity must be at least 0, got -1"),
        (lambda: route(logits, 2, num_null_experts=9), r"num_null_experts must be in \[0, num_experts=8\], got 9"),
        (lambda: mask_experts(logits, torch.ones(7, dtype=torch.bool)), r"allowed must be of shape .*, got \[7\]"),
        (lambda: tune_experts(8, off=[8]), r"expert must be in \[0, num_experts=8\), got 8"),
        (lambda: tune_experts(8, off=[1], forced=[1]), "each expert must be named once, got 1 named twice"),
        (lambda: route_weights(logits, torch.zeros(2, 1).int()), r"topk_ids must be of shape \[num_tokens=3, top_k\]"),
        (lambda: route_two_level(logits, torch.randn(3, 12), 1, 1), "num_groups must be a divisor of num_experts=12"),
        (lambda: route_two_level(logits[:, :4], logits, 1, 3), r"top_k must be in \[0, group size=2\], got 3"),
        (lambda: route_two_level(logits[:, :4], logits, 5, 1), r"top_groups must be in \[0, num_groups=4\], got 5"),
        (lambda: cosine_logits(logits, torch.randn(4, 7)), r"must be of shape \[num_experts, size=8\], got \[4, 7\]"),
        (lambda: cosine_logits(logits, logits, 0.0), "temperature must be above 0, got 0.0"),
        (lambda: identity_weights(torch.zeros(3, 2).int(), logits, 8), "topk_weights must be of shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="allowed must be torch.bool"):
        mask_experts(logits, torch.ones(8))
    with pytest.raises(TypeError, match="expert_ids must be one of"):
        route_forced(torch.zeros(3))
