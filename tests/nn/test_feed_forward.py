"""MoEFeedForward: what it computes, what it trains, what it refuses."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_kernels import Activation, expert_counts, expert_ffn, route, route_expert_choice, route_soft, route_top_p
from moe_kernels.nn import CosineRouter, MoEFeedForward
from moe_kernels.testing import assert_close_to_reference


def _by_hand(module: MoEFeedForward, x: torch.Tensor) -> torch.Tensor:
    """The module's equation, one token at a time."""
    logits = module.router(x)
    ids, weights = route(logits, module.top_k, renormalize=module.renormalize, backend="reference")
    rows = []
    for token, experts, chosen_weights in zip(x, ids.tolist(), weights, strict=True):
        row = torch.zeros_like(token)
        for expert, weight in zip(experts, chosen_weights, strict=True):
            h = module.gate_up_proj[expert] @ token
            a = module.activation(*h.chunk(2)) if module.activation.gated else module.activation(h)
            row = row + module.down_proj[expert] @ a * (weight.to(x.dtype) if module.weighted else 1)
        rows.append(row)
    return torch.stack(rows)


# no expert, one, some, all; sizes that are no multiple of a vector
@pytest.mark.parametrize("top_k", [0, 1, 3, 5])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("activation", [Activation(), Activation(kind="relu2", gated=False)], ids=["silu", "ungated"])
def test_forward(top_k, weighted, activation):
    module = MoEFeedForward(19, 13, 5, top_k, activation=activation, weighted=weighted, router_bias=True)
    x = torch.randn(11, 19)
    eager = _by_hand(module, x)
    actual = module(x)
    expected = _by_hand(module.double(), x.double())
    assert_close_to_reference(actual, expected, eager)


@pytest.mark.parametrize("shape", [(0, 8), (8,), (2, 3, 8)])
def test_any_leading_shape(shape):
    module = MoEFeedForward(8, 4, 3, 2)
    x = torch.randn(shape)
    out = module(x)
    assert out.shape == x.shape
    assert torch.equal(out.reshape(-1, 8), module(x.reshape(-1, 8)))


def test_every_parameter_gets_its_gradient():
    def gradients(module, forward, x):
        module.zero_grad()
        forward(module, x).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}

    module = MoEFeedForward(16, 8, 4, 2)
    x = torch.randn(9, 16)
    actual = gradients(module, MoEFeedForward.forward, x)
    eager = gradients(module, _by_hand, x)
    expected = gradients(module.double(), _by_hand, x.double())
    for name, grad in actual.items():
        assert_close_to_reference(grad, expected[name], eager[name], name)


def test_state_dict_round_trip():
    source = MoEFeedForward(8, 4, 3, 2, router_bias=True)
    target = MoEFeedForward(8, 4, 3, 2, router_bias=True)
    assert set(source.state_dict()) == {"gate_up_proj", "down_proj", "router.weight", "router.bias"}
    target.load_state_dict(source.state_dict())
    x = torch.randn(5, 8)
    assert torch.equal(source(x), target(x))


def test_refusals_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"MoEFeedForward: top_k must be in \[0, num_experts=3\], got 4"):
        MoEFeedForward(8, 4, 3, 4)
    with pytest.raises(ValueError, match=r"hidden_states must be of shape \[..., hidden_size=8\], got \[5, 7\]"):
        MoEFeedForward(8, 4, 3, 2)(torch.randn(5, 7))


def _parts_by_hand(module: MoEFeedForward, x: torch.Tensor) -> torch.Tensor:
    """The equation with identity, null and shared experts, one token at a time; picks are route's."""
    num_real, num_identity = module.num_experts, module.num_identity_experts
    logits = module.router(x)
    probs = logits.softmax(1)
    rows = []
    for token, p in zip(x, probs, strict=True):
        picks = p.detach().argsort(descending=True, stable=True)[: module.top_k].tolist()
        picks = [e for e in picks if e < num_real + num_identity]
        total = sum(p[e] for e in picks)
        row = torch.zeros_like(token)
        for e in picks:
            if e >= num_real:
                row = row + p[e] / total * token
            else:
                gate, up = (module.gate_up_proj[e] @ token).chunk(2)
                row = row + p[e] / total * (module.down_proj[e] @ module.activation(gate, up))
        gate, up = (module.shared_gate_up_proj[0] @ token).chunk(2)
        shared = module.shared_down_proj[0] @ module.activation(gate, up)
        rows.append(row + shared * torch.sigmoid(module.shared_gate[0] @ token))
    return torch.stack(rows)


def test_identity_null_and_shared_experts():
    module = MoEFeedForward(
        12, 6, 4, 3, num_identity_experts=2, num_null_experts=2, shared_intermediate_size=10, shared_gate=True
    )
    x = torch.randn(30, 12)
    (actual, routed), eager = module(x, return_routed=True), _parts_by_hand(module, x)
    assert ((routed.topk_ids >= 4) & (routed.topk_ids < 6)).any() and (routed.topk_ids >= 6).any()
    grad_out = torch.randn(30, 12)
    grads = torch.autograd.grad(actual, list(module.parameters()), grad_out)
    eager_grads = torch.autograd.grad(eager, list(module.parameters()), grad_out)
    module.double()
    expected = _parts_by_hand(module, x.double())
    expected_grads = torch.autograd.grad(expected, list(module.parameters()), grad_out.double())
    assert_close_to_reference(actual.detach(), expected.detach(), eager.detach())
    for name, *three in zip(dict(module.named_parameters()), grads, expected_grads, eager_grads, strict=True):
        assert_close_to_reference(*three, name)


ROUTINGS = {
    "top_p": partial(route_top_p, top_p=0.5),
    "expert_choice": partial(route_expert_choice, capacity=3),
    "soft": route_soft,
    "sigmoid": partial(route, top_k=2, score="sigmoid"),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_any_routing(name):
    module = MoEFeedForward(8, 4, 5, 2, routing=ROUTINGS[name])
    x = torch.randn(9, 8)
    out, routed = module(x, return_routed=True)
    ids, weights = ROUTINGS[name](module.router(x))
    assert torch.equal(routed.topk_ids, ids)
    assert torch.equal(out, expert_ffn(x, ids, weights, module.gate_up_proj, module.down_proj))
    out.sum().backward()
    assert module.router.weight.grad.any()


def test_forced_experts_are_weighed_by_the_router():
    module = MoEFeedForward(8, 4, 5, 2)
    x = torch.randn(2, 3, 8)
    expert_ids = torch.tensor([[0, 4]] * 6)
    _, routed = module(x, expert_ids, return_routed=True)
    assert routed.topk_ids.tolist() == [[0, 4]] * 6
    expected = module.router(x.view(6, 8)).softmax(1)[:, [0, 4]]
    expected = (expected / expected.sum(1, keepdim=True)).detach()
    assert_close_to_reference(routed.topk_weights.detach(), expected.double(), expected)


def test_cosine_router():
    module = MoEFeedForward(8, 4, 5, 2, router=CosineRouter(8, 5, 3))
    x = torch.randn(9, 8)
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.router.parameters())
    # lengths have no say
    assert torch.equal(module.router(x).argmax(1), module.router(x * 7).argmax(1))
    other = MoEFeedForward(8, 4, 5, 2, router=CosineRouter(8, 5, 3))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))


def test_counts_are_right_under_accumulation_and_checkpointing():
    module = MoEFeedForward(8, 4, 5, 2, balanced=True)
    batches = [torch.randn(20, 8, requires_grad=True) for _ in range(3)]
    expected = sum(expert_counts(module(x, return_routed=True)[1].topk_ids, 5) for x in batches)
    assert torch.equal(module.expert_counts, expected) and expected.sum() == 120
    for use_reentrant in (False, True):
        module.expert_counts.zero_()
        for x in batches:
            checkpoint(module, x, use_reentrant=use_reentrant).sum().backward()
        assert torch.equal(module.expert_counts, expected)
    module.eval()(batches[0])
    assert torch.equal(module.expert_counts, expected)

    module.update_expert_bias(rate=0.01)
    mean = expected.double().mean()
    assert torch.equal(module.expert_bias, (0.01 * (mean - expected).sign()).float())
    assert (module.expert_counts == 0).all()


def test_bias_balances_a_layer():
    module = MoEFeedForward(8, 4, 6, 2, router_bias=True, balanced=True)
    with torch.no_grad():
        module.router.bias.copy_(torch.linspace(-1, 1, 6))
    x = torch.randn(300, 8)
    spread = []
    for _ in range(200):
        module(x)
        counts = module.expert_counts.double()
        spread.append((counts.max() / counts.mean()).item())
        module.update_expert_bias(rate=2e-3)
    assert spread[0] > 1.5 and spread[-1] < 1.2


def test_bias_stays_float32_and_is_saved():
    module = MoEFeedForward(8, 4, 5, 2, balanced=True)
    module.expert_bias.copy_(torch.linspace(0, 1e-3, 5) + 1)  # differences that bfloat16 does not hold
    before = module.expert_bias.clone()
    module.to(torch.bfloat16)
    assert module.expert_bias.dtype == torch.float32 and torch.equal(module.expert_bias, before)
    assert module(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    state = module.state_dict()
    assert "expert_bias" in state and "expert_counts" not in state
    other = MoEFeedForward(8, 4, 5, 2, balanced=True, dtype=torch.bfloat16)
    other.load_state_dict(state)
    assert torch.equal(other.expert_bias, before)


def test_autocast():
    module = MoEFeedForward(8, 4, 5, 2, num_identity_experts=1, shared_intermediate_size=6, shared_gate=True)
    x = torch.randn(9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_compile_counts_too():
    module = MoEFeedForward(8, 4, 5, 2, balanced=True, shared_intermediate_size=6, num_identity_experts=1)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for num_tokens in (6, 9):
        x = torch.randn(num_tokens, 8)
        module.expert_counts.zero_()
        expected = module(x)
        counts = module.expert_counts.clone()
        module.expert_counts.zero_()
        actual = compiled(x)
        assert torch.equal(module.expert_counts, counts)
        double = copy.deepcopy(module).double()
        assert_close_to_reference(actual.detach(), double(x.double()).detach(), expected.detach())


def test_refusals_of_options():
    with pytest.raises(ValueError, match="shared_gate must be False where there is no shared expert"):
        MoEFeedForward(8, 4, 3, 2, shared_gate=True)
    with pytest.raises(RuntimeError, match="update_expert_bias needs a balanced layer; make it with balanced=True"):
        MoEFeedForward(8, 4, 3, 2).update_expert_bias()


def test_identity_and_null_experts_however_they_are_chosen():
    x = torch.randn(6, 4)
    module = MoEFeedForward(4, 4, 2, 2, num_identity_experts=1, num_null_experts=1, routing=route_soft)
    nn.init.zeros_(module.down_proj)  # what is left is the identity expert
    share = module.router(x).softmax(1)[:, 2:3]
    torch.testing.assert_close(module(x), share * x)
    module.routing = None
    assert not module(x, torch.full((6, 1), 3)).any()
    unweighted = MoEFeedForward(4, 4, 2, 3, num_identity_experts=1, weighted=False)
    nn.init.zeros_(unweighted.down_proj)
    torch.testing.assert_close(unweighted(x), x)


def test_a_router_that_is_given_keeps_its_weights():
    router = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))  # knows no reset_parameters
    before = [parameter.clone() for parameter in router.parameters()]
    module = MoEFeedForward(8, 4, 3, 2, router=router)
    module.reset_parameters()
    assert module.router is router
    assert all(torch.equal(a, b) for a, b in zip(before, router.parameters(), strict=True))
    linear = nn.Linear(8, 3)
    weight = linear.weight.clone()
    assert torch.equal(MoEFeedForward(8, 4, 3, 2, router=linear).router.weight, weight)
