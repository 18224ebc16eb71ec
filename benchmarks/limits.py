"""The machine's limits, measured in the same process and minute as the kernels they bound.

A cloud host's memory bandwidth has been seen to halve within an hour, so a number from a data sheet or from yesterday
makes a floor that means nothing.
"""

import ctypes
import functools
import hashlib
import os
import platform
import random
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import timing

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_NUM_READ_VARIANTS = 4


@functools.cache
def cpu_model() -> str:
    """Name of the CPU, with family and model where the name is as vague as "AMD EPYC"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        return f"{fields['model name']} (family {fields['cpu family']} model {fields['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _build() -> Path:
    # keyed by what -march=native would choose too: a build folder may travel to another machine
    key = hashlib.sha256(_SOURCE.read_bytes() + repr(_FLAGS).encode() + _cpu_flags().encode()).hexdigest()[:16]
    folder = _SOURCE.parents[1] / "build" / "benchmarks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir())
    library = folder / f"limits-{key}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX", "g++")
        command = (compiler, *_FLAGS, str(_SOURCE), "-o", str(unfinished))
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{compiler} could not build {_SOURCE.name}: {(done.stderr.splitlines() or [''])[0]}")
        unfinished.replace(library)
    return library


@dataclass(frozen=True)
class Limits:
    """Rates of ``threads`` threads together.

    Attributes:
        fp32_gflops: multiply-add from registers, counted as two.
        bf16_gflops: bf16 dot products from registers; where the CPU has none, ``fp32_gflops`` (bf16 is widened first).
        read_gbs: random 9.4 MB pieces (one expert of shape A in bf16) of a 0.5 GiB buffer, read once.
        copy_gbs: memcpy between two 256 MiB buffers, bytes read plus bytes written.
        variant: the fastest way to read, for :meth:`Probe.reader`.
        noisy: something else ran while the bandwidths were measured; they are the best samples instead of medians.
    """

    threads: int
    vector_bits: int
    has_bf16_dot: bool
    fp32_gflops: float
    bf16_gflops: float
    read_gbs: float
    copy_gbs: float
    variant: int
    noisy: bool = False

    def peak_gflops(self, dtype: torch.dtype) -> float:
        return self.bf16_gflops if dtype == torch.bfloat16 else self.fp32_gflops

    def describe(self) -> str:
        bf16 = f"{self.bf16_gflops:.0f}" if self.has_bf16_dot else "no bf16 dot product, taken as fp32's"
        return (
            f"{self.threads} threads, {self.vector_bits}-bit vectors: fp32 {self.fp32_gflops:.0f} GFLOP/s, "
            f"bf16 {bf16}; expert read {self.read_gbs:.1f} GB/s, memcpy {self.copy_gbs:.1f} GB/s (read + written)"
            + (" (disturbed: best samples)" if self.noisy else "")
        )


class Probe:
    """The compiled probes. Raises RuntimeError or OSError where there is no compiler."""

    def __init__(self):
        library = ctypes.CDLL(str(_build()))
        for name in ("limits_multiply_add_fp32", "limits_multiply_add_bf16"):
            getattr(library, name).restype = ctypes.c_double
            getattr(library, name).argtypes = (ctypes.c_int, ctypes.c_int64)
        library.limits_read.restype = library.limits_copy.restype = ctypes.c_double
        # addresses are passed as integers: the caller keeps the arrays alive
        library.limits_read.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
        library.limits_copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        self._library = library

    def reader(self, pieces: Sequence[Tensor], threads: int, variant: int) -> Callable[[], float]:
        """A function that reads all ``pieces`` (contiguous tensors) once and returns the seconds it took."""
        begins = (ctypes.c_void_p * len(pieces))(*(piece.data_ptr() for piece in pieces))
        sizes = (ctypes.c_int64 * len(pieces))(*(piece.numel() * piece.element_size() for piece in pieces))
        arguments = (ctypes.addressof(begins), ctypes.addressof(sizes), len(pieces), threads, variant)
        keep = (begins, sizes, pieces)

        def read(_keep=keep) -> float:
            return self._library.limits_read(*arguments)

        return read

    def copier(self, num_bytes: int, threads: int) -> Callable[[], float]:
        """A function that copies ``num_bytes`` between two buffers of its own and returns the seconds it took."""
        # filled, so that the pages are there: the first touch of a fresh page costs more than copying it
        source, target = (torch.ones(max(num_bytes, 64), dtype=torch.uint8) for _ in range(2))

        def copy(_keep=(source, target)) -> float:
            return self._library.limits_copy(target.data_ptr(), source.data_ptr(), num_bytes, threads)

        return copy

    def measure(self, threads: int, repeats: int = 7, buffer_bytes: int = 512 << 20) -> Limits:
        """Measures everything; takes about three seconds.

        The register rates are the best of the repeats, since noise only lowers them; bandwidths are medians of clean
        samples, since a sustained rate is what bounds a kernel.
        """
        library = self._library

        def best_rate(function: Callable[[int, int], float]) -> float:
            return max(function(threads, 1_000_000) for _ in range(repeats)) / 1e9  # 3 ms each at 4 GHz

        fp32 = best_rate(library.limits_multiply_add_fp32)
        bf16 = best_rate(library.limits_multiply_add_bf16) if library.limits_has_bf16_dot() else 0.0

        buffer = torch.ones(buffer_bytes, dtype=torch.uint8)
        piece = min(9_437_184, buffer_bytes // 16)
        slots = buffer.split(piece)[: buffer_bytes // piece]
        generator = random.Random(0)
        draws = [generator.sample(slots, 8) for _ in range(16)]

        def read_in(variant: int) -> Callable[[int], float]:
            readers = [self.reader(pieces, threads, variant) for pieces in draws]
            return lambda i: readers[i % len(readers)]()

        copy = self.copier(buffer_bytes // 2, threads)
        functions = {str(variant): read_in(variant) for variant in range(_NUM_READ_VARIANTS)}
        timings = timing.measure(functions | {"copy": lambda i: copy()}, repeats=repeats, budget_s=0.6)
        variant = min(range(_NUM_READ_VARIANTS), key=lambda v: timings[str(v)].as_limit)
        return Limits(
            threads=threads,
            vector_bits=library.limits_vector_bits(),
            has_bf16_dot=bf16 > 0,
            fp32_gflops=fp32,
            bf16_gflops=bf16 or fp32,
            read_gbs=8 * piece / timings[str(variant)].as_limit / 1e6,
            copy_gbs=2 * (buffer_bytes // 2) / timings["copy"].as_limit / 1e6,
            variant=variant,
            noisy=timings[str(variant)].noisy or timings["copy"].noisy,
        )
