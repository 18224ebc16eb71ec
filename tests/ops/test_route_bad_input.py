"""What is wrong with routing's input is refused by name, or follows the rule that the docstring writes."""

from functools import partial

import pytest
import torch

from moe_kernels import (
    expert_ffn,
    limit_capacity,
    mask_experts,
    plan_dispatch,
    route,
    route_expert_choice,
    route_soft,
    route_top_p,
    route_two_level,
    route_weights,
)

NUM_TOKENS, NUM_EXPERTS = 6, 4
BACKENDS = ["reference", "native"]
WAYS = {
    "top_k": partial(route, top_k=2, renormalize=True),
    "sigmoid": partial(route, top_k=2, score="sigmoid", renormalize=True),
    "groups": partial(route, top_k=2, num_groups=2, topk_groups=1, group_score="top2_sum"),
    "null": partial(route, top_k=2, num_null_experts=2, renormalize=True),
    "top_p": partial(route_top_p, top_p=0.4),
    "top_p_all": partial(route_top_p, top_p=1.0, renormalize=True),
    "expert_choice": partial(route_expert_choice, capacity=2),
    "soft": route_soft,
}


@pytest.mark.parametrize("top_p", [0.0, -0.5, float("nan")])
def test_top_p_at_or_below_zero(top_p):
    with pytest.raises(ValueError, match="route_top_p: top_p must be"):
        route_top_p(torch.randn(NUM_TOKENS, NUM_EXPERTS), top_p)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_rows_that_cannot_be_routed_go_nowhere_and_leave_the_others_alone(which, way, broken):
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS)
    logits[1, 2] = broken
    logits[4] = -torch.inf
    logits.requires_grad_()
    ids, weights = WAYS[way](logits, backend=which)
    lost = torch.tensor([1, 4])
    assert (ids[lost] == -1).all() and (weights[lost] == 0).all()
    assert weights.isfinite().all()
    (grad,) = torch.autograd.grad(weights.sum(), logits)
    assert grad.isfinite().all() and (grad[lost] == 0).all()
    if way != "expert_choice":  # where tokens compete, one that leaves makes room
        kept = torch.tensor([0, 2, 3, 5])
        alone = WAYS[way](logits.detach()[kept], backend=which)
        assert torch.equal(ids[kept], alone[0]) and torch.equal(weights[kept], alone[1])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", BACKENDS)
def test_all_experts_masked(which, way):
    logits = mask_experts(torch.randn(NUM_TOKENS, NUM_EXPERTS), torch.zeros(NUM_EXPERTS, dtype=torch.bool))
    ids, weights = WAYS[way](logits, backend=which)
    assert (ids == -1).all() and (weights == 0).all()


@pytest.mark.parametrize("shape", [(NUM_EXPERTS + 1,), (NUM_TOKENS, 2), (NUM_TOKENS + 1, 1), ()])
def test_a_mask_of_another_size(shape):
    with pytest.raises(ValueError, match="mask_experts: allowed must be of shape"):
        mask_experts(torch.randn(NUM_TOKENS, NUM_EXPERTS), torch.ones(shape, dtype=torch.bool))


def test_more_picks_than_experts():
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS)
    for call, message in [
        (lambda: route(logits, 5), r"route: top_k must be in \[0, num_experts=4\], got 5"),
        (lambda: route(logits, -1), r"route: top_k must be in \[0, num_experts=4\], got -1"),
        (lambda: route_top_p(logits, 0.4, max_experts=5), "route_top_p: max_experts must be"),
        (lambda: route_two_level(logits[:, :2], logits, 1, 3), r"top_k must be in \[0, group size=2\], got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("drop_policy", ["position", "probs"])
def test_capacity_zero_drops_everything_and_negative_is_refused(which, drop_policy):
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS)
    ids, weights = route(logits, 2)
    kept, kept_weights = limit_capacity(ids, weights, NUM_EXPERTS, 0, drop_policy=drop_policy, backend=which)
    assert (kept == -1).all() and (kept_weights == 0).all()
    assert (route_expert_choice(logits, 0, backend=which)[0] == -1).all()
    with pytest.raises(ValueError, match="capacity must be at least 0, got -1"):
        limit_capacity(ids, weights, NUM_EXPERTS, -1, drop_policy=drop_policy)
    with pytest.raises(ValueError, match="capacity must be at least 0, got -1"):
        route_expert_choice(logits, -1)


@pytest.mark.parametrize("which", BACKENDS)
def test_null_dropped_and_masked_pairs_cost_no_flops(which):
    """Counts the rows that the experts multiply; experts that nobody reaches hold NaN, which a product would spread."""
    num_real, hidden_size, intermediate_size = 3, 8, 5
    x = torch.randn(40, hidden_size)
    logits = mask_experts(torch.randn(40, num_real + 2), torch.tensor([True, True, False, True, True]))
    ids, weights = route(logits, 3, num_null_experts=2, renormalize=True, backend=which)
    ids, weights = limit_capacity(ids, weights, num_real, 4, backend=which)
    plan = plan_dispatch(ids, num_real, backend=which)
    rows = plan.expert_offsets.diff().tolist()
    assert rows == [4, 4, 0] and sum(rows) < (ids >= 0).sum() < ids.numel()

    gate_up = torch.randn(num_real, 2 * intermediate_size, hidden_size)
    down = torch.randn(num_real, hidden_size, intermediate_size)
    gate_up[2] = down[2] = torch.nan
    out = expert_ffn(x, ids, weights, gate_up, down, backend=which)
    reached = ((ids >= 0) & (ids < num_real)).any(1)
    assert out.isfinite().all() and (out[~reached] == 0).all() and (out[reached] != 0).any(1).all()


def test_weights_of_ids_that_are_not_there():
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS)
    ids = torch.tensor([[-1, 4, 2**31 - 1]]).expand(NUM_TOKENS, 3).int()
    assert (route_weights(logits, ids) == 0).all()
