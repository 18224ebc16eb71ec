"""Runs an op on three ways: the kernel, the reference in the same dtype, the reference in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_kernels.testing import assert_close_to_reference

LOW_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = [*LOW_DTYPES, torch.float64]
#: interpreters, which get fewer tokens
SLOW = ("triton-cpu", "native-ptx", "triton-ptx")


def seeded(seed: int) -> torch.Generator:
    """For tensors of the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def leaf(tensor: Tensor | None) -> Tensor | None:
    """A copy with the same strides that collects a gradient (float tensors)."""
    if tensor is None:
        return None
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return copy.requires_grad_(tensor.is_floating_point())


def to_double(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point():
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.float64, device=tensor.device).copy_(tensor)


def run(op: Callable, tensors: list[Tensor | None], backend: str, grad_out: Tensor | None):
    tensors = [leaf(tensor) for tensor in tensors]
    out = op(*tensors, backend=backend)
    if grad_out is None:
        return out, []
    inputs = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    grads = torch.autograd.grad(out, inputs, grad_out.to(out.dtype), allow_unused=True, materialize_grads=True)
    return out, grads


def check(op: Callable, tensors: list[Tensor | None], backend: str, *, backward: bool = True) -> None:
    """Forward and every gradient of ``op(*tensors, backend=...)`` against the float64 reference."""
    with torch.no_grad():
        shape = op(*tensors, backend="reference")
    # not the global one: hypothesis replays a failure with the same numbers
    generator = torch.Generator(shape.device).manual_seed(0)
    grad_out = torch.randn(shape.shape, dtype=torch.float64, generator=generator, device=shape.device).to(shape.dtype)
    grad_out = grad_out if backward else None
    reference64 = run(op, [to_double(tensor) for tensor in tensors], "reference", grad_out)
    eager = run(op, tensors, "reference", grad_out)
    actual = run(op, tensors, backend, grad_out)
    assert_close_to_reference(actual[0].detach(), reference64[0].detach(), eager[0].detach(), "out")
    for i, grads in enumerate(zip(actual[1], reference64[1], eager[1], strict=True)):
        assert_close_to_reference(*grads, f"gradient {i}")


def strided(tensor: Tensor) -> Tensor:
    """The same values in memory where no dimension is contiguous."""
    wide = torch.empty(*(2 * size for size in tensor.shape), dtype=tensor.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def small_integers(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Fills with -1, 0, 1: sums of products stay exact in float32, so kernels must agree to the last bit."""
    return tensor.copy_(torch.randint(-1, 2, tensor.shape, generator=generator))


def check_exact(op: Callable, tensors: list[Tensor | None], backend: str) -> None:
    """Forward and every gradient of integer-valued ``tensors``: the float64 reference, rounded once, bit for bit."""
    generator = seeded(1)
    with torch.no_grad():
        shape = op(*tensors, backend="reference")
    grad_out = small_integers(torch.empty(shape.shape, dtype=torch.float64), generator)
    out, grads = run(op, tensors, backend, grad_out)
    out64, grads64 = run(op, [to_double(tensor) for tensor in tensors], "reference", grad_out)
    for actual, expected in zip((out, *grads), (out64, *grads64), strict=True):
        assert torch.equal(actual, expected.to(actual.dtype))
