"""Compiles CUDA and Triton kernels without a GPU, and finds the tools that read what came out."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

#: the architectures that kernels are shipped for; `a` has the instructions of that one alone (wgmma, tcgen05)
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or next((p for p in ("/usr/local/cuda/bin/nvcc",) if os.access(p, os.X_OK)), None)


def missing_nvcc() -> str | None:
    """Why CUDA cannot be compiled here, or None."""
    return None if find_nvcc() else "nvcc is not on the search path; install the CUDA toolkit 12.8 or later"


def missing_triton() -> str | None:
    try:
        import triton
        import triton.backends.nvidia  # noqa: F401
    except ImportError:
        return "triton is not installed; pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 replaces the compiler; run without it"
    return None


@functools.lru_cache(maxsize=1)
def tool_folder() -> Path | None:
    """The folder of NVIDIA's programs that the triton wheel brings."""
    try:
        import triton
    except ImportError:
        return None
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def find_tool(name: str) -> str:
    """``cuobjdump``, ``nvdisasm``, ``ptxas``: from the triton wheel or the search path."""
    folder = tool_folder()
    if folder is not None and os.access(folder / name, os.X_OK):
        return str(folder / name)
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(
            f"{name} is not here; pip install triton, which brings it, or put the CUDA toolkit on the search path"
        )
    return found


@functools.lru_cache(maxsize=256)
def nvcc(source: str, arch: str = "sm_80", output: str = "ptx", flags: tuple[str, ...] = ()) -> bytes:
    """CUDA source text to PTX text or a cubin. ``arch`` as in :data:`ARCHITECTURES`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source)
        target = path.with_suffix(f".{output}")
        command = [find_nvcc(), f"-arch={arch}", f"-{output}", "-std=c++17", "-o", str(target), *flags, str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return target.read_bytes()


def nvcc_ptx(source: str, arch: str = "sm_80", flags: tuple[str, ...] = ()) -> str:
    return nvcc(source, arch, "ptx", flags).decode()


@dataclass(frozen=True)
class Compiled:
    """What Triton made of one kernel configuration."""

    name: str
    ptx: str
    cubin: bytes
    shared_bytes: int
    num_warps: int

    @property
    def block(self) -> int:
        return 32 * self.num_warps


def triton_compile(
    fn, signature: dict[str, str], constexprs: dict, *, capability: int, num_warps: int = 4, num_stages: int = 3,
    aligned=(),
) -> Compiled:  # fmt: skip
    """Ahead of time, for a device that is not here.

    Args:
        signature: type of each parameter in order (``"*bf16"``, ``"i32"``, ``"constexpr"``,
            ``"tensordesc<bf16[128,64]>"``).
        aligned: names of the parameters whose values are multiples of 16, as Triton finds out when it launches.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = signature | {name: "constexpr" for name in constexprs}
    names = list(fn.arg_names)
    ordered = {name: signature[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    kernel = triton.compile(
        ASTSource(fn=fn, signature=ordered, constexprs=constexprs, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options=dict(num_warps=num_warps, num_stages=num_stages),
    )
    return Compiled(kernel.metadata.name, kernel.asm["ptx"], kernel.asm["cubin"], kernel.metadata.shared, num_warps)
