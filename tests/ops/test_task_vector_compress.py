"""compress, decompress and the packed format, byte for byte."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import PackedDelta, TernaryDelta, apply_, compress, decompress, unapply_
from moe_kernels.ops.task_vector import native, reference
from moe_kernels.ops.task_vector.packed import HEADER, HEADER_BYTES, fingerprint
from moe_kernels.ops.task_vector.reference import bits
from tests.ops.helpers import DTYPES, seeded, strided

OP = "compress"
GPU_KERNELS = ["triton-cpu", "triton-ptx", "triton-cuda"]
DENSITIES = [0, 0.001, 0.01, 0.05, 0.2, 0.5, 0.7, 0.99, 1]


def random(shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 4095, 4096, 4097, 20_001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_write_the_bytes_of_the_reference(backend, dtype, size):
    delta = random(size, dtype)
    for density in DENSITIES:
        packed = compress(delta, density, backend=backend)
        expected = compress(delta, density, backend="reference")
        assert packed.nnz == expected.nnz == round(density * size)
        assert math.isclose(packed.scale, expected.scale, rel_tol=1e-6)  # sums of float64 in two orders
        assert torch.equal(packed.data[64:], expected.data[64:])
        planes = decompress(packed, backend=backend).planes
        assert torch.equal(planes, decompress(packed, backend="reference").planes)
        signs = decompress(packed, backend=backend).signs()
        assert torch.equal(signs, (delta.sign() * (signs != 0)).to(torch.int8))
        if 0 < packed.nnz < size:
            assert delta.abs()[signs != 0].min() >= delta.abs()[signs == 0].max()


@pytest.mark.parametrize("size", [1_000_003])
@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.5, 1.0])
def test_round_trip_of_many_blocks(backend, threads, size, density):
    delta = random(size)
    packed = compress(delta, density, backend=backend)
    kept = delta.abs().sort(descending=True).indices[: round(density * size)]
    expected = torch.zeros(size, dtype=torch.int8)
    expected[kept] = delta[kept].sign().to(torch.int8)
    assert torch.equal(decompress(packed, backend=backend).signs(), expected)
    assert torch.equal(PackedDelta.from_bytes(packed.data.clone()).data, packed.data)


# taskvector sizes of independent values, bits a parameter with descriptors: blocks of 4096 and 64-bit descriptors
@pytest.mark.parametrize("density, size", [(0.05, 0.359), (0.1, 0.595), (0.2, 0.958), (0.5, 1.519), (1.0, 1.016)])
def test_sizes(backend, density, size):
    packed = compress(random(1 << 22), density, backend=backend)
    assert packed.nbytes * 8 / packed.numel <= 1.01 * size


def test_every_mode_of_block(backend):
    """Empty, sparse, half, dense and full blocks beside each other, and a block of one outlier."""
    blocks = [torch.zeros(4096) for _ in range(6)]
    blocks[1][::20] = random(205)
    blocks[2][1::2] = random(2048)
    blocks[3] = random(4096)
    blocks[3][::20] = 0
    blocks[4] = random(4096)
    blocks[5][4095] = -1
    planes = TernaryDelta.from_signs(torch.cat(blocks)).planes
    data = native.pack_ternary(planes, [6, 4096], 1.0, 0.0, 0)
    assert torch.equal(data, reference.pack_ternary(planes, [6, 4096], 1.0, 0.0, 0))
    words = data[HEADER_BYTES : HEADER_BYTES + 48].view(torch.int64).tolist()
    assert [word >> 49 & 7 for word in words] == [0, 1, 2, 4, 3, 1]
    assert torch.equal(native.unpack_ternary(data), planes) and torch.equal(reference.unpack_ternary(data), planes)


def test_the_header():
    base = random((3, 5), torch.bfloat16)
    packed = compress(base + 1, 1.0, base=base)
    fields = HEADER.unpack(packed.data[:HEADER_BYTES].numpy().tobytes())
    assert fields[:4] == (b"STVEC\0\1\0", 15, 12, 1) and fields[13:16] == (3, 5, 0)
    assert packed.shape == (3, 5) and packed.nnz == 15 and packed.base_hash == fingerprint(base)
    assert packed.fits(base) and not packed.fits(base + 1) and not packed.fits(base.view(5, 3))
    assert compress(base, 1.0).fits(random((3, 5)))
    # the check value of CRC-32C, in every catalogue of them
    assert reference.crc32c(b"123456789") == 0xE3069283


def test_ties_are_kept_in_order(backend):
    delta = torch.tensor([1.0, -2.0, 2.0, -1.0, 1.0, 1.0, 0.0, -0.0] * 2000)
    signs = decompress(compress(delta, 0.5, backend=backend), backend=backend).signs()
    assert int((signs != 0).sum()) == 8000
    ones = (delta.abs() == 1).nonzero().flatten()
    assert torch.equal(signs[ones[:4000]], delta[ones[:4000]].to(torch.int8)) and not signs[ones[4000:]].any()
    assert torch.equal(signs[delta.abs() == 2], delta[delta.abs() == 2].sign().to(torch.int8))


def test_zeros_are_never_kept(backend):
    """ComPEFT's mask is all true where the threshold is 0."""
    delta = torch.zeros(1000)
    delta[10] = -3
    packed = compress(delta, 0.5, backend=backend)
    assert packed.nnz == 1 and decompress(packed).signs()[10] == -1
    assert compress(torch.zeros(1000), 1.0, backend=backend).nnz == 0


@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (1,), (1, 1), (7, 1), (1, 2, 1, 2, 1, 2, 1)], ids=str)
def test_small_shapes(backend, shape):
    delta = torch.full(shape, -2.0)
    packed = compress(delta, 1.0, backend=backend)
    assert packed.shape == delta.shape and packed.nnz == delta.numel()
    weight = torch.zeros(shape)
    apply_(weight, packed, backend=backend)
    assert torch.equal(weight, -torch.full(shape, packed.scale))
    assert decompress(packed, backend=backend).signs().shape == delta.shape


def test_scales(backend):
    delta = random(10_000)
    assert math.isclose(compress(delta, 0.1, backend=backend).scale, delta.std().item(), rel_tol=1e-5)
    kept = delta.abs().sort(descending=True).values[:1000]
    assert math.isclose(compress(delta, 0.1, scale="mean", backend=backend).scale, kept.mean().item(), rel_tol=1e-5)
    # Gaussian: mean|t| of the kept over sigma, as integrals give it
    assert math.isclose(kept.mean().item(), 2.06, rel_tol=0.05)
    assert compress(torch.tensor([-3.0]), 1.0, backend=backend).scale == 3.0  # the deviation of one element is none


def test_the_difference_is_made_on_the_way(backend):
    for dtype in DTYPES:
        base, tuned = random(9000, dtype), random(9000, dtype, seed=1)
        packed = compress(tuned, 0.3, base=base, backend=backend)
        t = tuned - base if dtype == torch.float64 else tuned.float() - base.float()
        assert torch.equal(decompress(packed).planes, decompress(compress(t, 0.3)).planes)
    assert torch.equal(
        compress(strided(random((30, 40))), 0.3, backend=backend).data, compress(random((30, 40)), 0.3).data
    )


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_state_dicts(backend, scope):
    delta = {"b": random((50, 60)) * 3, "a": random(700), "empty": torch.empty(0, 3)}
    packed = compress(delta, 0.1, scope=scope, backend=backend)
    assert packed.keys() == delta.keys()
    if scope == "tensor":
        for name, tensor in delta.items():
            assert torch.equal(packed[name].data, compress(tensor, 0.1, backend=backend).data)
        return
    flat = torch.cat([delta["a"], delta["b"].flatten()])
    whole = compress(flat, 0.1, backend=backend)
    assert packed["a"].scale == packed["b"].scale and math.isclose(packed["a"].scale, whole.scale, rel_tol=1e-6)
    signs = torch.cat([decompress(packed["a"]).signs(), decompress(packed["b"]).signs().flatten()])
    assert torch.equal(signs, decompress(whole).signs())
    reordered = compress(dict(reversed(delta.items())), 0.1, backend=backend)
    assert all(torch.equal(packed[name].data, reordered[name].data) for name in delta)


def test_global_ties_go_by_name(backend):
    packed = compress({"b": torch.ones(10), "a": torch.ones(10)}, 0.75, backend=backend)
    assert packed["a"].nnz == 10 and packed["b"].nnz == 5


def test_tied_weights_count_once(backend):
    shared = random(1000)
    alone = compress({"a": shared, "c": random(500, seed=2)}, 0.1, backend=backend)
    tied = compress({"a": shared, "b": shared, "c": random(500, seed=2)}, 0.1, backend=backend)
    assert all(torch.equal(tied[name].data, alone[name].data) for name in alone)
    assert tied["b"] is tied["a"]


def test_buffers_of_integers(backend):
    base = {"w": random(100), "ids": torch.arange(5), "mask": torch.ones(3, dtype=torch.bool)}
    tuned = {**base, "w": random(100, seed=1)}
    assert compress(tuned, 0.1, base=base, backend=backend).keys() == {"w"}
    with pytest.raises(
        ValueError, match="compress: ids must be equal in delta and base, got other values of torch.int64"
    ):
        compress({**tuned, "ids": torch.zeros(5, dtype=torch.int64)}, 0.1, base=base)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(backend, bad):
    delta = random(5000)
    delta[4321] = bad
    with pytest.raises(ValueError, match="compress: layer.weight must be finite, got NaN or an infinity"):
        compress({"layer.weight": delta, "other": random(5)}, 0.1, backend=backend)


def test_float16_does_not_overflow(backend):
    """The sum of magnitudes of a large float16 tensor is beyond float16."""
    delta = (random(1 << 20) * 0.5).half()
    packed = compress(delta, 0.5, scale="mean", backend=backend)
    assert 0.4 < packed.scale < 0.8 and math.isclose(packed.sigma, 0.5, rel_tol=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_vectors_apply_like_their_planes(backend, dtype):
    before = (random(50_000) * 0.02).to(dtype)
    packed = [compress(random(50_000, seed=i), density, backend=backend) for i, density in enumerate((0.05, 0.5, 0.95))]
    planes = [decompress(one) for one in packed]
    expected, actual, mixed = before.clone(), before.clone(), before.clone()
    coefficients = [1e-3, -2e-3, 3e-3]
    apply_(expected, planes, coefficients, backend="reference")
    undo = apply_(actual, packed, coefficients, undo=True, backend=backend)
    apply_(mixed, [packed[0], planes[1], packed[2]], coefficients, backend=backend)
    assert torch.equal(bits(actual), bits(expected)) and torch.equal(bits(mixed), bits(expected))
    unapply_(actual, undo, backend=backend)
    assert torch.equal(bits(actual), bits(before))


def reseal(data: torch.Tensor) -> torch.Tensor:
    """With the checksum that the bytes ask for."""
    octets = data.numpy().tobytes()
    crc = reference.crc32c(octets[:36] + bytes(4) + octets[40:])
    data[36:40] = torch.frombuffer(bytearray(crc.to_bytes(4, "little")), dtype=torch.uint8)
    return data


def test_damage_is_found():
    data = compress(random(10_000), 0.2).data
    for at in (0, 9, 17, 20, 25, 37, 45, 50, 60, 65, 73, 128, 140, 200, data.numel() - 1):
        damaged = data.clone()
        damaged[at] ^= 4
        with pytest.raises(ValueError, match="PackedDelta: data must be|decompress: the packed task vector|block"):
            PackedDelta.from_bytes(damaged)
    for length in (0, 1, 64, 127, 128, 192, data.numel() - 64):
        with pytest.raises(ValueError, match="PackedDelta: data must be a packed task vector|checksum"):
            PackedDelta.from_bytes(data[:length].clone())
    with pytest.raises(ValueError, match="got kind 7"):
        changed = data.clone()
        changed[32] = 7
        PackedDelta.from_bytes(reseal(changed))
    with pytest.raises(ValueError, match="a later version"):
        changed = data.clone()
        changed[6] = 2
        PackedDelta.from_bytes(reseal(changed))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([100, 4096, 9000]), st.sampled_from([0.02, 0.3, 0.5, 0.9, 1.0]), st.data())
def test_no_bytes_make_a_reader_fail(size, density, data):
    """Damage under a right checksum: the kernel and the reference find the same vector or both refuse."""
    packed = compress(random(size), density).data.clone()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(8, packed.numel() - 1), st.integers(HEADER_BYTES, HEADER_BYTES + 23)))
        packed[at] = data.draw(st.integers(0, 255))
    reseal(packed)
    try:
        delta = PackedDelta.from_header(packed)
    except ValueError:
        with pytest.raises(RuntimeError):
            native.unpack_ternary(packed)
        return
    outcomes = []
    for backend in ("native", "reference"):
        try:
            outcomes.append(decompress(delta, backend=backend).planes.tolist())
        except ValueError as error:
            assert "damaged" in str(error)
            outcomes.append(None)
    if outcomes[1] is not None and outcomes[0] is None:  # the header's count, which the reference does not compare
        assert delta.nnz != sum(TernaryDelta(torch.tensor(outcomes[1]), delta.shape).signs().abs().flatten().tolist())
    else:
        assert outcomes[0] == outcomes[1]
    weight = torch.zeros(delta.shape)
    try:
        apply_(weight, delta, backend="native")
    except RuntimeError as error:
        assert "damaged" in str(error)
    except ValueError as error:
        assert "finite" in str(error)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=0, max_size=600))
def test_random_bytes_are_refused(octets):
    data = torch.frombuffer(bytearray(octets + b"\0"), dtype=torch.uint8)
    with pytest.raises(ValueError):
        PackedDelta.from_bytes(data)
    with pytest.raises(RuntimeError):
        native.unpack_ternary(data)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9000), st.floats(0, 1), st.integers(0, 2**31 - 1), st.sampled_from([1, 4, 2**20]))
def test_any_size_and_density(size, density, seed, levels):
    """With few levels there are many ties."""
    delta = (random(size, seed=seed) * levels).round() / levels
    packed = compress(delta, density, backend="native")
    expected = compress(delta, density, backend="reference")
    assert torch.equal(packed.data[64:], expected.data[64:])
    assert torch.equal(decompress(packed, backend="native").planes, decompress(packed, backend="reference").planes)


def test_bad_input():
    delta = random((3, 4))
    for density in (-0.1, 1.5, float("nan"), "5%", True):
        with pytest.raises(ValueError, match="compress: density must be a number from 0 to 1"):
            compress(delta, density)
    with pytest.raises(ValueError, match="scale must be 'std' or 'mean', got 'sum'"):
        compress(delta, 0.1, scale="sum")
    with pytest.raises(ValueError, match="scope must be 'global' or 'tensor'"):
        compress(delta, 0.1, scope="row")
    with pytest.raises(TypeError, match="compress: delta must be one of"):
        compress(delta.int(), 0.1)
    with pytest.raises(ValueError, match=r"base of delta must be of shape \[3, 4\], got \[4, 3\]"):
        compress(delta, 0.1, base=random((4, 3)))
    with pytest.raises(TypeError, match="base of delta must be torch.float32, got torch.bfloat16"):
        compress(delta, 0.1, base=delta.bfloat16())
    with pytest.raises(ValueError, match="base must be of the same names as delta, got in one alone: extra, lost"):
        compress({"w": delta, "extra": delta}, 0.1, base={"w": delta, "lost": delta})
    with pytest.raises(ValueError, match="at most 7 dimensions"):
        compress(torch.zeros(1, 1, 1, 1, 1, 1, 1, 1), 0.1)
    with pytest.raises(TypeError, match="decompress: packed must be a PackedDelta, got Tensor"):
        decompress(delta)


def test_registration():
    delta = random(5000)
    planes = native.select_ternary(delta, None, 0x3F800000, 3)
    torch.library.opcheck(native.count_magnitudes, (delta, delta * 2, -1))
    torch.library.opcheck(native.count_magnitudes, (delta, None, 0x7F00))
    torch.library.opcheck(native.delta_moments, (delta, None))
    torch.library.opcheck(native.select_ternary, (delta, None, 0x3F800000, 3))
    torch.library.opcheck(native.pack_ternary, (planes, [5000], 1.0, 1.0, 0))
    torch.library.opcheck(native.unpack_ternary, (native.pack_ternary(planes, [5000], 1.0, 1.0, 0),))
