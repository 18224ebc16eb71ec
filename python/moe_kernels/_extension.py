"""Loads the compiled parts once and remembers why a part is absent.

``libmoe_kernels_cpu.so`` holds the CPU kernels of all tensor ops (PyTorch's stable ABI, no Python in it),
``libmoe_kernels_cuda.so`` the CUDA kernels (built only where there was an nvcc and a PyTorch with CUDA);
``_host`` (pybind11) answers host-side questions that are no tensor op: instruction sets, build facts.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

try:
    from moe_kernels import _host
except ImportError:
    _host = None  # built for another Python version: the ops do not need it


def _load(name: str, absent: str) -> str | None:
    library = Path(__file__).parent / name
    if not library.exists():
        return f"{name} is not in {library.parent}: {absent}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{name} could not be loaded: {error}"
    return None


_cpu_missing_reason = _load("libmoe_kernels_cpu.so", "the package was not built; run pip install")
if _cpu_missing_reason is None and _host is not None:
    _host.chosen_isa()  # a wrong MOE_KERNELS_CPU_ISA is reported by the import, not by the first op
_cuda_missing_reason = _load(
    "libmoe_kernels_cuda.so",
    "the package was built without nvcc or for a PyTorch without CUDA; install both and rebuild",
)


def cpu_missing_reason() -> str | None:
    """Why the CPU kernels cannot be used, or None when they can."""
    return _cpu_missing_reason


def cuda_missing_reason() -> str | None:
    """Why the CUDA kernels cannot be used, or None when they can."""
    return _cuda_missing_reason


# looked for once: PyTorch 2.11 does not trace find_spec
_triton_missing_reason = None if find_spec("triton") else "triton is not installed"


def triton_missing_reason() -> str | None:
    """Why Triton kernels cannot be used, or None when they can. Triton itself is imported by the first kernel."""
    return _triton_missing_reason


def build_info() -> dict[str, str]:
    """Compiler, torch headers and instruction sets of the compiled part."""
    return {"host module": "not available"} if _host is None else dict(_host.build_info())
