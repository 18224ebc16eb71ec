"""Packed task vectors decoded where they are: every mode and k, any bytes; the planes are equal to the bit."""

import pytest
import torch

from moe_kernels import PackedDelta, TernaryDelta, apply_, compress, decompress, unapply_
from moe_kernels.ops.task_vector import native, reference
from moe_kernels.ops.task_vector.reference import bits
from tests.ops.helpers import DTYPES, SLOW, seeded

OP = "decompress"
GPU_KERNELS = ["native-simt", "native-ptx", "native-cuda", "triton-cpu", "triton-ptx", "triton-cuda"]


def random_signs(size: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator, device="cpu") * 2 - 1
    return signs * (torch.rand(size, generator=generator, device="cpu") < density)


def packed_of(signs: torch.Tensor, scale: float = 1e-3) -> PackedDelta:
    delta = TernaryDelta.from_signs(signs, scale)
    return PackedDelta.from_header(reference.pack_ternary(delta.planes, list(delta.shape), scale, 0.0, 0))


def here(packed: PackedDelta) -> PackedDelta:
    """On the device that new tensors are made on."""
    return packed.to(torch.get_default_device())


def forced(mode: int, k: int):
    """A writer of blocks that takes this mode wherever it can hold the block, and else a bitmap."""

    def write(signs: list[int]) -> tuple[int, int, int, bytes]:
        positions = [i for i, sign in enumerate(signs) if sign]
        zeros = [i for i, sign in enumerate(signs) if not sign]
        listed = {1: positions, 4: zeros}.get(mode, [])
        stream = reference._Bits()
        if listed:
            gaps = [at - before - 1 for before, at in zip([-1, *listed], listed, strict=False)]
            low = [gap & (1 << k) - 1 for gap in gaps]
            if mode == 1:
                low = [field << 1 | (signs[at] < 0) for field, at in zip(low, listed, strict=True)]
            stream.rice(low, k + (mode == 1), [gap >> k for gap in gaps])
        else:
            stream.put(sum(1 << at for at in positions), len(signs))
        if not listed or mode == 4:
            stream.put(sum((signs[at] < 0) << i for i, at in enumerate(positions)), len(positions))
        return mode if listed else 2, k if listed else 0, len(positions), reference._words(stream)

    return write


def reseal(data: torch.Tensor) -> torch.Tensor:
    """With the checksum that the bytes ask for."""
    octets = data.numpy().tobytes()
    crc = reference.crc32c(octets[:36] + bytes(4) + octets[40:])
    data[36:40] = torch.frombuffer(bytearray(crc.to_bytes(4, "little")), dtype=torch.uint8)
    return data


@pytest.mark.on_gpus
@pytest.mark.parametrize("size", [1, 31, 33, 64, 65, 4095, 4096, 4097, 9 * 4096 + 100])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.55, 0.97, 1.0])
def test_blocks_as_they_are_written(backend, kernel_id, size, density):
    """0: empty, 0.01 and 0.3: Rice, 0.55 and 0.97: Rice of the zeros, 1: all signs."""
    if kernel_id in SLOW and size not in (33, 4097):
        pytest.skip("an interpreter gets some of them")
    signs = random_signs(size, density)
    planes = decompress(here(packed_of(signs)), backend=backend).planes
    assert torch.equal(planes.cpu(), TernaryDelta.from_signs(signs).planes)


@pytest.mark.on_gpus
def test_blocks_of_all_modes_in_one_vector(backend):
    signs = torch.cat([random_signs(4096, density, seed) for seed, density in enumerate((0, 0.05, 0.5, 1, 0.95))])
    signs = torch.cat([signs, signs.flip(0), random_signs(77, 0.2)])
    planes = decompress(here(packed_of(signs)), backend=backend).planes
    assert torch.equal(planes.cpu(), TernaryDelta.from_signs(signs).planes)


@pytest.mark.on_gpus
@pytest.mark.parametrize("mode", [1, 2, 4])
def test_any_mode_may_hold_a_block(backend, kernel_id, mode, monkeypatch):
    """Every k, full blocks too: fields of 12 bits for each of 4096 elements."""
    for k in (0, 1, 5, 11) if kernel_id in SLOW else range(12):
        density = (0.0, 0.03, 0.4, 0.999, 1.0)
        signs = torch.cat([random_signs(4096, d, k) for d in (density[k % 5 :] if kernel_id in SLOW else density)])
        signs = torch.cat([signs, random_signs(100, 0.4)])
        monkeypatch.setattr(reference, "_pack_block", forced(mode, k))
        packed = packed_of(signs)
        planes = decompress(here(packed), backend=backend).planes
        assert torch.equal(planes.cpu(), TernaryDelta.from_signs(signs).planes), k


def outcome(packed: PackedDelta, backend: str) -> list | None:
    try:
        return decompress(packed, backend=backend).planes.tolist()
    except ValueError as error:
        assert "damaged" in str(error)
        return None


@pytest.mark.on_gpus
@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 0.93, 1.0])
def test_no_bytes_make_a_reader_fail(backend, kernel_id, density):
    """Damage under a right checksum: the CPU and the GPU find the same planes or both refuse."""
    generator = torch.Generator("cpu").manual_seed(int(density * 100))

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator, device="cpu"))

    refused = 0
    for trial in range(3 if kernel_id in SLOW else 40):
        packed = packed_of(random_signs((100, 4096, 5000)[trial % 3], density, trial))
        data = packed.data.clone()
        for _ in range(draw(1, 4)):
            # the descriptor's mode, k and count more often than anything else
            at = draw(128, data.numel()) if draw(0, 3) else 128 + 8 * draw(0, -(-packed.numel // 4096)) + draw(4, 7)
            data[at] = draw(0, 256)
        damaged = PackedDelta.from_header(reseal(data))
        with torch.device("cpu"):
            try:
                expected = native.unpack_ternary(data).tolist()
            except RuntimeError as error:
                assert "damaged" in str(error)
                expected, refused = None, refused + 1
        assert outcome(here(damaged), backend) == expected
    assert refused or kernel_id in SLOW


@pytest.mark.on_gpus
@pytest.mark.parametrize("mode", [1, 4])
def test_codes_that_end_with_the_payload(backend, mode):
    """Counts that ask for more codes than there are, at the very end of the bytes: nothing behind them is read."""
    packed = packed_of(random_signs(4096, 0.05 if mode == 1 else 0.95))
    for count in (packed.nnz + 1, packed.nnz - 1, 0, 4096, 4097, 0x7FFF):
        data = packed.data.clone()
        word = data[128:136].view(torch.int64)
        word &= ~(0x7FFF << 34)
        word |= count << 34
        with pytest.raises(ValueError, match="damaged"):
            decompress(here(PackedDelta.from_header(reseal(data))), backend=backend)
    for offset in (packed.nbytes // 4, 2**34 - 1):
        data = packed.data.clone()
        word = data[128:136].view(torch.int64)
        word &= ~(2**34 - 1)
        word |= offset
        with pytest.raises(ValueError, match="block 0 of the packed task vector is damaged"):
            decompress(here(PackedDelta.from_header(reseal(data))), backend=backend)


@pytest.mark.on_gpus
def test_the_first_damaged_block_is_named(backend, kernel_id):
    packed = packed_of(random_signs(4 * 4096, 0.05))
    data = packed.data.clone()
    for block in (2, 3):
        data[128 + 8 * block + 7] = 1  # of the zero bits
    block = "[23]" if kernel_id == "native-cpu" else "2"  # there, what a thread finds
    with pytest.raises(ValueError, match=f"decompress: block {block} of the packed task vector is damaged"):
        decompress(here(PackedDelta.from_header(reseal(data))), backend=backend)
    weight = torch.zeros(4 * 4096)
    with pytest.raises((RuntimeError, ValueError), match="damaged"):
        apply_(weight, here(PackedDelta.from_header(data)), backend=backend)


@pytest.mark.on_gpus
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_vectors_apply_like_their_planes(backend, kernel_id, dtype):
    size = 5000 if kernel_id in SLOW else 20_000
    with torch.device("cpu"):
        before = (torch.randn(size, generator=seeded(3)) * 0.02).to(dtype)
        packed = [packed_of(random_signs(size, density, i), 1e-3) for i, density in enumerate((0.05, 0.5, 0.95))]
        planes = [decompress(one, backend="reference") for one in packed]
        expected = before.clone()
        apply_(expected, planes, [1.0, -2.0, 3.0], backend="reference")
    weight = before.to(torch.get_default_device())
    undo = apply_(weight, [*map(here, packed)], [1.0, -2.0, 3.0], undo=True, backend=backend)
    assert torch.equal(bits(weight.cpu()), bits(expected))
    unapply_(weight, undo, backend=backend)
    assert torch.equal(bits(weight.cpu()), bits(before))
    mixed = [here(packed[0]), planes[1].to(weight.device), here(packed[2])]
    apply_(weight, mixed, [1.0, -2.0, 3.0], backend=backend)
    assert torch.equal(bits(weight.cpu()), bits(expected))


@pytest.mark.on_gpus
def test_a_damaged_vector_changes_no_weight(backend, kernel_id):
    """On the CPU, which decodes block by block, its damaged blocks count as zero."""
    whole, other = (packed_of(random_signs(5000, 0.3, seed)) for seed in (0, 1))
    data = other.data.clone()
    data[128 + 8 + 7] = 1
    weight = torch.zeros(5000)
    with pytest.raises((RuntimeError, ValueError), match="damaged"):
        apply_(weight, [here(whole), here(PackedDelta.from_header(data))], backend=backend)
    assert kernel_id == "native-cpu" or not weight.any()


@pytest.mark.on_gpus
def test_odd_addresses_and_no_elements(backend):
    signs = random_signs(4097, 0.2)
    packed = packed_of(signs)
    memory = torch.zeros(packed.nbytes + 4, dtype=torch.uint8)
    for shift in (1, 4):
        moved = memory[shift : shift + packed.nbytes].copy_(packed.data)
        planes = decompress(PackedDelta.from_header(moved), backend=backend).planes
        assert torch.equal(planes.cpu(), TernaryDelta.from_signs(signs).planes)
    with torch.device("cpu"):
        empty = compress(torch.empty(0, 3), 0.5)
    assert decompress(here(empty), backend=backend).planes.shape == (0, 2)
