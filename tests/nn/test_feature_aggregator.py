"""The aggregation block: the mean at first, a map that text, time and place decide, learned by gradient."""

import pytest
import torch

from moe_kernels import fuse_features
from moe_kernels.nn import FeatureAggregator

NUM_MODELS, CHANNELS = 3, 6


def block() -> FeatureAggregator:
    return FeatureAggregator(
        NUM_MODELS, CHANNELS, text_size=10, time_size=12, hidden_size=16, num_layers=2, num_heads=4, num_groups=4
    )


def inputs(batch_size: int = 2):
    return (
        list(torch.randn(NUM_MODELS, batch_size, CHANNELS, 5, 4)),
        torch.randn(batch_size, 7, 10),
        torch.randn(batch_size, 12),
    )


def test_starts_as_the_mean():
    features, text, time = inputs()
    torch.testing.assert_close(block()(features, text, time), torch.stack(features).mean(0))


def test_map_depends_on_all_that_it_reads():
    aggregator, (features, text, time) = block(), inputs()
    torch.nn.init.normal_(aggregator.conv_out.weight)
    fused = aggregator(features, text, time)
    map_logits = aggregator.map_logits(features, text, time)
    assert torch.equal(fused, fuse_features(features, map_logits))
    other = [feature.clone() for feature in features]
    other[2][:, :, 0, 0] += 1
    for changed in ((other, text, time), (features, text + torch.randn(10), time), (features, text, time + 1)):
        assert not torch.allclose(aggregator.map_logits(*changed), map_logits)
    # an item does not see the others of its batch
    alone = aggregator([feature[1:] for feature in features], text[1:], time[1:])
    torch.testing.assert_close(alone, fused[1:])


def test_text_and_time_of_each_model_are_averaged():
    aggregator, (features, text, time) = block(), inputs()
    torch.nn.init.normal_(aggregator.conv_out.weight)
    shift = torch.randn(10)
    several = aggregator(features, [text - shift, text + shift], [time - 1, time + 1])
    torch.testing.assert_close(several, aggregator(features, text, time))


# the left half is one model's, the right half another's
def test_learns_which_model_is_right_where():
    features, text, time = inputs(batch_size=8)
    target = torch.where(torch.arange(4) < 2, features[0], features[2])
    for feature in features:
        feature[:, 0] = torch.linspace(-1, 1, 4)  # and a channel that says where
    target[:, 0] = torch.linspace(-1, 1, 4)
    aggregator = block()
    optimizer = torch.optim.Adam(aggregator.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = (aggregator(features, text, time) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    assert all(parameter.grad is not None for parameter in aggregator.parameters())


def test_bad_input():
    features, text, time = inputs()
    with pytest.raises(ValueError, match="features must be 3 maps of 6 channels, got"):
        block()(features[:2], text, time)
    with pytest.raises(ValueError, match="num_heads must be a divisor of 320, got 7"):
        FeatureAggregator(2, 4, text_size=3, time_size=3, num_heads=7)
