"""The grouped GEMM of compute capability 9.0a in the PTX interpreter, for every tile of tokens: its tensor copies,
mbarriers and products, and changes to its PTX that must be reported."""

from __future__ import annotations

import functools
import re
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from moe_kernels import Activation
from moe_kernels.activation import KINDS
from moe_kernels.testing import assert_close_to_reference

from . import build
from .ptx import Fault, TensorMap, execute

pytestmark = pytest.mark.skipif(build.missing_nvcc() is not None, reason=str(build.missing_nvcc()))

ROOT = Path(__file__).parents[2]


@functools.cache
def texts() -> dict[tuple, tuple[str, str]]:
    """PTX and name of each variant, by the template's arguments: dtype, tokens of a tile, activating, gated."""
    source = ROOT / "csrc/ops/grouped_gemm/rows_gemm_sm90.cu"
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        command = [build.find_nvcc(), "-std=c++20", "-O3", "-arch=compute_90a", "-ptx", str(source), "-o", file.name]
        command += [f"-I{ROOT / 'csrc'}", "-isystem", str(Path(torch.__file__).parent / "include")]
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]
        subprocess.run(command, check=True, capture_output=True)
        text = Path(file.name).read_text()
    head, *kernels = re.split(r"^(?=(?:\.\w+ )?\.entry)", text, flags=re.M)
    found = {}
    for kernel in kernels:
        name = re.search(r"\.entry\s+(\w+)", kernel)[1]
        dtype, tokens, activates, gated = re.search(r"INS_4(\w\w16)ELi(\d+)ELb(\d)ELb(\d)E", name).groups()
        found[dtype, int(tokens), activates == "1", gated == "1"] = (head + kernel, name)
    return found


class Case:
    """A grouped product with its operands: ``launch`` executes it, ``check`` compares too."""

    def __init__(
        self,
        counts,
        depth,
        columns,
        *,
        tokens=16,
        dtype="bf16",
        interleaved=False,
        activation=None,
        bias=False,
        blocks=2,
    ):
        self.tokens, self.dtype, self.interleaved, self.activation = tokens, dtype, interleaved, activation
        self.columns, self.blocks, self.gated = columns, blocks, activation is not None and activation.gated
        kind = torch.bfloat16 if dtype == "bf16" else torch.float16
        self.offsets = torch.tensor([0, *counts]).cumsum(0).int()
        num_rows = int(self.offsets[-1]) + 2  # two rows of nobody
        self.x = torch.randn(num_rows, depth).to(kind)
        self.weights = (torch.randn(len(counts), columns * (2 if self.gated else 1), depth) * depth**-0.5).to(kind)
        self.bias = torch.randn(len(counts), self.weights.shape[1]).to(kind) if bias else None
        self.out = torch.full((num_rows, columns), torch.nan).to(kind)

    def reference(self, dtype: torch.dtype) -> torch.Tensor:
        parts, ends = [], self.offsets.tolist()
        for e, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
            h = self.x[begin:end].to(dtype) @ self.weights[e].to(dtype).T
            if self.bias is not None:
                h = h + self.bias[e].to(dtype)
            if self.gated:
                h = self.activation(*((h[:, ::2], h[:, 1::2]) if self.interleaved else h.chunk(2, 1)))
            elif self.activation:
                h = self.activation(h)
            parts.append(h)
        return torch.cat(parts)

    def launch(self, edit=lambda text: text, seed=None, shared=0):
        text, name = texts()[self.dtype, self.tokens, self.activation is not None, self.gated]
        mutant = edit(text)
        experts, rows, depth = self.weights.shape
        if self.interleaved:
            view = self.weights.view(experts, self.columns, 2, depth).transpose(1, 2)
        else:
            view = self.weights.view(experts, rows // self.columns, self.columns, depth)
        maps = [TensorMap(view, (1, 1, 128, 64), 128), TensorMap(self.x, (self.tokens, 64), 128)]
        step, up = (2, 1) if self.interleaved else (1, self.columns if self.gated else 0)
        numbers = (0, 0, 0, 0, 0, 0)
        if self.activation:
            kind, _, alpha, limit, clamp_output, up_offset = self.activation.kernel_arguments()
            limits = (float("inf"), limit, limit) if clamp_output else (limit, limit, float("inf"))
            numbers = (kind, alpha, *limits, up_offset)
        bias = 0 if self.bias is None else self.bias.data_ptr()
        gemm = struct.pack(  # RowsGemm of rows_gemm_sm90.cuh
            "<6q5i5f", self.offsets.data_ptr(), bias, rows, step, up, self.out.data_ptr(), len(self.out), experts,
            self.columns, depth, *numbers,
        )  # fmt: skip
        # Layout of rows_gemm_sm90.cuh
        staging, stage = 8 * min(self.tokens, 64) * 32, (2 * 128 + self.tokens) * 128
        stages = min(6, (220 * 1024 - staging) // stage)
        size = 1024 + stages * stage + staging + 16 * stages + 4 * (experts + 1)
        tensors = [self.offsets, self.out] + ([] if self.bias is None else [self.bias])
        return execute(
            mutant, name, self.blocks, 384, [*maps, gemm], size + shared, seed, pointed_to=tensors,
            uninitialized=[self.out], max_steps=100_000,
        )  # fmt: skip

    def check(self, **options):
        launched = self.launch(**options)
        end = int(self.offsets[-1])
        assert_close_to_reference(self.out[:end], self.reference(torch.float64), self.reference(self.out.dtype))
        assert self.out[end:].isnan().all()  # rows of nobody are not written
        return launched


@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("activation", [None, Activation(gated=False), Activation()], ids=["plain", "ungated", "gated"])
def test_ragged_experts(tokens, activation):
    Case([0, 1, tokens + 3, 0, tokens, 5], 72, 136, tokens=tokens, activation=activation, bias=True).check()


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_warps(seed):
    Case([20, 0, 33], 200, 264, activation=Activation()).check(seed=seed)


# less than a step, one, more steps than stages and the last one partly filled
@pytest.mark.parametrize("depth", [8, 64, 520])
def test_depths(depth):
    Case([17, 3], depth, 40, activation=Activation(), dtype="fp16" if depth == 8 else "bf16").check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_activations(kind, interleaved):
    activation = Activation(kind, limit=0.7, up_offset=1.0, clamp="output" if kind == "gelu" else "input")
    Case([5, 9], 64, 72, interleaved=interleaved, activation=activation, bias=True).check()


def test_more_blocks_than_tiles():
    Case([3], 64, 8, blocks=3).check()


def test_no_rows():
    case = Case([0, 0], 64, 8)
    case.launch()
    assert case.out.isnan().all()


def test_offsets_that_lie():
    """An expert whose rows are not those of the tensor is passed over: nothing outside is read or written."""
    case = Case([3, 4, 2], 64, 8)
    case.offsets[2] = 99
    case.launch()
    assert case.out[:3].isfinite().all() and case.out[3:].isnan().all()


def drop(pattern: str, which: int = 0):
    """Takes one match away."""

    def edit(text):
        matches = list(re.finditer(pattern, text))
        assert matches, "the kernel has changed: change the mutant with it"
        return text[: matches[which].start()] + text[matches[which].end() :]

    return edit


MUTANTS = [
    ("the barriers are used before they are ready", drop(r"bar\.sync\s+0;"), "race|mbarrier|uninit", 0),
    ("products are not waited for", drop(r"wgmma\.wait_group[^;]*;", -1), "race|wgmma", 0),
    ("a step more is under way", lambda t: t.replace("group.sync.aligned 1;", "group.sync.aligned 2;"), "race", 0),
    ("products are not committed", drop(r"wgmma\.commit_group[^;]*;"), "race|wgmma", 0),
    ("wgmma.fence is gone", drop(r"wgmma\.fence[^;]*;"), "wgmma", 0),
    ("stages are never given back", drop(r"mbarrier\.arrive\.shared[^;]*;"), "livelock", 0),
    ("staged rows are read too early", drop(r"bar\.warp\.sync[^;]*;", -1), "race|uninit", 0),
    ("registers that there are not", lambda t: re.sub(r"(setmaxnreg.dec\S* )40", r"\g<1>48", t), "registers", 0),
    ("shared memory is short", lambda t: t, "out of bounds", -1024 - 64),
    ("one block of weights is not fetched", drop(r"cp\.async\.bulk\.tensor\.4d[^;]*;"), "livelock|uninit", 0),
]  # fmt: skip


@pytest.mark.parametrize("what, edit, report, shared", MUTANTS, ids=[mutant[0] for mutant in MUTANTS])
def test_mutant_is_caught(what, edit, report, shared):
    case = Case([20, 7], 520, 40, blocks=1)
    try:
        case.check(edit=edit, shared=shared)
    except Fault as fault:
        caught = str(fault)
    except AssertionError as error:
        caught = f"numbers: {error}"
    else:
        pytest.fail(f"a kernel passes though {what}")
    assert re.search(report, caught), caught
