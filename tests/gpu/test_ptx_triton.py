"""The tensor instructions against PTX that Triton generates, for sm_80 (mma.sync) and sm_90 (wgmma, TMA)."""

import pytest
import torch

from moe_kernels.testing import assert_close_to_reference

from . import build

if build.missing_triton() is not None:
    pytest.skip(build.missing_triton(), allow_module_level=True)

from . import triton_kernels as kernels
from .ptx import TensorMap, run_ptx

SEEDS = [None, 1]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "i8": torch.int8,
          "fp8e5": torch.float8_e5m2, "fp8e4nv": torch.float8_e4m3fn}  # fmt: skip


def grouped_gemm(capability: int, tile, num_stages: int = 3, num_warps: int = 4):
    return build.triton_compile(
        kernels.grouped_gemm,
        dict(rows="*bf16", weights="*bf16", out="*bf16", offsets="*i32", columns="i32", depth="i32"),
        dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True)),
        capability=capability, num_stages=num_stages, num_warps=num_warps,
        aligned=("rows", "weights", "out", "offsets", "columns", "depth"),
    )  # fmt: skip


def ragged(sizes, columns, depth):
    offsets = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows = torch.randn(sum(sizes), depth).bfloat16()
    weights = torch.randn(len(sizes), columns, depth).bfloat16()
    out = torch.full((sum(sizes), columns), torch.nan, dtype=torch.bfloat16)
    return rows, weights, out, offsets


def expected_groups(rows, weights, offsets):
    groups = [
        rows[first:last] @ weights[e].T for e, (first, last) in enumerate(zip(offsets, offsets[1:], strict=False))
    ]
    return torch.cat(groups)


# a tile that is not filled, an empty expert, one full tile, a few rows
SIZES = [70, 0, 64, 13]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tile", [(64, 64, 32), (64, 32, 64)])
def test_grouped_gemm(capability, tile, seed):
    kernel = grouped_gemm(capability, tile)
    assert ("wgmma" in kernel.ptx) == (capability == 90) and "cp.async" in kernel.ptx
    rows, weights, out, offsets = ragged(SIZES, columns=64, depth=128)
    counters = run_ptx(
        kernel.ptx, kernel.name, (2, 64 // tile[1], 4), kernel.block, [rows, weights, out, offsets, 64, 128],
        kernel.shared_bytes, seed, uninitialized=[out],
    )  # fmt: skip
    expected = expected_groups(rows.double(), weights.double(), offsets)
    assert_close_to_reference(out, expected, expected_groups(rows, weights, offsets))
    tiles = 2 + 1 + 1
    assert counters.tensor_flops == tiles * 2 * 64 * 64 * 128


# two warpgroups; n of 256, the widest wgmma
@pytest.mark.parametrize("tile, num_warps", [((128, 64, 64), 8), ((64, 256, 64), 4)])
def test_large_tiles(tile, num_warps):
    kernel = grouped_gemm(90, tile, num_warps=num_warps)
    rows, weights, out, offsets = ragged([70, 0, 13], columns=256, depth=128)
    run_ptx(
        kernel.ptx, kernel.name, (2, 256 // tile[1], 3), kernel.block, [rows, weights, out, offsets, 256, 128],
        kernel.shared_bytes, uninitialized=[out],
    )  # fmt: skip
    expected = expected_groups(rows.double(), weights.double(), offsets)
    assert_close_to_reference(out, expected, expected_groups(rows, weights, offsets))


def wait_at_once(text: str) -> str:
    wait = "wgmma.wait_group.sync.aligned 0;"
    assert wait in text
    commit = "wgmma.commit_group.sync.aligned;"
    return text.replace(wait, "").replace(commit, commit + wait)


# each data type of the tensor cores, and both layouts of the right operand
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "capability, dtype, accumulator",
    [(capability, dtype, accumulator)
     for capability in (80, 90)
     for dtype, accumulator in (("bf16", "fp32"), ("fp16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32"),
                                ("i8", "int32"), ("fp8e5", "fp32"), ("fp8e4nv", "fp32"))
     if capability >= 90 or dtype != "fp8e4nv"],  # Triton has no e4m3 below sm_89
)  # fmt: skip
def test_matmul_of_every_type(capability, dtype, accumulator, transposed):
    import triton.language as tl

    out_type = {"fp32": tl.float32, "fp16": tl.float16, "int32": tl.int32}[accumulator]
    pointer = {"fp32": "*fp32", "fp16": "*fp16", "int32": "*i32"}[accumulator]
    kernel = build.triton_compile(
        kernels.matmul, dict(a=f"*{dtype}", b=f"*{dtype}", c=pointer, depth="i32", columns="i32"),
        dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=64, TRANSPOSED=transposed, OUT=out_type, PRECISION="tf32"),
        capability=capability, aligned=("a", "b", "c", "depth", "columns"),
    )  # fmt: skip
    text = kernel.ptx
    if capability == 90 and accumulator == "fp16":
        # Triton 3.8 unpacks these accumulators before it waits, and leaves it to ptxas to wait earlier; PTX does not
        # promise that, so the interpreter gives NaN there
        text = wait_at_once(text)
    depth = 128
    # small integers: exact in every type, in every order of summation, and in TF32's 10 bits
    a, b = torch.randint(-3, 4, (64, depth)), torch.randint(-3, 4, (depth, 32))
    kept = b.T.contiguous() if transposed else b
    c = torch.zeros(64, 32, dtype={"fp32": torch.float32, "fp16": torch.float16, "int32": torch.int32}[accumulator])
    run_ptx(
        text, kernel.name, 1, kernel.block,
        [a.float().to(DTYPES[dtype]), kept.float().to(DTYPES[dtype]), c, depth, 32], kernel.shared_bytes,
    )  # fmt: skip
    assert torch.equal(c.double(), a.double() @ b.double())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tile, stages", [((64, 64, 64), 3), ((128, 64, 32), 2)])
def test_descriptor_matmul(capability, tile, stages, seed):
    block_m, block_n, block_k = tile
    kernel = build.triton_compile(
        kernels.descriptor_matmul,
        dict(
            a=f"tensordesc<bf16[{block_m},{block_k}]>", b=f"tensordesc<bf16[{block_n},{block_k}]>",
            c=f"tensordesc<bf16[{block_m},{block_n}]>", num_rows="i32", columns="i32", depth="i32",
        ),
        dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, PROGRAMS=2), capability=capability, num_stages=stages,
    )  # fmt: skip
    assert ("cp.async.bulk.tensor" in kernel.ptx) == (capability == 90)
    num_rows, columns, depth = 150, 128, 192  # the last tile has rows outside
    a, b = torch.randn(num_rows, depth).bfloat16(), torch.randn(columns, depth).bfloat16()
    c = torch.full((num_rows, columns), torch.nan, dtype=torch.bfloat16)

    def descriptor(tensor, box):
        sizes = [*tensor.shape, *tensor.stride()]
        if capability == 80:  # a pointer, sizes, and two flags: no NaN padding, no rounding to TF32
            return [tensor, *sizes, 0, 0, *sizes]
        return [TensorMap(tensor, box, min(128, box[1] * 2)), *sizes]

    args = [*descriptor(a, (block_m, block_k)), *descriptor(b, (block_n, block_k)), *descriptor(c, (block_m, block_n))]
    run_ptx(kernel.ptx, kernel.name, 2, kernel.block, [*args, num_rows, columns, depth], kernel.shared_bytes, seed)
    assert_close_to_reference(c, a.double() @ b.double().T, a @ b.T)


def test_softmax_topk():
    columns, k = 64, 4
    kernel = build.triton_compile(
        kernels.softmax_topk, dict(logits="*fp32", weights="*fp32", ids="*i32"), dict(columns=columns, K=k),
        capability=80, num_warps=2,
    )  # fmt: skip
    logits = torch.randn(9, columns)
    weights, ids = torch.zeros(9, k), torch.zeros(9, k, dtype=torch.int32)
    run_ptx(kernel.ptx, kernel.name, 9, kernel.block, [logits, weights, ids], kernel.shared_bytes)
    expected = logits.double().softmax(1).topk(k)
    assert torch.equal(ids.long(), expected.indices)
    assert_close_to_reference(weights, expected.values, logits.softmax(1).topk(k).values)


@pytest.mark.parametrize("seed", SEEDS)
def test_histogram(seed):
    n, block = 300, 128
    kernel = build.triton_compile(
        kernels.histogram, dict(ids="*i32", counts="*i32", places="*i32", n="i32"), dict(BLOCK=block), capability=80
    )
    ids = torch.randint(0, 7, (n,), dtype=torch.int32)
    counts, places = torch.zeros(7, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
    run_ptx(kernel.ptx, kernel.name, 3, kernel.block, [ids, counts, places, n], kernel.shared_bytes, seed)
    assert torch.equal(counts, torch.bincount(ids, minlength=7).int())
    for value in range(7):
        assert sorted(places[ids == value].tolist()) == list(range(counts[value]))


@pytest.mark.parametrize("seed", SEEDS)
def test_sort_and_scan(seed):
    kernel = build.triton_compile(
        kernels.sort_and_scan, dict(x="*i32", ordered="*i32", sums="*i32"), dict(BLOCK=256), capability=80
    )
    x = torch.randint(-1000, 1000, (256,), dtype=torch.int32)
    ordered, sums = torch.zeros_like(x), torch.zeros_like(x)
    run_ptx(kernel.ptx, kernel.name, 1, kernel.block, [x, ordered, sums], kernel.shared_bytes, seed)
    assert torch.equal(ordered, x.sort().values)
    assert torch.equal(sums, x.cumsum(0).int())


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_activation(dtype):
    n = 500
    kernel = build.triton_compile(
        kernels.activation, dict(gate=f"*{dtype}", up=f"*{dtype}", out=f"*{dtype}", n="i32"), dict(BLOCK=256),
        capability=90, aligned=("gate", "up", "out"),
    )  # fmt: skip
    gate, up = torch.randn(2, n).to(DTYPES[dtype])
    out = torch.zeros(n, dtype=DTYPES[dtype])
    run_ptx(kernel.ptx, kernel.name, 2, kernel.block, [gate, up, out, n], kernel.shared_bytes)
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    assert_close_to_reference(out, expected, torch.nn.functional.silu(gate) * up)


def test_gather_counts_the_floor():
    """A permutation's traffic: each row read and written once, in whole sectors."""
    hidden_size, num_rows = 256, 12
    kernel = build.triton_compile(
        kernels.gather_rows, dict(hidden_states="*bf16", source_rows="*i32", out="*bf16", hidden_size="i32"),
        dict(BLOCK=1024), capability=80, aligned=("hidden_states", "out", "hidden_size"),
    )  # fmt: skip
    hidden_states, source_rows = torch.randn(8, hidden_size).bfloat16(), torch.randint(0, 8, (num_rows,)).int()
    out = torch.full((num_rows, hidden_size), torch.nan).bfloat16()
    counters = run_ptx(
        kernel.ptx, kernel.name, num_rows, kernel.block, [hidden_states, source_rows, out, hidden_size],
        kernel.shared_bytes,
    )  # fmt: skip
    assert torch.equal(out, hidden_states[source_rows.long()])
    row_sectors = hidden_size * 2 // 32
    assert counters.write_sectors == counters.write_unique_sectors == num_rows * row_sectors
    used = len(source_rows.unique())
    assert counters.read_unique_sectors == used * row_sectors + 2  # 12 indices lie in two sectors
    assert counters.bank_conflicts == 0
