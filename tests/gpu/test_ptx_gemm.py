"""CUDA matrix products for sm_80 and sm_90, and what happens when one line of their PTX is changed.

A bench that lets a wrong kernel pass proves nothing, so each mutant must be reported, by the check that is meant for
it.
"""

import re
from pathlib import Path

import pytest
import torch

from moe_kernels.testing import assert_close_to_reference

from . import build
from .ptx import Fault, TensorMap, run_ptx

pytestmark = pytest.mark.skipif(build.missing_nvcc() is not None, reason=str(build.missing_nvcc()))

SOURCES = Path(__file__).parent / "sources"


def text_of(name: str, arch: str) -> str:
    return build.nvcc_ptx((SOURCES / name).read_text(), arch)


def run_sm80(text: str, seed=None, shared: int = 2 * 2 * 64 * 40 * 2, depth: int = 128):
    rows, columns = 100, 64
    a, b = torch.randn(rows, depth).bfloat16(), torch.randn(columns, depth).bfloat16()
    out = torch.full((rows, columns), torch.nan)
    counters = run_ptx(text, "gemm", (2, 1), 128, [a, b, out, rows, columns, depth], shared, seed, max_steps=15_000)
    assert_close_to_reference(out, a.double() @ b.double().T, a.float() @ b.float().T)
    return counters


def run_sm90(text: str, seed=None, shared: int = 2 * 2 * 8192 + 8192, swizzle: int = 128, depth: int = 256):
    rows, columns = 100, 64
    a, b = torch.randn(rows, depth).bfloat16(), torch.randn(columns, depth).bfloat16()
    out = torch.full((rows, columns), torch.nan).bfloat16()
    maps = [TensorMap(a, (64, 64), swizzle), TensorMap(b, (64, 64), 128), TensorMap(out, (64, 64))]
    counters = run_ptx(text, "gemm", (2, 1), 256, [*maps, depth], shared, seed, max_steps=15_000)
    assert_close_to_reference(out, a.double() @ b.double().T, a @ b.T)
    return counters


KERNELS = {"sm80": ("gemm_sm80.cu", "sm_80", run_sm80), "sm90": ("gemm_sm90.cu", "sm_90a", run_sm90)}


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gemm(kernel, seed):
    name, arch, run = KERNELS[kernel]
    run(text_of(name, arch), seed)


# one stage, an odd number of stages, more than the pipeline holds
@pytest.mark.parametrize("stages", [1, 3, 5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_depths(kernel, stages):
    name, arch, run = KERNELS[kernel]
    run(text_of(name, arch), depth=stages * (32 if kernel == "sm80" else 64))


def test_counters_of_the_sm80_kernel():
    counters = run_sm80(text_of("gemm_sm80.cu", "sm_80"))
    depth, tiles = 128, 2
    assert counters.tensor_flops == tiles * 2 * 64 * 64 * depth
    # a, and b for each of the two tiles, as rows of 64 bytes; the zeros past the last row are not read
    assert counters.read_bytes == (100 + 2 * 64) * depth * 2
    assert counters.read_sectors == counters.read_bytes // 32
    assert counters.read_unique_sectors == (100 + 64) * depth * 2 // 32
    assert counters.write_sectors == counters.write_unique_sectors == 100 * 64 * 4 // 32
    assert counters.barriers == tiles * 4 * (depth // 32) * 2
    assert counters.by_opcode["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] == tiles * 4 * 8 * depth // 16
    # the padded rows of 80 bytes keep ldmatrix free of conflicts; cp.async writes two rows in each phase, four of
    # whose banks meet
    lines = text_of("gemm_sm80.cu", "sm_80").splitlines()
    assert all("cp.async" in lines[line - 1] for line in counters.conflicts_by_line)
    assert counters.bank_conflicts == tiles * (64 + 64) * depth * 2 // 16 // 8


def drop(pattern: str, nth: int = 0):
    return change(pattern, "", nth)


def change(pattern: str, replacement: str, nth: int = 0):
    """Rewrites the nth match; the guard before an instruction goes with it."""

    def edit(text: str) -> str:
        found = list(re.finditer(r"(@!?%p\d+\s+)?" + pattern, text) if not replacement else re.finditer(pattern, text))
        assert len(found) > nth, f"{pattern} occurs {len(found)} times"
        match = found[nth]
        return text[: match.start()] + match.expand(replacement) + text[match.end() :]

    return edit


NOTHING = lambda text: text  # noqa: E731

#: the poll of an mbarrier as the source writes it, and the register that says whether the phase has ended
POLL = r"\{ \.reg \.pred p; mbarrier[^}]*selp\.u32 (%r\d+)[^}]*\}"
#: a copy up to its source's address
COPY = r"(cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+)\]"

#: kernel, what is done to it, and the report that must come; "numbers": a wrong result and no report
MUTANTS = [
    ("sm80", "the barrier after the copies is gone", drop(r"bar\.sync\s+0;"), "race", {}),
    ("sm80", "the barrier before the next copies is gone", drop(r"bar\.sync 1, 128;"), "race", {}),
    (
        "sm80",
        "a barrier expects three of four warps",
        change(r"bar\.sync 1, 128;", "bar.sync 1, 96;"),
        "barrier|race|deadlock",
        {},
    ),
    ("sm80", "a barrier expects a warp too many", change(r"bar\.sync 1, 128;", "bar.sync 1, 160;"), "deadlock", {}),
    ("sm80", "nobody waits for the copies", drop(r"cp\.async\.wait_group 1;"), "copy in flight", {}),
    ("sm80", "the wait lets one group more pass", change(r"wait_group 1;", "wait_group 2;"), "copy in flight", {}),
    ("sm80", "the first group is never committed", drop(r"cp\.async\.commit_group;"), "copy in flight", {}),
    ("sm80", "later groups are never committed", drop(r"cp\.async\.commit_group;", 1), "copy in flight", {}),
    ("sm80", "shared memory is 16 bytes short", NOTHING, "out of bounds", dict(shared=2 * 2 * 64 * 40 * 2 - 16 - 16)),
    ("sm80", "a copy is 8 bytes off", change(r"(cp\.async\.cg\.shared\.global \[%r\d+)\]", r"\1+8]"), "misaligned", {}),
    ("sm80", "a copy reads 16 bytes further on", change(COPY, r"\1+16]", 1), "out of bounds|numbers", {}),
    (
        "sm80",
        "a copy takes 8 of 16 bytes",
        change(r"(cp\.async\.cg\.shared\.global [^;]*, 16), %r\d+;", r"\1, 8;", 1),
        "numbers",
        {},
    ),
    ("sm80", "ldmatrix transposes", change(r"x4\.shared\.b16", "x4.trans.shared.b16"), "numbers", {}),
    ("sm80", "an operand is taken as fp16", change(r"f32\.bf16\.bf16\.f32", "f32.f16.f16.f32"), "numbers", {}),
    ("sm80", "a product is dropped", drop(r"mma\.sync[^;]*;", 3), "numbers", {}),
    ("sm80", "the bound of the rows is gone", drop(r"bra\s+\$L__BB0_\d+;", -2), "out of bounds", {}),
    (
        "sm80",
        "the stride of a tile's rows is 64 bytes",
        change(r"(mul\.lo\.s32[^;]*), 40;", r"\1, 32;"),
        "numbers|race|uninit",
        {},
    ),
    ("sm90", "the mbarriers are used before they are ready", drop(r"bar\.sync\s+0;"), "race|mbarrier", {}),
    ("sm90", "the full barrier expects two", change(r"(mbarrier\.init[^;]*), 1;", r"\1, 2;"), "livelock", {}),
    ("sm90", "the empty barrier expects a warp less", change(r"(mbarrier\.init[^;]*), 128;", r"\1, 96;"), "race", {}),
    ("sm90", "an mbarrier is never initialised", drop(r"mbarrier\.init[^;]*;"), "mbarrier", {}),
    ("sm90", "the producer does not wait for an empty stage", change(POLL, r"mov.u32 \1, 1;"), "race|mbarrier", {}),
    (
        "sm90",
        "the consumer does not wait for a full stage",
        change(POLL, r"mov.u32 \1, 1;", 1),
        "race|uninit|in flight",
        {},
    ),
    (
        "sm90",
        "the consumer goes on whatever the poll said",
        change(r"(mbarrier\.try_wait[^}]*selp\.u32 %r\d+, 1), 0", r"\1, 1", 1),
        "race|uninit|in flight",
        {},
    ),
    (
        "sm90",
        "fewer bytes are expected than come",
        change(r", 16384;", ", 8192;"),
        "livelock|race|in flight|mbarrier",
        {},
    ),
    ("sm90", "more bytes are expected than come", change(r", 16384;", ", 16400;"), "livelock", {}),
    ("sm90", "wgmma.fence is gone", drop(r"wgmma\.fence[^;]*;"), "wgmma", {}),
    ("sm90", "products are not committed", drop(r"wgmma\.commit_group[^;]*;"), "race|wgmma", {}),
    ("sm90", "products are not waited for", drop(r"wgmma\.wait_group[^;]*;"), "race", {}),
    ("sm90", "the wait lets one group pass", change(r"(wgmma\.wait_group[^;]*) 0;", r"\1 1;"), "race", {}),
    ("sm90", "stages are never given back", drop(r"mbarrier\.arrive\.shared[^;]*;"), "livelock", {}),
    ("sm90", "the tile is not fenced for the copy", drop(r"fence\.proxy\.async[^;]*;"), "fence.proxy.async", {}),
    ("sm90", "the copy does not wait for the tile", drop(r"bar\.sync 1, 128;"), "race|uninit", {}),
    ("sm90", "the block ends while the copy reads", drop(r"cp\.async\.bulk\.wait_group[^;]*;"), "bulk copy", {}),
    ("sm90", "the copy is not committed", drop(r"cp\.async\.bulk\.commit_group[^;]*;"), "bulk copy", {}),
    ("sm90", "coordinates are swapped", change(r"\{(%r\d+), (%r\d+)\}\], \[", r"{\2, \1}], ["), "numbers|uninit", {}),
    (
        "sm90",
        "the descriptor steps over 512 bytes",
        change(str(0x4000004000010000), str(0x4000002000010000)),
        "numbers",
        {},
    ),
    ("sm90", "the tensor map swizzles 64 bytes", NOTHING, "ValueError", dict(swizzle=64)),
    ("sm90", "the tensor map does not swizzle", NOTHING, "numbers", dict(swizzle=0)),
    ("sm90", "shared memory is 128 bytes short", NOTHING, "out of bounds", dict(shared=5 * 8192 - 128)),
]


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("kernel, what, edit, report, launch", MUTANTS, ids=[f"{m[0]}: {m[1]}" for m in MUTANTS])
def test_mutant_is_caught(kernel, what, edit, report, launch, seed):
    name, arch, run = KERNELS[kernel]
    text = text_of(name, arch)
    mutant = edit(text)
    assert mutant != text or launch, "the edit changes nothing"
    try:
        run(mutant, seed, **launch)
    except Fault as fault:
        caught = str(fault)
    except AssertionError as error:
        caught = f"numbers: {error}"
    except ValueError as error:
        caught = f"ValueError: {error}"
    else:
        pytest.fail(f"a kernel passes though {what}")
    assert re.search(report, caught), caught
