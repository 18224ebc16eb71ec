"""The only place where a backend is chosen, and where autocast is applied."""

import sys
from typing import Literal

import torch
from torch import Tensor

from moe_kernels import _extension, env

Backend = Literal["auto", "reference", "native", "triton"]

#: device type -> back ends that ``backend="auto"`` tries, best first. A device not listed runs the reference.
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("native", "reference"),
    "cuda": ("reference",),
}

_BACKENDS = ("auto", "reference", "native", "triton")
_DEFAULT = env.variable("MOE_KERNELS_BACKEND")
if _DEFAULT not in _BACKENDS:
    raise ValueError(f"MOE_KERNELS_BACKEND must be one of {', '.join(_BACKENDS)}, got {_DEFAULT!r}")
_LOG = env.variable("MOE_KERNELS_LOG") == "1"


def missing_reason(backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot run tensors of ``device_type``, or None when it can."""
    if backend == "reference":
        return None
    if backend == "native":
        if device_type == "cpu":
            return _extension.cpu_missing_reason()
        return f"there are no native kernels for device type '{device_type}' yet"
    if backend == "triton":
        return "there are no Triton kernels yet"
    return f"unknown backend; use one of {', '.join(_BACKENDS)}"


def _auto(device_type: str) -> str:
    for backend in AUTO_ORDER.get(device_type, ()):
        if missing_reason(backend, device_type) is None:
            return backend
    return "reference"


# Resolved once per process: the choice depends on what is installed, not on the call.
_AUTO = {device_type: _auto(device_type) for device_type in AUTO_ORDER}


def autocast_enabled(device_type: str) -> bool:
    """Whether ``torch.autocast`` is on for this type of device (never for types without autocast, such as meta)."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


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
        backend = _DEFAULT if _DEFAULT != "auto" else _AUTO.get(device_type, "reference")
    if backend not in _BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(_BACKENDS)}, got {backend!r}")
    if backend != "reference":
        reason = missing_reason(backend, device_type)
        if reason is not None:
            raise RuntimeError(f"{op}: backend='{backend}' is unavailable: {reason}; use backend='reference'")
    if _LOG:
        print(f"moe_kernels: {op} backend={backend} device={device_type}", file=sys.stderr)
    return backend
