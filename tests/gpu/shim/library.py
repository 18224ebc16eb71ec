"""The CUDA sources compiled by g++ against the execution model of simt.h, as ops on CPU tensors."""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parents[3]
SHIM = Path(__file__).parent
BUILD = ROOT / "build" / "simt"
NAMESPACE = "moe_kernels_simt"  # of MOE_CUDA_LIBRARY in csrc/common/cuda_launch.cuh

#: one build for each way of looking; ThreadSanitizer sees the kernels, not the scheduler (simt.cpp says why)
FLAVOURS = {
    "plain": ["-O2"],
    "asan": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "tsan": ["-O1", "-g", "-fsanitize=thread"],
    "ucontext": ["-O2", "-DSIMT_UCONTEXT"],
}
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]


def flavour() -> str:
    """The build that this process tests with."""
    return os.environ.get("MOE_KERNELS_TEST_SIMT", "plain")


def missing_reason() -> str | None:
    """Why the CUDA sources cannot run on this machine's CPU, or None when they can."""
    return None if shutil.which("g++") else "g++ is not installed"


def _flags(source: Path, flavour: str) -> list[str]:
    flags = list(FLAVOURS[flavour])
    if source.name == "simt.cpp" and flavour == "tsan":
        flags = ["-O1", "-g", "-DSIMT_TSAN"]
    return ["-x", "c++", "-std=c++20", "-fPIC", "-fno-ipa-icf", *flags, *WARNINGS]


def _run(command: list[str]) -> bytes:
    # a sanitizer that is preloaded into this process is none of the compiler's business
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout


def _compile(source: Path, flavour: str, includes: list[str], defines: list[str]) -> Path:
    """Object file of one source, compiled unless there is one of the same preprocessed text and flags."""
    command = ["g++", *_flags(source, flavour), *defines, *includes]
    text = _run([*command, "-E", str(source)])
    digest = hashlib.sha256(text + "\0".join(command).encode()).hexdigest()[:16]
    target = BUILD / flavour / f"{source.stem}-{digest}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        _run([*command, "-c", str(source), "-o", str(partial)])
        partial.rename(target)
    return target


def build(sources: list[Path], name: str, flavour: str, *, program: bool = False) -> Path:
    """A shared library (or a program) of ``sources`` and the scheduler; built again only when something changed."""
    torch_root = Path(torch.__file__).parent
    includes = [f"-I{ROOT / 'csrc'}", f"-I{SHIM}", "-isystem", str(torch_root / "include")]
    definitions = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    objects = [_compile(source, flavour, includes, definitions) for source in [*sources, SHIM / "simt.cpp"]]
    digest = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
    target = BUILD / flavour / (f"{name}-{digest}" if program else f"lib{name}-{digest}.so")
    if not target.exists():
        sanitizers = [flag for flag in FLAVOURS[flavour] if flag.startswith("-fsanitize")]
        partial = target.with_suffix(f".{os.getpid()}")
        kind = [] if program else ["-shared", str(torch_root / "lib" / "libtorch_cpu.so")]
        _run(["g++", *sanitizers, *map(str, objects), *kind, "-o", str(partial)])
        partial.rename(target)
    return target


def cuda_sources() -> list[Path]:
    """Every .cu of the library; one may be replaced by a changed copy (exercise.py)."""
    changed = Path(os.environ.get("MOE_KERNELS_TEST_SIMT_SOURCE") or "none")
    sources = sorted((ROOT / "csrc" / "ops").glob("*/*_cuda.cu"))
    return [changed if source.name == changed.name else source for source in sources]


@functools.cache
def load() -> ctypes.CDLL:
    """Defines the ops that have CUDA kernels once more, in a namespace of their own, with those kernels for the CPU."""
    path = build(cuda_sources(), NAMESPACE, flavour())
    for name in op_names():
        schema = str(getattr(torch.ops.moe_kernels, name).default._schema).split("(", 1)[1]
        torch.library.define(f"{NAMESPACE}::{name}", "(" + schema)
        torch.library.register_fake(f"{NAMESPACE}::{name}", getattr(torch.ops.moe_kernels, name).default)
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


def set_seed(seed: int) -> None:
    """Another seed is another order of blocks and threads."""
    load().simt_set_seed(ctypes.c_uint64(seed))


def native_modules() -> list[ModuleType]:
    from moe_kernels.ops.logit_fusion import native as logit_fusion
    from moe_kernels.ops.merge import native as merge
    from moe_kernels.ops.permute import native as permute
    from moe_kernels.ops.route import native as route
    from moe_kernels.ops.task_vector import native as task_vector
    from moe_kernels.ops.ternary_linear import native as ternary_linear

    return [logit_fusion, merge, permute, route, task_vector, ternary_linear]


def op_names() -> list[str]:
    """Ops that the CUDA sources register kernels for."""
    return [name for source in cuda_sources() for name in re.findall(r'm\.impl\("(\w+)"', source.read_text())]


def redirect(monkeypatch, namespace: str = NAMESPACE) -> None:
    """Makes the handles in the rooms' native.py those of the CUDA kernels on the CPU."""
    load()
    for module in native_modules():
        for name in op_names():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(getattr(torch.ops, namespace), name).default)
