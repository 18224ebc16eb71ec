"""Triton kernels, ours and other people's, launched on CPU tensors: a driver for Triton whose device is the PTX
interpreter. Triton specialises, compiles and caches as for a GPU of compute capability 8.0.

:func:`compiled` collects what a call would launch on other GPUs, for the static gate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from . import build
from .ptx import run_ptx
from .ptx_ops import Launched, collect

CAPABILITY = 80


def missing_reason() -> str | None:
    return build.missing_triton()


def _product(source, metadata, kind: str) -> bytes:
    """PTX or machine code of a kernel: they lie in Triton's cache."""
    from triton.runtime.cache import get_cache_manager

    return Path(get_cache_manager(metadata.hash).get_file(f"{source.name}.{kind}")).read_bytes()


def _flat(values) -> list:
    """A tuple's entries are parameters of their own."""
    return [one for value in values for one in (_flat(value) if isinstance(value, tuple) else [value])]


class _Launcher:
    """What Triton calls to launch one compiled kernel."""

    def __init__(self, source, metadata):
        self.metadata = metadata
        self.ptx = _product(source, metadata, "ptx").decode()
        # constants and what Triton specialised to a constant are no parameters of the PTX
        self.is_parameter = [kind != "constexpr" for kind in _flat(source.signature.values())]

    def __call__(self, x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        arguments = _flat(arguments)
        parameters = [argument for argument, used in zip(arguments, self.is_parameter, strict=True) if used]
        block = 32 * self.metadata.num_warps
        counters = run_ptx(self.ptx, self.metadata.name, (x, y, z), block, parameters, self.metadata.shared)
        collect(Launched(self.metadata.name, (x, y, z), (block, 1, 1), counters))


#: what the launches of :func:`compiled` were
_compiled: dict[str, build.Compiled] = {}


class _Collector:
    """Stands in for a launch where only the machine code is wanted."""

    def __init__(self, source, metadata):
        ptx, cubin = (_product(source, metadata, kind) for kind in ("ptx", "cubin"))
        self.compiled = build.Compiled(metadata.name, ptx.decode(), cubin, metadata.shared, metadata.num_warps)

    def __call__(self, *_):
        _compiled[self.compiled.name] = self.compiled


class _Utils:
    def __init__(self, capability: int):
        self.max_shared = (163 if capability == 80 else 227) * 1024

    def load_binary(self, name, kernel, shared, device):
        registers, spills, max_threads = 0, 0, 1024
        return None, None, registers, spills, max_threads

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return dict(max_shared_mem=self.max_shared, multiprocessor_count=108, warpSize=32, max_num_regs=65536)


@functools.cache
def driver(capability: int = CAPABILITY, launcher: type = _Launcher):
    """One driver of each kind: Triton keeps what it compiled by the number of the device."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class PtxDriver(DriverBase):
        utils, launcher_cls = _Utils(capability), launcher

        @classmethod
        def is_active(cls):
            return True

        def map_python_to_cpp_type(self, type_):
            raise NotImplementedError("launches have no C++ side here")

        def get_current_device(self):
            return 0 if launcher is _Launcher else capability

        def set_current_device(self, device):
            pass

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_device_capability(self, device=0):
            return divmod(capability, 10)

        def get_active_torch_device(self):
            import torch

            return torch.device("cpu")

        def get_benchmarker(self):
            # an autotuner takes the configuration that issues the fewest instructions
            from .ptx_ops import counting

            def instructions(call, quantiles=None, **_):
                with counting() as launches:
                    call()
                issued = float(sum(launched.counters.instructions for launched in launches))
                return issued if quantiles is None else [issued] * len(quantiles)

            return instructions

    return PtxDriver()


def redirect(monkeypatch) -> None:
    """Lets ``backend="triton"`` take CPU tensors, and runs what it launches in the interpreter."""
    from triton.runtime.driver import driver as drivers

    from moe_kernels import _dispatch

    monkeypatch.setattr(_dispatch, "_TRITON_INTERPRETS", True)
    monkeypatch.setattr(drivers, "_active", driver())


def compiled(capability: int, call: Callable[[], object]) -> dict[str, build.Compiled]:
    """The kernels, by name, that ``call`` would launch on a GPU of that capability. None of them runs."""
    from triton.runtime.driver import driver as drivers

    from moe_kernels.ops.grouped_gemm import triton as grouped_gemm

    before, capability_of = drivers._active, grouped_gemm.capability_of
    drivers._active = driver(capability, _Collector)
    grouped_gemm.capability_of = lambda tensor: divmod(capability, 10)  # tiles are planned for that GPU too
    _compiled.clear()
    try:
        call()
        return dict(_compiled)
    finally:
        drivers._active, grouped_gemm.capability_of = before, capability_of
