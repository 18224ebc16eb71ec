"""Kernels that nvcc and Triton compile, executed by the PTX interpreter on ordinary tensors."""

from pathlib import Path

import pytest
import torch

from . import build
from .ptx import Fault, run_ptx

needs_nvcc = pytest.mark.skipif(build.missing_nvcc() is not None, reason=str(build.missing_nvcc()))

SOURCE = (Path(__file__).parent / "sources" / "language.cu").read_text()


def ptx(flags: tuple = ()) -> str:
    return build.nvcc_ptx(SOURCE, "sm_80", flags)


#: None: threads in order; a number: a random schedule
SEEDS = [None, 1, 2]


@needs_nvcc
@pytest.mark.parametrize("seed", SEEDS)
def test_calls_and_loops_of_different_length(seed):
    n = 200
    x, y = torch.arange(n, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    run_ptx(ptx(), "calls", 4, 64, [x, y, n], seed=seed)

    def steps(value):
        count = 0
        while value > 1:
            value, count = (3 * value + 1 if value & 1 else value // 2), count + 1
        return count

    assert y.tolist() == [steps(i) for i in range(n)] + [0] * 56


@needs_nvcc
@pytest.mark.parametrize("seed", SEEDS)
def test_local_arrays(seed):
    x = torch.randint(-1000, 1000, (48 * 8,), dtype=torch.int32)
    y = torch.zeros_like(x)
    run_ptx(ptx(), "local_array", 1, 48, [x, y], seed=seed)
    assert torch.equal(y.view(48, 8), x.view(48, 8).sort(1).values)


@needs_nvcc
def test_jump_table():
    x = torch.randint(-(2**31), 2**31 - 1, (64,), dtype=torch.int32)
    y = torch.zeros_like(x)
    run_ptx(ptx(), "jump", 1, 64, [x, y])

    def expected(v):
        raw = v & 0xFFFFFFFF
        truncated = abs(v) // 7 * (1 if v >= 0 else -1)
        return [
            v * 3, v ^ 0x55, bin(raw).count("1"), 32 - raw.bit_length(), truncated, v - 7 * truncated,
            int(f"{raw:032b}"[::-1], 2), -v,
        ][v & 7]  # fmt: skip

    wrapped = [(expected(v) + 2**31) % 2**32 - 2**31 for v in x.tolist()]
    assert y.tolist() == wrapped


@needs_nvcc
@pytest.mark.parametrize("seed", SEEDS)
def test_warp_operations(seed):
    x = torch.randint(0, 100, (32,), dtype=torch.int32)
    y = torch.zeros(32, 8, dtype=torch.int32)
    run_ptx(ptx(), "warp_ops", 1, 32, [x, y], seed=seed)
    values = x.tolist()
    odd = sum(1 << i for i, v in enumerate(values) if v & 1)
    group = [sum(1 << j for j, w in enumerate(values) if w % 3 == v % 3) for v in values]
    columns = (y.to(torch.int64) & 0xFFFFFFFF).T.tolist()
    assert columns[0] == [odd] * 32
    assert columns[1] == group
    assert columns[2] == [sum(w for w in values if w % 3 == v % 3) for v in values]
    leader = values[(odd & -odd).bit_length() - 1]
    assert columns[3] == [leader if v & 1 else 0 for v in values]
    assert columns[4] == [values[i - 3] if i % 16 >= 3 else values[i] for i in range(32)]
    assert columns[5] == [odd & 0xFFFFF] * 20 + [0] * 12
    assert columns[6] == [[3, 1, 4, 1, 5][i % 5] for i in range(32)]
    assert sorted(columns[7]) == list(range(100, 132))


@needs_nvcc
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threads", [32, 96, 128])
def test_histogram(seed, threads):
    ids = torch.randint(0, 16, (500,), dtype=torch.int32)
    counts, first = torch.zeros(16, dtype=torch.int32), torch.full((16,), -1, dtype=torch.int32)
    run_ptx(ptx(), "histogram", 1, threads, [ids, counts, first, 500], 64, seed)
    expected = torch.bincount(ids, minlength=16)
    assert torch.equal(counts, expected.int())
    assert torch.equal(first, (expected.cumsum(0) - expected).int())


@needs_nvcc
@pytest.mark.parametrize("seed", SEEDS)
def test_block_sum(seed):
    x = torch.randint(-50, 50, (1000,)).float()
    y = torch.full((2,), torch.nan)
    counters = run_ptx(ptx(), "block_sum", 2, 256, [x, y, 1000], seed=seed)
    assert torch.equal(y, x.sum().expand(2))
    assert counters.barriers == 2 * 8
    assert counters.read_unique_sectors == 125
    assert counters.read_bytes == 2 * 4000


@needs_nvcc
def test_debug_code_runs():
    """-G: no registers are kept, everything goes through local memory and generic addresses."""
    ids = torch.randint(0, 16, (100,), dtype=torch.int32)
    counts, first = torch.zeros(16, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    run_ptx(ptx(("-G",)), "histogram", 1, 64, [ids, counts, first, 100], 64)
    assert torch.equal(counts, torch.bincount(ids, minlength=16).int())


@needs_nvcc
@pytest.mark.parametrize(
    "change, kind",
    [
        (dict(n=501), "out of bounds"),  # reads one id too many
        (dict(shared=60), "out of bounds"),  # room for 15 bins
        (dict(counts=15), "out of bounds"),
        (dict(block=1025), "block"),
        (dict(block=0), "block"),
        (dict(grid=0), "grid"),
        (dict(grid=(1, 65536)), "grid"),
    ],
)
def test_wrong_launches_are_refused(change, kind):
    ids = torch.zeros(500, dtype=torch.int32)
    counts, first = torch.zeros(change.get("counts", 16), dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    with pytest.raises((Fault, ValueError), match=kind):
        run_ptx(
            ptx(), "histogram", change.get("grid", 1), change.get("block", 64),
            [ids, counts, first, change.get("n", 500)], change.get("shared", 64),
        )  # fmt: skip


@needs_nvcc
def test_fault_names_line_and_threads():
    x = torch.zeros(100)
    with pytest.raises(Fault) as caught:
        run_ptx(ptx(), "block_sum", 1, 256, [x, torch.zeros(1), 104])
    message = str(caught.value)
    assert "out of bounds" in message and "ld.global" in message and "threads 100-103" in message
    assert "ld.global" in ptx().splitlines()[caught.value.line - 1]


@needs_nvcc
def test_views_bound_what_may_be_read():
    """A slice of a larger tensor does not make the rest of it readable."""
    whole = torch.arange(64).float()
    y = torch.zeros(1)
    run_ptx(ptx(), "block_sum", 1, 256, [whole[8:16], y, 8])
    assert y.item() == sum(range(8, 16))
    with pytest.raises(Fault, match="out of bounds"):
        run_ptx(ptx(), "block_sum", 1, 256, [whole[8:16], y, 9])


@needs_nvcc
def test_misaligned_pointer():
    raw = torch.zeros(41, dtype=torch.uint8)
    with pytest.raises(Fault, match="misaligned"):
        run_ptx(ptx(), "block_sum", 1, 256, [raw[1:], torch.zeros(1), 10])


@needs_nvcc
def test_reading_what_nobody_wrote():
    x = torch.zeros(16)
    with pytest.raises(Fault, match="uninitialised"):
        run_ptx(ptx(), "block_sum", 1, 256, [x, torch.zeros(1), 16], uninitialized=[x])


@needs_nvcc
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", ["divergent_vote", "divergent_barrier"])
def test_divergence_is_reported(kernel, seed):
    x, y = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    with pytest.raises(Fault, match="divergence"):
        run_ptx(ptx(), kernel, 1, 64, [x, y], seed=seed)
