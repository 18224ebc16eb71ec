"""The only place where a backend is chosen, and where autocast is applied."""

import os
import sys
from typing import Literal

import torch
from torch import Tensor

from moe_kernels import _extension, env

Backend = Literal["auto", "reference", "native", "triton"]

#: device type -> back ends that ``backend="auto"`` tries, best first. A device not listed runs the reference.
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "reference"),
    "cuda": ("native", "triton", "reference"),
}

#: ops that have kernels in CUDA C++, and in Triton; every op has native kernels for the CPU
CUDA_OPS = frozenset(
    {"plan_dispatch", "permute", "unpermute", "route", "route_weights", "expert_ffn"}
    | {"apply_", "unapply_", "decompress", "merge", "ternary_linear", "fuse_logits"}
)
TRITON_OPS = CUDA_OPS | {
    "grouped_gemm", "expert_ffn with gradients", "routed_lora", "lora_shrink", "lora_expand",
    "ternary_linear of many or wide tokens",
}  # fmt: skip
#: of CUDA_OPS, those whose kernels are for compute capability 9.0 (H100, H200) alone
SM90_OPS = frozenset({"expert_ffn"})

_BACKENDS = ("auto", "reference", "native", "triton")
_DEFAULT = env.variable("MOE_KERNELS_BACKEND")
if _DEFAULT not in _BACKENDS:
    raise ValueError(f"MOE_KERNELS_BACKEND must be one of {', '.join(_BACKENDS)}, got {_DEFAULT!r}")
# Triton's own switch: its kernels then run in Python, on tensors of any device
_TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
_LOG = env.variable("MOE_KERNELS_LOG") == "1"


def missing_reason(op: str, backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run ``op`` on tensors of ``device_type``, or None when it can."""
    if backend == "reference":
        return None
    if backend == "native":
        if device_type == "cpu":
            return _extension.cpu_missing_reason()
        if device_type != "cuda":
            return f"there are no native kernels for device type '{device_type}'"
        if op not in CUDA_OPS:
            return f"{op} has no CUDA kernels yet"
        if op in SM90_OPS and (not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9):
            return f"the CUDA kernels of {op} are for GPUs of compute capability 9.0 (H100, H200)"
        return _extension.cuda_missing_reason()
    if backend == "triton":
        if op not in TRITON_OPS:
            return f"{op} has no Triton kernels yet"
        if device_type != "cuda" and not _TRITON_INTERPRETS:
            return f"Triton kernels run on CUDA tensors, not on '{device_type}'"
        return _extension.triton_missing_reason()
    return f"unknown backend; use one of {', '.join(_BACKENDS)}"


def _auto(op: str, device_type: str) -> str:
    for backend in AUTO_ORDER[device_type]:
        if missing_reason(op, backend, device_type) is None:
            return backend
    return "reference"


# Resolved once per process: the choice depends on what is installed, not on the call. What depends on the GPU is asked
# by the first call: an import leaves CUDA alone. An op that is not listed has kernels for the CPU alone.
_AUTO = {
    (op, device_type): _auto(op, device_type)
    for op in CUDA_OPS | TRITON_OPS
    for device_type in AUTO_ORDER
    if not (op in SM90_OPS and device_type == "cuda")
}
_AUTO |= {device_type: _auto("", device_type) for device_type in AUTO_ORDER}


def autocast_enabled(device_type: str) -> bool:
    """Whether ``torch.autocast`` is on for this type of device (never for types without autocast, such as meta)."""
    if device_type not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device_type):  # 2.11 cannot trace it
        return False
    return torch.is_autocast_enabled(device_type)


def autocast(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts to the autocast dtype what ``F.linear`` would cast: floating tensors that are not float64."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def resolve(op: str, backend: str, device_type: str) -> str:
    """Name of the backend that runs ``op``: "reference", "native" or "triton".

    Raises:
        ValueError: the backend's name is unknown.
        RuntimeError: the backend is known but cannot run here; the message says why.
    """
    if backend == "auto":
        backend = _DEFAULT
        if backend == "auto":
            backend = _AUTO.get((op, device_type))
            if backend is None and op in SM90_OPS and device_type == "cuda":
                backend = _AUTO[op, device_type] = _auto(op, device_type)
            backend = backend or _AUTO.get(device_type, "reference")
    if backend not in _BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    if backend != "reference":
        reason = missing_reason(op, backend, device_type)
        if reason is not None:
            raise RuntimeError(f"{op}: backend='{backend}' is unavailable: {reason}; use backend='reference'")
    if _LOG:
        print(f"moe_kernels: {op} backend={backend} device={device_type}", file=sys.stderr)
    return backend
