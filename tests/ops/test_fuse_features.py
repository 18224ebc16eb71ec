"""Fused features against the stacked reference, gradients, and what holds for any map."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import fuse_features
from moe_kernels.ops.logit_fusion import reference
from tests.ops.helpers import DTYPES, check, strided


def op(map_logits, *features, backend):
    return (
        reference.fuse_features(features, map_logits) if backend == "reference" else fuse_features(features, map_logits)
    )


@pytest.mark.parametrize("places", [(), (7,), (5, 3)], ids=str)
@pytest.mark.parametrize("num_models", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(dtype, num_models, places):
    features = [torch.randn(3, 8, *places).to(dtype) for _ in range(num_models)]
    map_logits = (2 * torch.randn(3, num_models, *places)).to(dtype)
    check(op, [map_logits, *features], "ours")
    check(op, [strided(map_logits), *map(strided, features)], "ours")


def test_gradcheck():
    tensors = [torch.randn(2, 3, 4), *torch.randn(3, 2, 5, 4)]
    tensors = [tensor.double().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda m, *features: fuse_features(features, m), tensors)


def test_only_what_is_asked_for_gets_a_gradient():
    features = list(torch.randn(2, 3, 4, 5))
    map_logits = torch.randn(3, 2, 5, requires_grad=True)
    fuse_features(features, map_logits).sum().backward()
    assert map_logits.grad.any() and features[0].grad is None
    features[1].requires_grad_()
    fuse_features(features, map_logits.detach()).sum().backward()
    assert features[1].grad.any()


def test_compile():
    compiled = torch.compile(fuse_features, fullgraph=True, dynamic=True)
    for size in (4, 6):
        tensors = [torch.randn(2, 3, size), *torch.randn(3, 2, 5, size)]
        tensors = [tensor.requires_grad_() for tensor in tensors]
        results = []
        for op in (compiled, fuse_features):
            fused = op(tensors[1:], tensors[0])
            results.append((fused, *torch.autograd.grad(fused.square().sum(), tensors)))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


@given(seed=st.integers(0, 2**31), num_models=st.integers(1, 4), places=st.lists(st.integers(1, 4), max_size=2))
@settings(deadline=None, max_examples=50)
def test_properties(seed, num_models, places):
    generator = torch.Generator().manual_seed(seed)
    features = list(torch.randn(num_models, 2, 3, *places, generator=generator, dtype=torch.float64))
    map_logits = 3 * torch.randn(2, num_models, *places, generator=generator, dtype=torch.float64)
    fused = fuse_features(features, map_logits)
    stacked = torch.stack(features)
    torch.testing.assert_close(fused, fused.clamp(stacked.amin(0), stacked.amax(0)))
    # a constant of a place cancels; an equal map is the mean; a far larger entry chooses; models may change places
    shift = torch.randn(2, 1, *places, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(fuse_features(features, map_logits + shift), fused)
    torch.testing.assert_close(fuse_features(features, 0 * map_logits), stacked.mean(0))
    chosen = map_logits.clone()
    chosen[:, -1] = 1e4
    assert torch.equal(fuse_features(features, chosen), features[-1])
    torch.testing.assert_close(fuse_features(features[::-1], map_logits.flip(1)), fused)
    # a row is the same alone
    assert torch.equal(fuse_features([feature[1:] for feature in features], map_logits[1:]), fused[1:])


def test_bad_input():
    a, m = torch.randn(2, 3, 4), torch.randn(2, 2, 4)
    for call, message in [
        (lambda: fuse_features([], m), "features must be at least one tensor, got none"),
        (lambda: fuse_features([a, a[:1]], m), r"features\[1\] must be of shape \[2, 3, 4\], as features\[0\]"),
        (
            lambda: fuse_features([a], m),
            r"map_logits must be of shape \[2, 1, 4\], \[batch_size, num_models, \*places\]",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"features\[1\] must be torch.float32, got torch.float64"):
        fuse_features([a, a.double()], m)
    with pytest.raises(TypeError, match="map_logits must be one of torch.float32"):
        fuse_features([a, a], m.long())
