"""A GPU's limits, measured by the run that they bound: matrix products, a read and a copy of 1 GiB."""

from dataclasses import dataclass

import torch

from benchmarks import timing_cuda

_SIZE = 8192  # of the matrices: 10 times the 132 multiprocessors' tiles
_BYTES = 1 << 30


@dataclass(frozen=True)
class Limits:
    """What :class:`benchmarks.limits.Limits` says of a CPU.

    Attributes:
        gflops: dtype -> rate of an 8192^3 matrix product (float32 without TF32), on random numbers: zeros run faster.
        read_gbs: largest element of 1 GiB, or the copy where that is faster.
        copy_gbs: device to device, bytes read plus bytes written.
    """

    gflops: dict[torch.dtype, float]
    read_gbs: float
    copy_gbs: float

    def peak_gflops(self, dtype: torch.dtype) -> float:
        return self.gflops[dtype]

    def describe(self) -> str:
        bf16, fp16, fp32 = (self.gflops[dtype] / 1e3 for dtype in (torch.bfloat16, torch.float16, torch.float32))
        return (
            f"matrix product bf16 {bf16:.0f} TFLOP/s, fp16 {fp16:.0f}, fp32 {fp32:.0f}; "
            f"read {self.read_gbs:.0f} GB/s, copy {self.copy_gbs:.0f} GB/s (read + written)"
        )


def measure() -> Limits:
    """Takes about three seconds."""
    functions, matrices = {}, torch.randn(2, _SIZE, _SIZE, device="cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = matrices.to(dtype)
        functions[dtype] = lambda i, a=a, b=b: a @ b
    source = torch.ones(_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    functions |= {"read": lambda i: source.amax(), "copy": lambda i: target.copy_(source)}
    with torch.no_grad():
        timings = timing_cuda.measure(functions, repeats=20, budget_s=0.4)
    for timing in timings.values():
        if timing.error:
            raise RuntimeError(timing.error)
    copy_gbs = 2 * _BYTES / timings["copy"].p50 / 1e6
    return Limits(
        gflops={d: 2 * _SIZE**3 / t.p50 / 1e6 for d, t in timings.items() if isinstance(d, torch.dtype)},
        read_gbs=max(copy_gbs, _BYTES / timings["read"].p50 / 1e6),
        copy_gbs=copy_gbs,
    )
