"""route: forward, backward, edges, registration, compile."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_kernels import route
from moe_kernels.ops.route import native
from tests.ops.helpers import DTYPES, SLOW, check, strided

OP = "route"
KERNELS = ["native-cpu", "native-simt", "native-ptx", "native-cuda", "triton-cpu", "triton-ptx", "triton-cuda"]

# one for each router in transformers that route() covers
MODES = {
    "mixtral": dict(top_k=2, renormalize=True),
    "olmoe": dict(top_k=3),
    "deepseek_v2_groups": dict(top_k=3, num_groups=4, topk_groups=2, scaling_factor=16.0),
    "deepseek_v3": dict(
        top_k=4, score="sigmoid", renormalize=True, scaling_factor=2.5, num_groups=4, topk_groups=2,
        group_score="top2_sum", expert_bias=True,
    ),
    "llama4": dict(top_k=1, score="sigmoid"),
}  # fmt: skip

PTX_MODES = ("mixtral", "deepseek_v3")  # softmax and sigmoid, without and with groups and a bias


def mode(name: str, num_experts: int) -> dict:
    arguments = dict(MODES[name])
    if arguments.pop("expert_bias", False):
        arguments["expert_bias"] = torch.linspace(-0.3, 0.3, num_experts)
    return arguments


# expert counts: one group of 2 and of 4, an odd number of vectors, a real model's 256; more than a GPU's lane holds few
# of, and more than it holds
@pytest.mark.parametrize("num_experts", [8, 16, 60, 256, 384, 1000])
@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(backend, kernel_id, dtype, name, num_experts):
    if kernel_id.endswith("ptx") and (num_experts < 60 or (dtype != torch.float32 and name not in PTX_MODES)):
        pytest.skip("seconds each in the PTX interpreter; the cases that stay run the same kernels")
    logits = torch.randn(5 if kernel_id in SLOW else 70, num_experts).to(dtype)
    arguments = mode(name, num_experts)
    ids, _ = route(logits, **arguments, backend=backend)
    expected_ids, _ = route(logits, **arguments, backend="reference")
    # low-precision logits are float32 inside, so both see the same scores up to rounding: picks differ only at ties
    assert torch.equal(ids.sort(1).values, expected_ids.sort(1).values)
    check(lambda x, backend: route(x, **arguments, backend=backend)[1].sort(1).values, [logits], backend)


def transformers_deepseek_v3(logits, bias, top_k, num_groups, topk_groups, scaling_factor):
    """DeepSeek-V3's router in the words of its paper (arXiv 2412.19437, section 2.1.2), per token."""
    ids, weights = [], []
    for row in logits:
        scores = row.sigmoid()
        choice = scores + bias
        groups = choice.view(num_groups, -1)
        best_groups = groups.topk(2, 1).values.sum(1).topk(topk_groups).indices
        masked = torch.full_like(groups, -torch.inf)
        masked[best_groups] = groups[best_groups]
        chosen = masked.flatten().topk(top_k).indices
        ids.append(chosen)
        weights.append(scores[chosen] / scores[chosen].sum() * scaling_factor)
    return torch.stack(ids), torch.stack(weights)


@pytest.mark.with_reference
def test_deepseek_v3_equals_its_paper(backend):
    logits, bias = torch.randn(40, 32, dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    ids, weights = route(
        logits, 6, score="sigmoid", renormalize=True, scaling_factor=2.5, expert_bias=bias, num_groups=8, topk_groups=3,
        group_score="top2_sum", backend=backend,
    )  # fmt: skip
    expected_ids, expected_weights = transformers_deepseek_v3(logits, bias, 6, 8, 3, 2.5)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.with_reference
def test_gpt_oss_is_the_renormalised_softmax(backend):
    logits = torch.randn(40, 32, dtype=torch.float64)
    values, expected_ids = logits.topk(4)
    ids, weights = route(logits, 4, renormalize=True, backend=backend)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights, values.softmax(1))


@given(
    rows=st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=6, max_size=6), max_size=8),
    top_k=st.integers(0, 6),
    score=st.sampled_from(["softmax", "sigmoid"]),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ties_take_the_lowest_id(backend, rows, top_k, score):
    logits = torch.tensor(rows).reshape(-1, 6)
    ids, _ = route(logits, top_k, score=score, backend=backend)
    for row, chosen in zip(logits.tolist(), ids.tolist(), strict=True):
        assert chosen == sorted(range(6), key=lambda e: (-row[e], e))[:top_k]


@pytest.mark.parametrize("name", MODES)
def test_gradcheck(backend, kernel_id, name):
    if kernel_id.endswith("ptx"):
        pytest.skip("a hundred launches; test_forward_and_backward has the gradients")
    logits = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: route(x, **mode(name, 8), backend=backend)[1], logits)


@pytest.mark.with_reference
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_masked_and_broken_rows(backend, score):
    logits = torch.tensor([[1.0, -torch.inf, 0.0], [torch.nan, 1, 2], [torch.inf, 1, 2], [-torch.inf] * 3])
    logits.requires_grad_()
    ids, weights = route(logits, 3, score=score, renormalize=True, backend=backend)
    assert ids.tolist() == [[0, 2, -1], [-1] * 3, [-1] * 3, [-1] * 3]
    assert weights[0, 2] == 0 and torch.equal(weights[1:], torch.zeros(3, 3))
    (grad,) = torch.autograd.grad(weights[:, 0].sum(), logits)
    assert torch.equal(grad[1:], torch.zeros(3, 3)) and grad[0].isfinite().all()


@pytest.mark.with_reference
def test_groups_with_masked_experts_are_still_filled(backend):
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, -torch.inf]])
    ids, weights = route(logits, 1, num_groups=2, topk_groups=1, group_score="top2_sum", backend=backend)
    assert ids.tolist() == [[1]] and weights.tolist() == [[1.0]]


@pytest.mark.with_reference
def test_bias_chooses_but_is_not_differentiated(backend):
    bias = torch.tensor([0.0, torch.nan, 0.5, 0.0], requires_grad=True)
    ids, weights = route(torch.zeros(1, 4), 2, expert_bias=bias, backend=backend)
    assert ids.tolist() == [[2, 0]] and not weights.requires_grad


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (3, 4, 0), (3, 0, 0), (1, 1, 1)])
def test_edges(backend, num_tokens, num_experts, top_k):
    logits = torch.randn(num_tokens, num_experts, requires_grad=True)
    ids, weights = route(logits, top_k, backend=backend)
    assert ids.shape == weights.shape == (num_tokens, top_k)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    weights.sum().backward()
    assert logits.grad.shape == logits.shape


def test_extreme_logits(backend):
    logits = torch.tensor([[1e4, 0.0, -1e4], [-3e38, -3e38, 3e38]])
    for actual, expected in zip(route(logits, 2, backend=backend), route(logits, 2, backend="reference"), strict=True):
        assert torch.equal(actual, expected)


def test_strides_and_threads(backend, threads):
    logits = torch.randn(70, 12)
    expected = route(logits, 3, backend=backend)
    for view in (strided(logits), logits.T.contiguous().T):
        for actual, e in zip(route(view, 3, backend=backend), expected, strict=True):
            assert torch.equal(actual, e)
    for actual, e in zip(route(logits[7:8], 3, backend=backend), expected, strict=True):
        assert torch.equal(actual, e[7:8])


def test_bad_input():
    logits = torch.randn(3, 8)
    for arguments, message in [
        (dict(top_k=9), r"top_k must be in \[0, num_experts=8\], got 9"),
        (dict(top_k=2, score="tanh"), "score must be one of softmax, sigmoid, got 'tanh'"),
        (dict(top_k=2, num_groups=3), "num_groups must be a divisor of num_experts=8, got 3"),
        (dict(top_k=2, num_groups=4, topk_groups=5), r"topk_groups must be in \[1, num_groups=4\], got 5"),
        (dict(top_k=2, group_score="mean"), "group_score must be one of max, top2_sum, got 'mean'"),
        (dict(top_k=2, expert_bias=torch.zeros(7)), r"expert_bias must be of shape \[num_experts=8\], got \[7\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            route(logits, **arguments)
    with pytest.raises(ValueError, match="logits must be of shape"):
        route(logits[0], 2)
    with pytest.raises(TypeError, match="logits must be one of"):
        route(logits.long(), 2)
    with pytest.raises(TypeError, match="expert_bias must be one of"):
        route(logits, 2, expert_bias=torch.zeros(8, dtype=torch.int32))


def test_registration(backend):
    if backend != "native":
        pytest.skip("not a registered op")
    logits = torch.randn(5, 8)
    ids, weights = route(logits, 2)
    torch.library.opcheck(native.route, (logits, torch.zeros(8), 2, 1, True, 1.0, 2, 1, 0, 1))
    torch.library.opcheck(native.route_backward, (weights, logits, ids, 0, False, 1.0, 1))


def test_compile(backend, kernel_id):
    if kernel_id in SLOW:
        pytest.skip("an interpreter cannot be traced")
    compiled = torch.compile(lambda x: route(x, 2, renormalize=True, backend=backend), fullgraph=True, dynamic=True)
    for num_tokens in (3, 9):
        logits = torch.randn(num_tokens, 8, requires_grad=True)
        ids, weights = compiled(logits)
        expected_ids, expected_weights = route(logits, 2, renormalize=True, backend=backend)
        assert torch.equal(ids, expected_ids) and torch.equal(weights, expected_weights)
        actual_grad, expected_grad = (
            torch.autograd.grad(w[:, 0].sum(), logits)[0] for w in (weights, expected_weights)
        )
        assert torch.equal(actual_grad, expected_grad)
