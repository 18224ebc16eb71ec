"""A clean build of the wheel, from nothing, as `pip install .` does it: for the CPU alone, and with CUDA kernels."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import Cell, Cells, Context

SUMMARY = "clean build of the wheel (pip wheel, no build isolation), MAX_JOBS = --threads"
DEFAULTS = dict(shapes=["-"], dtypes=["fp32"], tokens=[0])
PROVIDER_NAMES = ["cpu_build", "cuda_build"]

_ROOT = Path(__file__).resolve().parents[2]


def cells(context: Context) -> Cells:
    cell = Cell("build", "-", torch.float32, 0, [], baseline="cpu_build")
    if not (_ROOT / "CMakeLists.txt").exists():
        cell.skipped["cpu_build"] = "there is no CMakeLists.txt"
    elif shutil.which("g++") is None and "CXX" not in os.environ:
        cell.skipped["cpu_build"] = "no g++ and no CXX"
    else:
        cell.measured = {"cpu_build": lambda: [_build_ms(context.threads, "-Ccmake.define.MOE_KERNELS_NVCC=OFF")]}
        if shutil.which("nvcc") is None or torch.version.cuda is None:
            cell.skipped["cuda_build"] = "no nvcc, or a PyTorch without CUDA"
        else:
            cell.measured["cuda_build"] = lambda: [_build_ms(context.threads)]
    yield cell


def _build_ms(jobs: int, *options: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = (
            sys.executable, "-m", "pip", "wheel", str(_ROOT), "--no-deps", "--no-build-isolation", "--quiet",
            "--wheel-dir", folder, f"-Cbuild-dir={folder}/build", *options,
        )  # fmt: skip
        # a compiler cache would make it a different measurement
        settings = {"CMAKE_BUILD_PARALLEL_LEVEL": str(jobs), "MAX_JOBS": str(jobs), "CCACHE_DISABLE": "1"}
        begin = time.perf_counter()
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
        if done.returncode:
            # pip's own last lines only say that there was an error above
            lines = [line.strip(" |") for line in done.stderr.splitlines() if "Error:" in line or "error:" in line]
            lines = [line for line in lines if not line.startswith("error:")] or lines or ["no message"]
            raise RuntimeError(f"the build failed: {lines[-1]}")
        return (time.perf_counter() - begin) * 1e3
