"""Lossless patches: make_patch, apply_patch_, unapply_patch_. Every bit is compared."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import Patch, apply_patch_, compress, make_patch, unapply_patch_
from moe_kernels.ops.task_vector import native, reference
from moe_kernels.ops.task_vector.packed import HEADER_BYTES
from moe_kernels.ops.task_vector.reference import bits
from tests.ops.helpers import DTYPES, seeded, strided
from tests.ops.test_task_vector import random_bits, special
from tests.ops.test_task_vector_compress import random, reseal

OP = "make_patch"


def stepped(base: torch.Tensor, step: float, seed: int = 1) -> torch.Tensor:
    """After an optimiser's step of one size and random signs, in float32."""
    signs = torch.randint(0, 2, base.shape, generator=seeded(seed)) * 2 - 1
    return (base.float() + step * signs).to(base.dtype)


def round_trip(weight: torch.Tensor, base: torch.Tensor, backend: str) -> Patch:
    patch = make_patch(weight, base, backend=backend)
    assert torch.equal(patch.data, make_patch(weight, base, backend="reference").data)
    assert patch.fits(base) and patch.nnz == int((bits(weight) != bits(base)).sum())
    for other in (backend, "reference"):
        work = base.clone()
        apply_patch_(work, patch, backend=other)
        assert torch.equal(bits(work), bits(weight))
        unapply_patch_(work, patch, backend=other)
        assert torch.equal(bits(work), bits(base))
    again = Patch.from_bytes(patch.data.clone())
    assert (again.shape, again.dtype, again.nnz, again.base_hash) == (
        patch.shape,
        patch.dtype,
        patch.nnz,
        patch.base_hash,
    )
    return patch


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4095, 4096, 4097, 9001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_optimisers_step(backend, dtype, size):
    base = random(size, dtype) * 0.02
    round_trip(stepped(base, 3e-6), base, backend)
    round_trip(base, base, backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bits(backend, dtype):
    """NaN, infinities, both zeros, denormals: all pairs of them, and bits at random."""
    kinds = special(dtype)[:14]
    round_trip(kinds.repeat(14), kinds.repeat_interleave(14), backend)
    patterns = [random_bits(5000, dtype, seeded(seed)) for seed in (0, 1)]
    round_trip(*patterns, backend)
    largest = 2 ** (8 * dtype.itemsize - 1) - 1
    ends = torch.tensor([0, largest, -1, -largest - 1]).to(bits(kinds).dtype).view(dtype)
    round_trip(ends.repeat(4), ends.repeat_interleave(4), backend)


def test_threads_and_many_blocks(backend, threads):
    base = random(300_001, torch.bfloat16) * 0.02
    weight = stepped(base, 3e-6)
    weight[100_000:200_000] = base[100_000:200_000]
    patch = make_patch(weight, base, backend="native")
    work = base.clone()
    apply_patch_(work, patch, backend="native")
    assert torch.equal(work, weight)


@pytest.mark.parametrize("step", [3e-6, 3e-5])
def test_size_near_entropy(step):
    """An Adam-like step on float32 weights, their bfloat16 copies: within 13 % of the entropy of how far each goes."""
    trained = random(1 << 20) * 0.02
    base, weight = trained.bfloat16(), stepped(trained, step).bfloat16()
    patch = make_patch(weight, base)
    steps = torch.tensor(reference.in_order(weight)) - torch.tensor(reference.in_order(base))
    share = steps.unique(return_counts=True)[1].double() / steps.numel()
    assert 8 * patch.nbytes / patch.numel < 1.13 * float(-(share * share.log2()).sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5000), st.sampled_from(DTYPES), st.floats(0, 1), st.integers(0, 2**31 - 1))
def test_any_pair_of_weights(size, dtype, density, seed):
    generator = seeded(seed)
    base = random_bits(size, dtype, generator)
    changed = torch.rand(size, generator=generator) < density
    weight = torch.where(changed, random_bits(size, dtype, generator), base)
    round_trip(weight, base, "native")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([100, 4096, 5000]), st.sampled_from(DTYPES), st.data())
def test_no_bytes_make_a_reader_fail(size, dtype, data):
    """Damage under a right checksum: the kernel and the reference lead to the same bits or both refuse."""
    base = (random(size) * 0.02).to(dtype)
    packed = make_patch(stepped(base, 1e-4), base).data.clone()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(8, packed.numel() - 1), st.integers(HEADER_BYTES, HEADER_BYTES + 15)))
        packed[at] = data.draw(st.integers(0, 255))
    reseal(packed)
    try:
        patch = Patch.from_header(packed)
    except ValueError:
        return
    outcomes = []
    for kernels in (native, reference):
        weight = torch.zeros(patch.shape, dtype=patch.dtype)
        try:
            kernels.check_patch(packed)
        except (RuntimeError, ValueError) as error:
            assert "damaged" in str(error)
            outcomes.append(None)
            continue
        kernels.apply_patch(weight, packed, False)
        outcomes.append(bits(weight).tolist())
    if outcomes[1] is not None and outcomes[0] is None:  # the header's count, which the reference does not compare
        assert patch.nnz != int((torch.tensor(outcomes[1]) != 0).sum())
    else:
        assert outcomes[0] == outcomes[1]


def test_a_damaged_patch_is_refused():
    base = random(10_000).bfloat16()
    patch = make_patch(stepped(base, 1e-3), base)
    for at in (0, 33, 37, 68, 140, 1000, patch.nbytes - 1):
        damaged = patch.data.clone()
        damaged[at] ^= 64
        with pytest.raises(ValueError, match="Patch: data must be|damaged"):
            Patch.from_bytes(damaged)
    with pytest.raises(ValueError, match="Patch: data must be a packed task vector"):
        Patch.from_bytes(patch.data[:100].clone())
    broken = patch.data.clone()
    broken[2000:] = 0
    weight = base.clone()
    with pytest.raises(RuntimeError, match="its damaged blocks changed nothing"):
        apply_patch_(weight, Patch.from_header(broken))


def test_shapes_strides_and_parameters():
    base = random((30, 40)).bfloat16()
    weight = stepped(base, 1e-3)
    patch = make_patch(strided(weight), base.t().contiguous().t())
    assert torch.equal(patch.data, make_patch(weight, base).data) and patch.shape == (30, 40)
    work = torch.nn.Parameter(base.t().contiguous().t())
    version = work._version
    apply_patch_(work, patch)
    assert torch.equal(work, weight) and work._version > version
    for shape in ((), (3, 0), (1, 1, 1)):
        zeros = torch.zeros(shape)
        assert make_patch(zeros + 1, zeros).nnz == zeros.numel()


def test_state_dicts():
    base = {"w": random(100), "ids": torch.arange(5)}
    weight = {"w": random(100, seed=1), "ids": torch.arange(5)}
    assert make_patch(weight, base).keys() == {"w"}
    with pytest.raises(ValueError, match="make_patch: ids must be equal in weight and base"):
        make_patch({**weight, "ids": torch.zeros(5, dtype=torch.int64)}, base)
    with pytest.raises(ValueError, match="of the same names as weight, got in one alone: extra"):
        make_patch({**weight, "extra": base["w"]}, base)
    with pytest.raises(TypeError, match="base must be a state dict like weight, got Tensor"):
        make_patch(weight, base["w"])


def test_bad_input():
    base = random((4, 5)).bfloat16()
    patch = make_patch(base + 1, base)
    with pytest.raises(ValueError, match=r"apply_patch_: weight must be of shape \[4, 5\], got \[5, 4\]"):
        apply_patch_(base.t(), patch)
    with pytest.raises(TypeError, match="weight must be torch.bfloat16, got torch.float16"):
        apply_patch_(base.half(), patch)
    with pytest.raises(TypeError, match="patch must be a Patch, got PackedDelta"):
        apply_patch_(base, compress(base, 0.1))
    with pytest.raises(ValueError, match="data must be a patch, got a task vector"):
        Patch.from_bytes(compress(base, 0.1).data)
    with pytest.raises(TypeError, match="make_patch: weight must be one of"):
        make_patch(base.int(), base)
    with pytest.raises(TypeError, match="base of weight must be torch.bfloat16, got torch.float32"):
        make_patch(base, base.float())
    with pytest.raises(ValueError, match=r"base of weight must be of shape \[4, 5\], got \[20\]"):
        make_patch(base, base.flatten())


def test_registration():
    base = random(5000).bfloat16()
    arguments = (stepped(base, 1e-3), base, [5000], 0)
    torch.library.opcheck(native.make_patch, arguments)
    packed = native.make_patch(*arguments)
    torch.library.opcheck(native.apply_patch, (base.clone(), packed, False))
    torch.library.opcheck(native.check_patch, (packed,))
