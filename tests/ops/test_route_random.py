"""Random routing: the generator's published vectors, what it is keyed by, and how evenly it draws."""

import pytest
import torch

from moe_kernels import growing_top_k, route_random
from moe_kernels.ops.route import native, reference

BACKENDS = ["reference", "native"]


def test_philox_gives_its_published_vectors():
    # Random123's known answers for philox4x32-10: zeros, ones, digits of pi
    for counter, key, expected in [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]:
        words = tuple(torch.tensor([word]) for word in counter)
        assert tuple(word.item() for word in reference.philox(words, *key)) == expected


# one block of four draws, a partial block, many; token numbers beyond 32 bits and negative
@pytest.mark.parametrize("num_experts", [1, 4, 7, 130])
@pytest.mark.parametrize("key", [(0, 0, 0), (2**32 - 1, 2**32 - 1, 2**32 - 1), (7, 3, 5)])
def test_kernel_draws_what_the_reference_draws(backend, num_experts, key):
    token_ids = torch.tensor([0, 1, 2, 2**31, 2**32, 2**63 - 1, -1] + list(range(100)))
    arguments = dict(zip(("seed", "step", "layer"), key, strict=True), top_k=min(3, num_experts))
    ids, weights = route_random(token_ids, num_experts, **arguments, backend=backend)
    expected_ids, expected = route_random(token_ids, num_experts, **arguments, backend="reference")
    assert torch.equal(ids, expected_ids) and torch.equal(weights, expected)
    assert ids.dtype == torch.int32 and ((ids >= 0) & (ids < num_experts)).all()


@pytest.mark.parametrize("which", BACKENDS)
def test_a_draw_depends_on_its_arguments_alone(which):
    token_ids = torch.arange(200)
    expected, _ = route_random(token_ids, 16, 2, seed=1, step=5, layer=3, backend=which)
    torch.manual_seed(99)  # no global state
    # another split of the batch, as another rank has it
    parts = [route_random(part, 16, 2, seed=1, step=5, layer=3, backend=which)[0] for part in token_ids.split(70)]
    assert torch.equal(torch.cat(parts), expected)
    # tokens that share a number share their experts: a draw for each sequence
    ids, _ = route_random(torch.tensor([4, 4, 9, 4]), 16, 2, seed=1, step=5, layer=3, backend=which)
    assert torch.equal(ids, expected[[4, 4, 9, 4]])
    for other in (dict(seed=2, step=5, layer=3), dict(seed=1, step=6, layer=3), dict(seed=1, step=5, layer=4)):
        ids, _ = route_random(token_ids, 16, 2, **other, backend=which)
        assert (ids[:, 0] == expected[:, 0]).float().mean() < 0.5


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_draws_are_distinct_and_even(which, top_k):
    num_tokens, num_experts = 6000, 6
    ids, weights = route_random(torch.arange(num_tokens), num_experts, top_k, seed=3, backend=which)
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    assert torch.equal(weights, torch.full_like(weights, 1 / top_k))
    for column in ids.T:
        counts = torch.bincount(column, minlength=num_experts).double()
        mean = num_tokens / num_experts
        # chi-squared with 5 degrees of freedom: above 25.7 once in ten thousand; the draw is fixed by its seed
        assert ((counts - mean).square() / mean).sum() < 25.7


def test_compile_and_registration(backend):
    torch.library.opcheck(native.route_random, (torch.arange(5), 6, 2, 1, 3, 0))
    compiled = torch.compile(
        lambda tokens, step: route_random(tokens, 6, 2, seed=1, step=step, backend=backend),
        fullgraph=True,
        dynamic=True,
    )
    for num_tokens, step in ((3, 5), (9, 6)):
        token_ids = torch.arange(num_tokens)
        ids, weights = compiled(token_ids, step)
        expected_ids, expected = route_random(token_ids, 6, 2, seed=1, step=step, backend=backend)
        assert torch.equal(ids, expected_ids) and torch.equal(weights, expected)


def test_checkpointing_draws_the_same_experts_again():
    seen = []

    def layer(x):
        ids, weights = route_random(torch.arange(x.shape[0]), 8, seed=0, step=1)
        seen.append(ids)
        return x * weights + ids

    x = torch.randn(50, 1, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False).sum().backward()
    assert len(seen) == 2 and torch.equal(*seen)


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (3, 4, 0), (3, 0, 0)])
def test_edges(backend, num_tokens, num_experts, top_k):
    ids, weights = route_random(torch.arange(num_tokens), num_experts, top_k, seed=0, backend=backend)
    assert ids.shape == weights.shape == (num_tokens, top_k)


def test_growing_top_k():
    # linear from 1 to all, every k equally long
    ks = [growing_top_k(step, 40, 4) for step in range(40)]
    assert ks == [1] * 10 + [2] * 10 + [3] * 10 + [4] * 10 and growing_top_k(1000, 40, 4) == 4
    assert growing_top_k(0, 10, 8, first=3) == 3
    with pytest.raises(ValueError, match=r"growing_top_k: first must be in \[1, num_experts=4\], got 5"):
        growing_top_k(0, 10, 4, first=5)


def test_bad_input():
    for arguments, message in [
        (dict(top_k=5, seed=0), r"top_k must be in \[0, num_experts=4\], got 5"),
        (dict(seed=-1), r"seed must be in \[0, 2\*\*32\), got -1"),
        (dict(seed=0, step=2**32), r"step must be in \[0, 2\*\*32\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            route_random(torch.arange(3), 4, **arguments)
    with pytest.raises(TypeError, match="token_ids must be torch.int64, got torch.float32"):
        route_random(torch.zeros(3), 4, seed=0)
