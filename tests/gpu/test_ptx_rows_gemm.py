"""The grouped GEMM of compute capability 9.0a in the PTX interpreter: its tensor copies, mbarriers, gathers and products
for every tile of tokens, and changes to its PTX that must be reported."""

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
from .ptx import TensorMap, execute

pytestmark = pytest.mark.skipif(build.missing_nvcc() is not None, reason=str(build.missing_nvcc()))

ROOT = Path(__file__).parents[2]
STAGING, STAGE = 256, 2 * 128 * 64 * 2  # bytes for each token of a tile, bytes of weights in a stage


@functools.cache
def texts() -> dict[str, str]:
    """PTX of each variant, by the template's arguments: dtype, tokens of a tile, gated, gathering."""
    source = ROOT / "csrc/ops/grouped_gemm/rows_gemm_sm90.cu"
    include = Path(torch.__file__).parent / "include"
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        command = [
            build.find_nvcc(),
            "-std=c++20",
            "-O3",
            "-arch=compute_90a",
            "-ptx",
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            "-DUSE_CUDA",
            f"-I{ROOT / 'csrc'}",
            "-isystem",
            str(include),
            str(source),
            "-o",
            file.name,
        ]
        subprocess.run(command, check=True, capture_output=True)
        text = Path(file.name).read_text()
    head, *kernels = re.split(r"^(?=(?:\.\w+ )?\.entry)", text, flags=re.M)
    found = {}
    for kernel in kernels:
        name = re.search(r"\.entry\s+(\w+)", kernel)[1]
        dtype, tokens, gated, gather = re.search(r"INS_4(\w\w16)ELi(\d+)ELb(\d)ELb(\d)E", name).groups()
        found[dtype, int(tokens), gated == "1", gather == "1"] = (head + kernel, name)
    return found


class Case:
    """A grouped product with its operands; ``run`` executes it, ``check`` compares."""

    def __init__(
        self,
        counts,
        depth,
        columns,
        *,
        tokens=16,
        dtype="bf16",
        gated=False,
        gather=False,
        interleaved=False,
        activation=None,
        bias=False,
        blocks=2,
    ):
        self.tokens, self.gated, self.gather, self.interleaved = tokens, gated, gather, interleaved
        self.activation, self.blocks, self.columns, self.dtype = activation, blocks, columns, dtype
        kind = torch.bfloat16 if dtype == "bf16" else torch.float16
        self.offsets = torch.tensor([0, *counts]).cumsum(0).int()
        num_rows = int(self.offsets[-1]) + 2  # two rows of nobody
        self.x = torch.randn(num_rows if not gather else 11, depth).to(kind)
        self.source_rows = torch.randint(0, 11, (num_rows,)).int()
        self.source_rows[self.offsets[-1] :] = -1
        self.weights = (torch.randn(len(counts), columns * (2 if gated else 1), depth) * depth**-0.5).to(kind)
        self.bias = torch.randn(len(counts), self.weights.shape[1]).to(kind) if bias else None
        self.out = torch.full((num_rows, columns), torch.nan).to(kind)

    def reference(self, dtype) -> torch.Tensor:
        x = self.x[self.source_rows.clamp(min=0).long()] if self.gather else self.x
        parts = []
        for e, (begin, end) in enumerate(zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)):
            h = x[begin:end].to(dtype) @ self.weights[e].to(dtype).T
            if self.bias is not None:
                h = h + self.bias[e].to(dtype)
            if self.gated:
                h = self.activation(*((h[:, ::2], h[:, 1::2]) if self.interleaved else h.chunk(2, 1)))
            elif self.activation:
                h = self.activation(h)
            parts.append(h)
        return torch.cat(parts)

    def launch(self, text=None, seed=None, shared=0):
        key = (self.dtype, self.tokens, self.gated, self.gather)
        default, name = texts()[key]
        experts, _, depth = self.weights.shape
        view = (
            self.weights.view(experts, self.columns, 2, depth).transpose(1, 2)
            if self.interleaved
            else self.weights.view(experts, 2 if self.gated else 1, self.columns, depth)
        )
        maps = [
            TensorMap(view, (1, 1, 128, 64), 128),
            bytes(128) if self.gather else TensorMap(self.x, (self.tokens, 64), 128),
        ]
        step, up = ((2, 1) if self.interleaved else (1, self.columns)) if self.gated else (1, 0)
        numbers = (-1, 0, 0, 0, 0, 0)
        if self.activation:
            kind, _, alpha, limit, clamp_output, up_offset = self.activation.kernel_arguments()
            infinity = float("inf")
            numbers = (
                kind,
                alpha,
                infinity if clamp_output else limit,
                limit,
                limit if clamp_output else infinity,
                up_offset,
            )
        pointer = lambda t: 0 if t is None else t.data_ptr()  # noqa: E731
        gemm = struct.pack(
            "<9q5ii5f4x", pointer(self.offsets), pointer(self.source_rows), pointer(self.x), depth, pointer(self.bias),
            self.weights.shape[1], step, up, pointer(self.out), len(self.out), len(self.x), experts, self.columns,
            depth, *numbers,
        )  # fmt: skip
        staging, stage = STAGING * min(self.tokens, 64), STAGE + self.tokens * 128
        stages = min(6, (220 * 1024 - staging) // stage)
        size = 1024 + stages * stage + staging + 16 * stages + 4 * (experts + 1)
        tensors = [self.offsets, self.source_rows, self.x, self.out] + ([] if self.bias is None else [self.bias])
        return execute(
            text or default,
            name,
            self.blocks,
            384,
            [*maps, gemm],
            size + shared,
            seed,
            pointed_to=tensors,
            uninitialized=[self.out],
            max_steps=200_000,
        )

    def check(self, **options):
        launched = self.launch(**options)
        end = int(self.offsets[-1])
        assert_close_to_reference(self.out[:end], self.reference(torch.float64), self.reference(self.out.dtype))
        assert self.out[end:].isnan().all()  # rows of nobody are not written
        return launched


@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("gated, gather", [(False, False), (False, True), (True, True)])
def test_ragged_experts(tokens, gated, gather):
    activation = Activation(gated=gated) if gather else None
    Case(
        [0, 1, tokens + 3, 0, tokens, 5],
        72,
        136,
        tokens=tokens,
        gated=gated,
        gather=gather,
        activation=activation,
        bias=True,
    ).check()


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_warps(seed):
    Case([20, 0, 33], 200, 264, gated=True, gather=True, activation=Activation()).check(seed=seed)


# less than a step, more steps than stages, the last one partly filled
@pytest.mark.parametrize("depth", [8, 64, 520])
def test_depths(depth):
    Case(
        [17, 3], depth, 40, gated=True, gather=True, activation=Activation(), dtype="fp16" if depth == 8 else "bf16"
    ).check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_activations(kind, interleaved):
    activation = Activation(kind, limit=0.7, up_offset=1.0, clamp="output" if kind == "gelu" else "input")
    Case([5, 9], 64, 72, gated=True, gather=True, interleaved=interleaved, activation=activation, bias=True).check()


def test_more_blocks_than_tiles():
    Case([3], 64, 8, blocks=3).check()


def test_no_rows():
    case = Case([0, 0], 64, 8)
    case.launch()
    assert case.out.isnan().all()
