"""FactorLLM's loss in loops, its gradient, and that training by it chooses better."""

import math

import pytest
import torch

from moe_kernels.nn import MoEFeedForward, prior_approximate_loss, split_dense, train_router
from moe_kernels.nn.prior_approximate import expert_outputs
from moe_kernels.nn.split import cluster_neurons
from moe_kernels.testing import assert_close_to_reference
from tests.nn.test_split import HIDDEN_SIZE, NUM_EXPERTS, NUM_NEURONS, GatedMLP


def by_hand(logits, outputs, dense, top_k):
    """The released code's route_loss, one token at a time."""
    total, (num_tokens, num_experts) = 0.0, logits.shape
    for t in range(num_tokens):
        distances = []
        for e in range(num_experts):
            gap = outputs[t, e] - dense[t] * top_k / num_experts
            distances.append((gap**2).mean().item())
        nearest = sorted(range(num_experts), key=lambda e: (distances[e], e))[:top_k]
        norm = sum(math.exp(1.0 if e in nearest else 0.0) for e in range(num_experts))
        p = logits[t].softmax(0).tolist()
        for e in range(num_experts):
            target = math.exp(1.0 if e in nearest else 0.0) / norm
            total += p[e] * math.log(p[e] / target)
    return torch.tensor([total / num_tokens], dtype=torch.float64)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_loss_equals_the_released_code(top_k):
    logits, outputs, dense = torch.randn(9, 5), torch.randn(9, 5, 7), torch.randn(9, 7)
    expected = by_hand(logits.double(), outputs.double(), dense.double(), top_k)
    actual = prior_approximate_loss(logits, outputs, dense, top_k)
    assert_close_to_reference(actual.reshape(1), expected, expected.float())
    double = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: prior_approximate_loss(x, outputs.double(), dense.double(), top_k), double
    )
    assert prior_approximate_loss(logits[:0], outputs[:0], dense[:0], top_k).item() == 0


def test_loss_is_least_at_its_target():
    outputs, dense = torch.randn(4, 5, 7), torch.randn(4, 7)
    distances = (outputs - dense[:, None] * 2 / 5).square().mean(2)
    target = torch.zeros(4, 5).scatter_(1, distances.argsort(1)[:, :2], 1.0)
    losses = [prior_approximate_loss(target + shift * torch.randn(4, 5), outputs, dense, 2) for shift in (0, 1)]
    assert losses[0] < losses[1] and losses[0] < torch.finfo(torch.float32).eps


def test_training_changes_the_router_alone_and_lowers_the_loss():
    mlp = GatedMLP().requires_grad_(False)
    tokens = torch.randn(400, HIDDEN_SIZE)
    layer = split_dense(mlp, NUM_EXPERTS, NUM_EXPERTS // 2, tokens, grouping="order")
    layer.router.reset_parameters()
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    losses = train_router(layer, mlp, tokens, num_steps=100, learning_rate=1e-2)
    assert len(losses) == 100 and sum(losses[-10:]) < 0.7 * sum(losses[:10])
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("router"), name
    held_out = torch.randn(200, HIDDEN_SIZE)
    targets = expert_outputs(layer, held_out), mlp(held_out)
    trained = prior_approximate_loss(layer.router(held_out), *targets, layer.top_k)
    layer.router.reset_parameters()
    assert trained < prior_approximate_loss(layer.router(held_out), *targets, layer.top_k)


def test_expert_outputs_add_up_to_the_layer():
    layer = MoEFeedForward(8, 4, 3, 3, weighted=False)
    x = torch.randn(5, 8)
    double = torch.nn.Module.double(MoEFeedForward(8, 4, 3, 3, weighted=False))
    double.load_state_dict(layer.state_dict())
    expected = double(x.double())
    assert_close_to_reference(expert_outputs(layer, x).sum(1).detach(), expected.detach(), layer(x).detach())


@pytest.mark.parametrize("grouping", ["importance", "order", "clusters"])
def test_every_grouping_is_exact_with_all_experts(grouping):
    mlp, tokens = GatedMLP().requires_grad_(False), torch.randn(200, HIDDEN_SIZE)
    split = split_dense(mlp, NUM_EXPERTS, NUM_EXPERTS, tokens, grouping=grouping)
    x = torch.randn(9, HIDDEN_SIZE)
    double = GatedMLP().double()
    double.load_state_dict(mlp.state_dict())
    assert_close_to_reference(split(x).detach(), double(x.double()).detach(), mlp(x))


def test_clusters_are_found_and_balanced():
    centers = torch.eye(4) * 10
    shuffle = torch.randperm(20)
    weights = (centers.repeat_interleave(5, 0) + torch.rand(20, 4))[shuffle]
    starts = torch.stack([(shuffle // 5 == cluster).nonzero()[0, 0] for cluster in range(4)])
    clusters = cluster_neurons(weights, starts)
    for cluster in range(4):
        assert (shuffle[clusters[cluster]] // 5 == cluster).all()
    # all in one place: still balanced, every neuron once
    clusters = cluster_neurons(torch.ones(NUM_NEURONS, 3), torch.arange(NUM_EXPERTS))
    assert clusters.shape == (NUM_EXPERTS, NUM_NEURONS // NUM_EXPERTS)
    assert clusters.flatten().sort().values.tolist() == list(range(NUM_NEURONS))


def test_refusals_name_what_is_wrong():
    logits, outputs, dense = torch.randn(9, 5), torch.randn(9, 5, 7), torch.randn(9, 7)
    for call, message in [
        (lambda: prior_approximate_loss(logits, outputs, dense, 6), r"top_k must be in \[1, num_experts=5\], got 6"),
        (lambda: prior_approximate_loss(logits, outputs[:, :4], dense, 1), "expert_outputs must be of shape"),
        (lambda: prior_approximate_loss(logits, outputs, dense[:, :6], 1), "dense_output must be of shape"),
        (lambda: train_router(MoEFeedForward(8, 4, 3, 1), None, torch.randn(0, 8)), "tokens must be of shape"),
        (
            lambda: split_dense(GatedMLP(), 6, 3, torch.randn(200, HIDDEN_SIZE), grouping="random"),
            "grouping must be one of importance, order, clusters, got 'random'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
