"""The shipped kernels in the PTX interpreter: changes to their PTX must be reported, and launches are counted.

That they are right is in the op tests (``native-ptx``).
"""

import re

# ruff: noqa: E501
import pytest
import torch

from moe_kernels import permute, plan_dispatch

from . import ptx_ops, shipped
from .exercises import EXERCISES, report_of

if ptx_ops.missing_reason() is not None:
    pytest.skip(ptx_ops.missing_reason(), allow_module_level=True)


#: exercise, kernel, what is changed, the pattern, what comes in, what must be said
MUTANTS = [
    ("one tile", "plan_scatter_kernelILb1", "no barrier", r"bar\.sync\s+0;", "", "race"),
    ("one tile", "plan_scatter_kernelILb1", "no warp barrier", r"bar\.warp\.sync[^;]*;", "", "race"),
    ("one tile", "plan_scatter_kernelILb1", "shared memory short", r"\.b8 (\w+histogram)\[\d+\]", r".b8 \1[256]", "out of bounds"),
    ("two tiles", "plan_count_kernel", "no barrier", r"bar\.sync\s+0;", "", "race"),
    ("two tiles", "plan_scan_kernel", "no barrier", r"bar\.sync\s+0;", "", "race"),
    ("two tiles", "plan_scatter_kernelILb0", "no barrier", r"bar\.sync\s+0;", "", "race"),
    ("two tiles", "plan_scan_kernel", "a scan from above", r"shfl\.sync\.up", "shfl.sync.down", "numbers|out of"),
    ("permute", "unpermute_bwd_kernelIfLi4", "no barrier", r"bar\.sync\s+0;", "", "race"),
    ("permute", "unpermute_bwd_kernelIfLi4", "a sum of some lanes", r"shfl\.sync\.bfly", "shfl.sync.idx", "numbers"),
    ("permute", "unpermute_kernelIfLi4", "products lost", r"fma\.rn\.f32 (%f\d+), %f\d+, (%f\d+),", r"add.f32 \1, \2,", "numbers"),
    ("permute", "permute_kernelINS_3VecIjLi4", "rows swapped", r"ld\.global\.nc\.u32 (%r\d+), \[(%rd\d+)\]",
     r"ld.global.nc.u32 \1, [\2+4]", "numbers|out of bounds"),
    ("route", "route_kernelIfLi2", "no warp barrier", r"bar\.warp\.sync[^;]*;", "", "race"),
    ("route", "route_kernelIfLi2", "a maximum of some lanes", r"shfl\.sync\.bfly", "shfl.sync.idx", "numbers"),
    ("task_vector", "apply_ternary_kernelINS_4bf16", "results cut off", r"cvt\.rn\.bf16\.f32", "cvt.rz.bf16.f32", "numbers"),
    ("task_vector", "apply_ternary_kernelIfE", "no signs", r"neg\.f32", "mov.f32", "numbers"),
    ("task_vector", "apply_ternary_kernelIfE", "the planes of the next group", r"(ld\.global\.v2\.u64 [^;]*\[%rd\d+)\]",
     r"\1+16]", "numbers|out of bounds"),
    ("task_vector", "count_touched_kernelIfE", "a sum of some lanes", r"shfl\.sync\.bfly", "shfl.sync.idx", "numbers|out of"),
    ("task_vector", "apply_undoable_kernelIfE", "no barrier", r"bar\.sync\s+0;", "", "race"),
    ("task_vector", "apply_undoable_kernelIfE", "no warp barrier", r"bar\.warp\.sync[^;]*;", "", "race"),
    ("task_vector", "apply_undoable_kernelIfE", "a scan from above", r"shfl\.sync\.up", "shfl.sync.down", "numbers|out of"),
    ("task_vector", "apply_undoable_kernelIfE", "bits that replace their neighbours", r"atom\.shared\.or", "atom.shared.exch",
     "numbers"),
    ("task_vector", "unapply_ternary_kernelIfE", "no barrier", r"bar\.sync\s+0;", "", "race"),
    ("task_vector", "unapply_ternary_kernelIfE", "no warp barrier", r"bar\.warp\.sync[^;]*;", "", "race"),
    ("decode", "decode_blocks_kernel", "no warp barrier", r"bar\.warp\.sync[^;]*;", "", "race"),
    ("decode", "decode_blocks_kernel", "a scan from above", r"shfl\.sync\.up", "shfl.sync.down", "numbers|out of|race"),
    ("decode", "decode_blocks_kernel", "bits that replace their neighbours", r"atom\.shared\.or", "atom.shared.exch", "numbers"),
    ("decode", "decode_blocks_kernel", "shared memory short", r"\.b8 (\w+ones_memory)\[\d+\]", r".b8 \1[12000]", "out of bounds"),
    ("decode", "verdict_kernel", "no barrier", r"bar\.sync\s+0;", "", "race"),
    ("decode", "verdict_kernel", "a sum of some lanes", r"shfl\.sync\.bfly", "shfl.sync.idx", "numbers"),
    ("merge", "merge_kernelIfE", "no barrier", r"bar\.sync\s+0;", "", "race"),
    ("merge", "merge_kernelIfE", "sums for products", r"mul\.(rn\.)?f32", r"add.f32", "numbers"),
    ("merge", "merge_kernelIfE", "a sum of some lanes", r"shfl\.sync\.bfly", "shfl.sync.idx", "numbers"),
    ("ternary_linear", "ternary_linear_kernelINS_4bf16ELi1E", "no barrier", r"bar\.sync\s+0;", "", "race"),
    ("ternary_linear", "ternary_linear_kernelINS_4bf16ELi1E", "bits of the next element", r"shr\.u64", "shl.b64", "numbers"),
    ("merge", "sum_found_kernel", "no barrier", r"bar\.sync\s+0;", "", "race"),
    ("task_vector", "collect_kept_kernelIfE", "the next value", r"(ld\.global\.nc\.f32 %f\d+, \[%rd\d+)\]", r"\1+4]",
     "numbers|uninit|out of"),
    ("logit_fusion", "fuse_logits_kernelIfE", "a maximum of some lanes", r"shfl\.sync\.bfly", "shfl.sync.idx", "numbers|out of"),
    ("logit_fusion", "total_logits_kernelIfE", "a sum of some lanes", r"shfl\.sync\.bfly", "shfl.sync.idx", "numbers"),
    ("logit_fusion", "choose_tokens_kernelIdE", "a scan from above", r"shfl\.sync\.up", "shfl.sync.down", "numbers"),
    ("logit_fusion bounds", "measure_logits_kernelIfE", "a sum of some lanes", r"shfl\.sync\.bfly", "shfl.sync.idx", "numbers"),
    ("logit_fusion rows", "fuse_logits_kernelIfE", "what a product lost", r"mul\.rn\.f32 (%f\d+), (%f\d+), (%f\d+);", r"add.f32 \1, \2, \3;",
     "numbers"),
]  # fmt: skip


def find(kernel: str) -> tuple[str, str, str]:
    """Key in shipped.ptx(), text and name there of the one kernel that begins so."""
    (key,) = (key for key in shipped.ptx() if re.search(rf"GLOBAL__N_1\d+{kernel}", key))
    return key, *shipped.ptx()[key]


@pytest.mark.parametrize("name", EXERCISES)
def test_unchanged_kernels_pass(name, monkeypatch):
    ptx_ops.redirect(monkeypatch)
    assert report_of(name, "native") == "nothing"


@pytest.mark.parametrize(
    "name, kernel, what, pattern, into, reports", MUTANTS, ids=[f"{m[1]}: {m[2]}" for m in MUTANTS]
)
def test_mutant_is_caught(monkeypatch, name, kernel, what, pattern, into, reports):
    ptx_ops.redirect(monkeypatch)
    key, text, entry = find(kernel)
    mutant, changes = re.subn(pattern, into, text)
    assert changes, "the kernel has changed: change the mutant with it"
    monkeypatch.setitem(shipped.ptx(), key, (mutant, entry))
    report = report_of(name, "native")
    assert re.search(reports, report), f"a kernel with {what}: {report}"


@pytest.mark.parametrize(
    "kernel, exercises",
    [("plan_scatter_kernelILb1", ["one tile", "two passes"]), ("plan_scatter_kernelILb0", ["two tiles"]),
     ("plan_count_kernel", ["two tiles"]), ("plan_scan_kernel", ["two tiles"]),
     ("unpermute_bwd_kernelIfLi4", ["permute"]), ("apply_undoable_kernelIfE", ["task_vector"]),
     ("unapply_ternary_kernelIfE", ["task_vector"]), ("verdict_kernel", ["decode"]), ("scan_counts_kernel", ["task vector of many blocks"])],
)  # fmt: skip
def test_no_barrier_can_go(monkeypatch, kernel, exercises):
    """Each barrier of a block alone: a race must be reported, or the barrier is one too many."""
    ptx_ops.redirect(monkeypatch)
    key, text, entry = find(kernel)
    lives = []
    barriers = list(re.finditer(r"bar\.sync\s+0;", text))
    for place, barrier in enumerate(barriers):
        monkeypatch.setitem(shipped.ptx(), key, (text[: barrier.start()] + text[barrier.end() :], entry))
        if not any("race" in report_of(name, "native") for name in exercises):
            lives.append(place)
    assert barriers and not lives, f"of {len(barriers)} barriers, these are not missed: {lives}"


def test_counts(monkeypatch):
    """One token in two rows of 4096 bytes: each is read once and written once, and the index beside them."""
    ptx_ops.redirect(monkeypatch)
    plan = plan_dispatch(torch.tensor([[0, 1]], dtype=torch.int32), 2, backend="reference")
    with ptx_ops.counting() as launches:
        permute(torch.randn(1, 1024), plan, backend="native")
    (launched,) = launches
    counters = launched.counters
    assert counters.write_bytes == 2 * 4096 and counters.write_sectors == counters.write_unique_sectors == 256
    assert counters.read_unique_sectors == 128 + 1 and counters.bank_conflicts == 0
