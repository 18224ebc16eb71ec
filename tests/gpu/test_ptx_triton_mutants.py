"""Changes to the PTX of Triton's kernels that must be reported.

Triton repeats many a barrier, so a mutant takes all of a kind away where a single one would not be missed.
"""

import re

import pytest
import torch

from moe_kernels.testing import assert_close_to_reference

from . import build

if build.missing_triton() is not None:
    pytest.skip(build.missing_triton(), allow_module_level=True)

from . import triton_kernels as kernels
from .ptx import Fault, TensorMap, run_ptx
from .test_ptx_triton import SIZES, expected_groups, grouped_gemm, ragged


class GroupedGemm:
    def __init__(self, capability):
        self.kernel = grouped_gemm(capability, (64, 64, 32))

    def run(self, text, seed, shared=0, columns=64):
        rows, weights, out, offsets = ragged(SIZES, 64, 160)
        run_ptx(
            text, self.kernel.name, (2, 1, 4), self.kernel.block, [rows, weights, out, offsets, columns, 160],
            self.kernel.shared_bytes + shared, seed, uninitialized=[out], max_steps=50_000,
        )  # fmt: skip
        expected = expected_groups(rows.double(), weights.double(), offsets)
        assert_close_to_reference(out, expected, expected_groups(rows, weights, offsets))


class Descriptors:
    def __init__(self):
        box = "tensordesc<bf16[64,64]>"
        self.kernel = build.triton_compile(
            kernels.descriptor_matmul, dict(a=box, b=box, c=box, num_rows="i32", columns="i32", depth="i32"),
            dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, PROGRAMS=2), capability=90,
        )  # fmt: skip

    def run(self, text, seed, shared=0):
        a, b = torch.randn(150, 320).bfloat16(), torch.randn(128, 320).bfloat16()
        c = torch.full((150, 128), torch.nan).bfloat16()
        maps = [part for t in (a, b, c) for part in (TensorMap(t, (64, 64), 128), *t.shape, *t.stride())]
        run_ptx(
            text, self.kernel.name, 2, self.kernel.block, [*maps, 150, 128, 320], self.kernel.shared_bytes + shared,
            seed, max_steps=50_000,
        )  # fmt: skip
        assert_close_to_reference(c, a.double() @ b.double().T, a @ b.T)


class Histogram:
    def __init__(self):
        self.kernel = build.triton_compile(
            kernels.histogram, dict(ids="*i32", counts="*i32", places="*i32", n="i32"), dict(BLOCK=128), capability=80
        )

    def run(self, text, seed):
        ids, places = torch.randint(0, 7, (300,), dtype=torch.int32), torch.zeros(300, dtype=torch.int32)
        counts = torch.zeros(7, dtype=torch.int32)
        run_ptx(text, self.kernel.name, 3, 128, [ids, counts, places, 300], self.kernel.shared_bytes, seed)
        assert torch.equal(counts, torch.bincount(ids, minlength=7).int())


class SortAndScan:
    def __init__(self):
        self.kernel = build.triton_compile(
            kernels.sort_and_scan, dict(x="*i32", ordered="*i32", sums="*i32"), dict(BLOCK=256), capability=80
        )

    def run(self, text, seed):
        x = torch.randint(-1000, 1000, (256,), dtype=torch.int32)
        ordered, sums = torch.zeros_like(x), torch.zeros_like(x)
        run_ptx(text, self.kernel.name, 1, self.kernel.block, [x, ordered, sums], self.kernel.shared_bytes, seed)
        assert torch.equal(ordered, x.sort().values) and torch.equal(sums, x.cumsum(0).int())


KERNELS = {
    "grouped gemm sm_80": lambda: GroupedGemm(80), "grouped gemm sm_90": lambda: GroupedGemm(90),
    "descriptors sm_90": Descriptors, "histogram": Histogram, "sort and scan": SortAndScan,
}  # fmt: skip

GUARD = r"(?:@!?%p\d+\s+)?"
POLL = r"waitLoop:[^}]*?bra\.uni waitLoop;"


def drop(pattern):
    return lambda text: re.sub(GUARD + pattern, "", text)


def change(pattern, replacement):
    return lambda text: re.sub(pattern, replacement, text)


def keep(text):
    return text


MUTANTS = [
    ("grouped gemm sm_80", "no barrier", drop(r"bar\.sync\s+0;"), "race", {}),
    ("grouped gemm sm_80", "no wait for copies", drop(r"cp\.async\.wait_group[^;]*;"), "copy in flight", {}),
    ("grouped gemm sm_80", "waits two groups weaker", change(r"(wait_group\s+)2;", r"\g<1>4;"), "copy in flight", {}),
    ("grouped gemm sm_80", "no commit", drop(r"cp\.async\.commit_group;"), "copy in flight", {}),
    ("grouped gemm sm_80", "copies without a mask", change(r"0x10, %r\d+;", "0x10, 16;"), "out of bounds", {}),
    ("grouped gemm sm_80", "stores without a mask", change(r"@%p\d+ (st\.global)", r"\1"), "out of bounds", {}),
    ("grouped gemm sm_80", "shared memory 4 KiB short", keep, "out of bounds", dict(shared=-4096)),
    ("grouped gemm sm_80", "row stride of the output", keep, "numbers|out of bounds", dict(columns=72)),
    ("grouped gemm sm_90", "no barrier", drop(r"bar\.sync\s+0;"), "race", {}),
    ("grouped gemm sm_90", "no wait for copies", drop(r"cp\.async\.wait_group[^;]*;"), "copy in flight|race", {}),
    ("grouped gemm sm_90", "no proxy fence", drop(r"fence\.proxy\.async[^;]*;"), "fence.proxy.async", {}),
    ("grouped gemm sm_90", "no wait for products", drop(r"wgmma\.wait_group[^;]*;"), "race|numbers", {}),
    ("grouped gemm sm_90", "no wgmma.fence", drop(r"wgmma\.fence[^;]*;"), "wgmma.fence", {}),
    ("grouped gemm sm_90", "shared memory 4 KiB short", keep, "out of bounds", dict(shared=-4096)),
    ("descriptors sm_90", "no barrier", drop(r"bar\.sync\s+0;"), "race|mbarrier", {}),
    ("descriptors sm_90", "no wait for bytes", drop(POLL), "in flight|race", {}),
    ("descriptors sm_90", "too few bytes expected", change(r"\], 16384;", "], 8192;"), "race|in flight|mbarrier", {}),
    ("descriptors sm_90", "too many bytes expected", change(r"\], 16384;", "], 32768;"), "livelock", {}),
    ("descriptors sm_90", "mbarriers stay valid", drop(r"mbarrier\.inval[^;]*;"), "initialised again", {}),
    ("descriptors sm_90", "no proxy fence", drop(r"fence\.proxy\.async[^;]*;"), "fence.proxy.async", {}),
    ("descriptors sm_90", "no wait for stores", drop(r"cp\.async\.bulk\.wait_group[^;]*;"), "race|bulk copy", {}),
    (
        "descriptors sm_90",
        "every thread copies",
        change(r"@%p\d+ (cp\.async\.bulk\.tensor\.2d\.shared)", r"\1"),
        "copy",
        {},
    ),
    ("histogram", "atomics without a mask", change(r"@%p\d+ atom", "atom"), "numbers|out of bounds", {}),
    ("histogram", "stores without a mask", change(r"@%p\d+ st\.global", "st.global"), "out of bounds", {}),
    ("histogram", "one added too much", change(r"(atom\.[^;]*), %r\d+;", r"\1, 2;"), "numbers", {}),
    ("sort and scan", "no barrier", drop(r"bar\.sync\s+0;"), "race", {}),
    (
        "sort and scan",
        "shuffles reach one lane less",
        change(r"(shfl\.sync\.bfly[^;]*), 1, ", r"\1, 2, "),
        "numbers",
        {},
    ),
]


@pytest.fixture(scope="module")
def compiled():
    return {name: make() for name, make in KERNELS.items()}


@pytest.mark.parametrize("name, what, edit, reports, launch", MUTANTS, ids=[f"{m[0]}: {m[1]}" for m in MUTANTS])
def test_mutant_is_caught(compiled, name, what, edit, reports, launch):
    case = compiled[name]
    mutant = edit(case.kernel.ptx)
    if mutant == case.kernel.ptx and not launch:
        pytest.skip(f"this Triton's code has nothing to change: {what}")
    try:
        case.run(mutant, None, **launch)
    except Fault as fault:
        caught = str(fault)
    except AssertionError as error:
        caught = f"numbers: {error}"
    else:
        pytest.fail(f"a kernel passes with {what}")
    assert re.search(reports, caught), caught
