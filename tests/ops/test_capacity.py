"""limit_capacity: who keeps its place, what is dropped, and what that costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import expert_capacity, limit_capacity, plan_dispatch, route, route_weights
from moe_kernels.ops.route import native

BACKENDS = ["reference", "native"]
POLICIES = {
    "position": dict(),
    "first_choices": dict(first_choices_first=True),
    "probs": dict(drop_policy="probs"),
}


def kept_pairs(ids, weights, num_experts, capacity, policy):
    """GShard and Megatron in loops: pairs queue up, an expert takes the first that fit."""
    pairs = [(t, k) for t in range(len(ids)) for k in range(len(ids[0]))]
    if policy == "first_choices":
        pairs.sort(key=lambda pair: (pair[1], pair[0]))
    elif policy == "probs":
        pairs.sort(key=lambda pair: (-weights[pair[0]][pair[1]], pair))
    used, kept = [0] * num_experts, set()
    for t, k in pairs:
        expert = ids[t][k]
        if not 0 <= expert < num_experts:
            kept.add((t, k))  # takes no place and stays as it is
        elif used[expert] < capacity:
            used[expert] += 1
            kept.add((t, k))
    return kept


@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(-1, 4), st.sampled_from([0.0, 0.25, 0.5])), min_size=3, max_size=3), max_size=9
    ),
    capacity=st.integers(0, 6),
    policy=st.sampled_from(sorted(POLICIES)),
    which=st.sampled_from(BACKENDS),
)
@settings(deadline=None)
def test_equals_a_queue(rows, capacity, policy, which):
    ids = torch.tensor([[id for id, _ in row] for row in rows], dtype=torch.int32).reshape(-1, 3)
    weights = torch.tensor([[weight for _, weight in row] for row in rows]).reshape(-1, 3)
    actual_ids, actual = limit_capacity(ids, weights, 4, capacity, **POLICIES[policy], backend=which)
    kept = kept_pairs(ids.tolist(), weights.tolist(), 4, capacity, policy) if rows else set()
    for t in range(len(rows)):
        for k in range(3):
            assert actual_ids[t, k] == (ids[t, k] if (t, k) in kept else -1)
            assert actual[t, k] == (weights[t, k] if (t, k) in kept or ids[t, k] < 0 else 0)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_expert_exceeds_its_capacity(which, policy, weights_dtype):
    ids, weights = route(torch.randn(200, 8), 2)
    capacity = expert_capacity(200, 8, 0.5, top_k=2)
    kept, _ = limit_capacity(ids.long(), weights.to(weights_dtype), 8, capacity, **POLICIES[policy], backend=which)
    counts = plan_dispatch(kept, 8).expert_offsets.diff()
    before = plan_dispatch(ids, 8).expert_offsets.diff()
    assert torch.equal(counts, before.clamp(max=capacity)) and (before > capacity).any()


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_gradient_reaches_what_was_kept(which, policy):
    ids = route(torch.randn(20, 4), 2)[0]
    weights = torch.rand(20, 2, requires_grad=True)
    kept, limited = limit_capacity(ids, weights, 4, 3, **POLICIES[policy], backend=which)
    (grad,) = torch.autograd.grad(limited.sum(), weights)
    assert torch.equal(grad, (kept >= 0).float()) and 0 < (kept >= 0).sum() < 40


def test_renormalised_after_dropping(backend):
    """DeepSpeed's top-2: the weights of the pairs that were kept sum to 1."""
    logits = torch.randn(30, 4)
    ids, weights = route(logits, 2, backend=backend)
    kept, _ = limit_capacity(ids, weights, 4, 8, first_choices_first=True, backend=backend)
    weights = route_weights(logits, kept, renormalize=True, backend=backend)
    one_kept = (kept >= 0).sum(1) == 1
    assert one_kept.any() and torch.equal(weights[one_kept].sum(1), torch.ones(int(one_kept.sum())))


@pytest.mark.parametrize("which", BACKENDS)
def test_nan_weights_are_dropped_first(which):
    ids, weights = torch.zeros(3, 1, dtype=torch.int32), torch.tensor([[torch.nan], [0.1], [0.2]])
    kept, _ = limit_capacity(ids, weights, 1, 2, drop_policy="probs", backend=which)
    assert kept.flatten().tolist() == [-1, 0, 0]


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2), (3, 0)])
def test_no_pairs(which, shape):
    for options in POLICIES.values():
        kept, weights = limit_capacity(torch.empty(shape).int(), torch.empty(shape), 4, 1, **options, backend=which)
        assert kept.shape == weights.shape == shape


def test_registration_and_compile(backend):
    ids, weights = route(torch.randn(9, 4), 2)
    for by_weight, first in ((False, False), (False, True), (True, False)):
        torch.library.opcheck(native.limit_capacity, (ids, weights, 4, 2, by_weight, first))

    def layer(logits):
        ids, weights = route(logits, 2, backend=backend)
        capacity = expert_capacity(logits.shape[0], 4, 1.0)
        return limit_capacity(ids, weights, 4, capacity, drop_policy="probs", backend=backend)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for num_tokens in (6, 9):
        logits = torch.randn(num_tokens, 4)
        for actual, expected in zip(compiled(logits), layer(logits), strict=True):
            assert torch.equal(actual, expected)


def test_expert_capacity():
    assert expert_capacity(100, 8, 1.25) == 16  # ceil(15.625)
    assert expert_capacity(100, 10, 1.1) == 11  # 100 * 1.1 / 10 is 11.000000000000002
    assert expert_capacity(100, 8, 1.0, top_k=2) == 25
    assert expert_capacity(3, 8, 1.0, min_capacity=4) == 4
    assert expert_capacity(0, 8, 1.0) == 0


def test_bad_input():
    ids, weights = torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2)
    for call, message in [
        (lambda: limit_capacity(ids, weights, 4, -1), "limit_capacity: capacity must be at least 0, got -1"),
        (lambda: limit_capacity(ids, weights, 4, 1, drop_policy="first"), "one of position, probs, got 'first'"),
        (lambda: limit_capacity(ids, weights[:2], 4, 1), r"topk_weights must be of shape \[3, 2\] like topk_ids"),
        (lambda: limit_capacity(ids, weights, 4, 1, drop_policy="probs", first_choices_first=True), "must be False"),
        (lambda: expert_capacity(4, 0, 1.0), "num_experts must be at least 1, got 0"),
        (lambda: expert_capacity(4, 2, -1.0), "capacity_factor must be at least 0, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="topk_ids must be one of torch.int32, torch.int64"):
        limit_capacity(ids.float(), weights, 4, 1)
