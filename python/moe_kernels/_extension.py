"""Loads the compiled parts once and remembers why a part is absent.

``libmoe_kernels_cpu.so`` holds the CPU kernels of all tensor ops (PyTorch's stable ABI, no Python in it);
``_host`` (pybind11) answers host-side questions that are no tensor op: instruction sets, build facts.
"""

from pathlib import Path

import torch

try:
    from moe_kernels import _host
except ImportError:
    _host = None  # built for another Python version: the ops do not need it

_LIBRARY = Path(__file__).parent / "libmoe_kernels_cpu.so"


def _load() -> str | None:
    if not _LIBRARY.exists():
        return f"{_LIBRARY.name} is not in {_LIBRARY.parent}: the package was not built; run pip install"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY.name} could not be loaded: {error}"
    if _host is not None:
        _host.chosen_isa()  # a wrong MOE_KERNELS_CPU_ISA is reported by the import, not by the first op
    return None


_cpu_missing_reason = _load()


def cpu_missing_reason() -> str | None:
    """Why the CPU kernels cannot be used, or None when they can."""
    return _cpu_missing_reason


def build_info() -> dict[str, str]:
    """Compiler, torch headers and instruction sets of the compiled part."""
    return {"host module": "not available"} if _host is None else dict(_host.build_info())
