"""LogitFusion is fuse_logits with learned weights: same values, gradients that fit, a state that comes back."""

import pytest
import torch

from moe_kernels import TokenFilter, fuse_logits
from moe_kernels.nn import LogitFusion


@pytest.mark.parametrize(
    ("mode", "weights", "options"),
    [
        ("linear", [1.0, 0.5, -0.5], {}),
        ("linear", [1.5, -0.5, 0.2], {"mask": TokenFilter(min_p=0.1), "neg_inf": "zero"}),
        ("mixture", [0.2, 0.3, 0.5], {"vocab": 30}),
    ],
)
def test_is_fuse_logits(mode, weights, options):
    sources = [torch.randn(4, 40) for _ in weights]
    fusion = LogitFusion(weights, mode=mode, temperature=0.7, **options)
    expected = fuse_logits(
        sources, fusion.weights, mode=mode, temperature=fusion.log_temperature.exp().item(), **options
    )
    assert torch.equal(fusion(*sources), expected)
    torch.testing.assert_close(fusion.weights.detach(), torch.tensor(weights))


@pytest.mark.parametrize("mode", ["linear", "mixture"])
def test_learns_the_fusion_that_made_the_targets(mode):
    true = [0.8, 0.2] if mode == "mixture" else [2.0, -1.0]
    sources = [2 * torch.randn(256, 30) for _ in true]
    targets = fuse_logits(sources, true, mode=mode, out="probs")
    fusion = LogitFusion([0.5, 0.5], mode=mode)
    optimizer = torch.optim.Adam([p for p in fusion.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(150):
        loss = -(targets * fusion(*sources)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    entropy = -(targets * targets.log()).sum(1).mean().item()
    # what is left above the entropy is the divergence: a hundredth of where it began
    assert losses[-1] - entropy < (losses[0] - entropy) / 100
    assert (fusion.weights[0] > fusion.weights[1]).item()


def test_temperature_is_learned_where_it_can_be_told_from_the_weights():
    assert not LogitFusion([1.0, 1.0]).log_temperature.requires_grad
    assert LogitFusion([1.0, 1.0], learn_temperature=True).log_temperature.requires_grad
    fusion = LogitFusion([0.5, 0.5], mode="mixture")
    fusion(torch.randn(3, 9), torch.randn(3, 9))[:, 0].sum().backward()
    assert fusion.log_temperature.grad != 0 and (fusion.raw_weights.grad != 0).all()


def test_state_comes_back():
    fusion, other = LogitFusion([1.0, 0.3, -0.3], temperature=2.0), LogitFusion([0.0, 0.0, 0.0])
    other.load_state_dict(fusion.state_dict())
    sources = [torch.randn(2, 12) for _ in range(3)]
    assert torch.equal(other(*sources), fusion(*sources))


def test_bad_input():
    for call, message in [
        (lambda: LogitFusion([1.0], mode="product"), "mode must be one of linear, mixture, got 'product'"),
        (lambda: LogitFusion([0.5, 0.6], mode="mixture"), "weights must be above 0 with sum 1 for a mixture"),
        (lambda: LogitFusion([1.5, -0.5], mode="mixture"), "weights must be above 0 with sum 1 for a mixture"),
        (lambda: LogitFusion([1.0], temperature=0.0), "temperature must be above 0, got 0.0"),
        (lambda: LogitFusion([1.0])(torch.randn(2, 8), torch.randn(2, 8)), r"weights must be of shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
