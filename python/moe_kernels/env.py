"""Every environment variable that moe_kernels reads, and what this installation can do.

None of them changes a result beyond rounding: they choose among kernels that compute the same thing, or they log.

``python -m moe_kernels env`` prints :func:`report`; paste it into bug reports.
"""

import os

#: name -> (default, meaning)
VARIABLES = {
    "MOE_KERNELS_BACKEND": ("auto", "backend that backend='auto' resolves to: auto, reference, native or triton"),
    "MOE_KERNELS_CPU_ISA": ("", "force one CPU kernel set: portable, avx2, avx512 or avx512_bf16 (read when loaded)"),
    "MOE_KERNELS_LOG": ("0", "1 prints one line per op call to stderr: op, backend, device"),
}


def variable(name: str) -> str:
    """Value of one of :data:`VARIABLES`, or its default."""
    return os.environ.get(name) or VARIABLES[name][0]


def report() -> dict[str, object]:
    """Versions, back ends and settings of this installation, as plain data."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from moe_kernels import _dispatch, _extension

    def installed(distribution: str) -> str:
        try:
            return version(distribution)
        except PackageNotFoundError:
            return "not installed"

    return {
        "moe_kernels": installed("moe-kernels-torch"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch threads": torch.get_num_threads(),
        "triton": installed("triton"),
        "transformers": installed("transformers"),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "no device",
        "native cpu": _extension.cpu_missing_reason() or "available",
        "native cuda": _extension.cuda_missing_reason()
        or f"available for {', '.join(sorted(_dispatch.CUDA_OPS))}"
        f" ({', '.join(sorted(_dispatch.SM90_OPS))}: compute capability 9.0)",
        "triton kernels": _extension.triton_missing_reason()
        or f"available for {', '.join(sorted(_dispatch.TRITON_OPS))}",
        **{f"build {key}": value for key, value in _extension.build_info().items()},
        **{f"auto on {device}": " > ".join(order) for device, order in _dispatch.AUTO_ORDER.items()},
        **{name: variable(name) for name in VARIABLES},
    }
