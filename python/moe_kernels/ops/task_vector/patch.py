"""Lossless patches: a weight turned into another one and back, every bit of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_kernels._checks import FLOAT_DTYPES, check_same_device, check_tensor, dtype_error, shape_error, value_error
from moe_kernels._dispatch import Backend, resolve
from moe_kernels.ops.task_vector import native, reference
from moe_kernels.ops.task_vector.api import write_back
from moe_kernels.ops.task_vector.packed import MAX_DIMS, PATCH, Packed, fingerprint, read_header, signed


@dataclass(frozen=True, eq=False)
class Patch(Packed):
    """What turns the bits of one weight into those of another, in the packed format: made by :func:`make_patch`.

    It holds, for each element that changed, how many steps it goes in the order of floating-point numbers (-0 and 0 are
    two of them, NaN lie beyond infinity). An optimiser's step moves few bfloat16 weights, and most of these by one: a
    step of 3e-6 on weights of deviation 0.02 changes a tenth of them and costs 0.76 bit a parameter, 11 % above the
    entropy of independent steps.

    Attributes:
        data: [nbytes] uint8, contiguous; what a safetensors file holds under the weight's name.
        shape, dtype: of the weight.
        nnz: how many elements change.
        base_hash: :func:`fingerprint` of the weight that it starts from.
    """

    data: Tensor
    shape: torch.Size
    dtype: torch.dtype
    nnz: int
    base_hash: int

    @staticmethod
    def from_bytes(data: Tensor) -> "Patch":
        """The patch that [nbytes] uint8 on the CPU holds; every byte is checked.

        Raises:
            ValueError: it is no patch, of a later version, cut short or damaged.
        """
        patch = Patch.from_header(data)
        if not data.is_cpu:
            raise value_error("Patch", "data", "on the CPU", data.device)
        try:
            _kernels("Patch", "auto").check_patch(data)
        except RuntimeError as error:
            raise ValueError(str(error).split("\n")[0]) from None
        return patch

    @staticmethod
    def from_header(data: Tensor) -> "Patch":
        """As :meth:`from_bytes`, for bytes that were checked before: the header alone is read."""
        header = read_header("Patch", data)
        if header.kind != PATCH:
            raise value_error("Patch", "data", "a patch", "a task vector", "call PackedDelta.from_bytes")
        return Patch(data, header.shape, header.dtype, header.nnz, header.base_hash)


def make_patch(
    weight: Tensor | Mapping[str, Tensor], base: Tensor | Mapping[str, Tensor], *, backend: Backend = "auto"
) -> Patch | dict[str, Patch]:
    """The lossless difference of two weights of one shape and dtype: ``apply_patch_(base, patch)`` is ``weight``.

    Args:
        weight: float32, bfloat16, float16 or float64, any shape of up to 7 dimensions; or a state dict. Infinities and
            NaN are bits like others. Tensors of integers must be equal in both, and have no patch.
        base: what to start from.
        backend: see :mod:`moe_kernels`.

    Returns:
        The patch, or one for each name, on the CPU.
    """
    op = "make_patch"
    if isinstance(weight, Mapping):
        if not isinstance(base, Mapping):
            raise TypeError(f"{op}: base must be a state dict like weight, got {type(base).__name__}")
        lone = sorted(weight.keys() ^ base.keys())
        if lone:
            raise value_error(op, "base", "of the same names as weight", f"in one alone: {', '.join(lone[:8])}")
        patches = {}
        for name, tensor in weight.items():
            if tensor.is_floating_point():
                patches[name] = _make(op, name, tensor, base[name], backend)
            elif not torch.equal(tensor, base[name]):
                raise value_error(
                    op, name, "equal in weight and base", f"other values of {tensor.dtype}", "leave it out"
                )
        return patches
    return _make(op, "weight", weight, base, backend)


def _make(op: str, name: str, weight: Tensor, base: Tensor, backend: Backend) -> Patch:
    check_tensor(op, name, weight)
    check_tensor(op, f"base of {name}", base)
    if weight.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, name, FLOAT_DTYPES, weight)
    if base.dtype != weight.dtype:
        raise dtype_error(op, f"base of {name}", weight.dtype, base)
    if base.shape != weight.shape:
        raise shape_error(op, f"base of {name}", str(list(weight.shape)), base)
    if weight.dim() > MAX_DIMS:
        raise shape_error(op, name, f"at most {MAX_DIMS} dimensions", weight)
    tensors = [tensor.detach().cpu().contiguous() for tensor in (weight, base)]
    return Patch.from_header(_kernels(op, backend).make_patch(*tensors, list(weight.shape), signed(fingerprint(base))))


def apply_patch_(weight: Tensor, patch: Patch, *, backend: Backend = "auto") -> None:
    """Turns the weight that a patch starts from into the one that it leads to, in place.

    On another weight it would lead to one that nobody meant; ``patch.fits(weight)`` says whether it is the right one
    (it reads all of the weight, so it is the caller's to ask).

    Args:
        weight: of the patch's shape and dtype. It may require gradients: it is changed as by an optimiser. On the CPU a
            block of 4096 elements at a time, elsewhere in a copy on the host.
        patch: what :func:`make_patch` gave.
        backend: see :mod:`moe_kernels`.
    """
    _move("apply_patch_", weight, patch, False, backend)


def unapply_patch_(weight: Tensor, patch: Patch, *, backend: Backend = "auto") -> None:
    """Takes back :func:`apply_patch_`, to the last bit. Nothing but the patch is needed for it."""
    _move("unapply_patch_", weight, patch, True, backend)


def part_of_patch(patch: Patch, take: Callable[[Tensor], Tensor]) -> Patch:
    """What moves a part of a weight as ``patch`` moves the whole.

    Args:
        patch: unpacked for a moment, twice as large as the whole weight.
        take: cuts the part out of a tensor of the weight's shape; called on ``patch``'s device.
    """
    # steps add up modulo the number of bit patterns, so those from zero are the patch's own
    zero = torch.zeros(patch.shape, dtype=patch.dtype, device=patch.device)
    moved = zero.clone()
    apply_patch_(moved, patch)
    return replace(make_patch(take(moved), take(zero)), base_hash=0).to(patch.device)


def _kernels(op: str, backend: Backend):
    """Bytes are made and read on the host, whatever the device."""
    return reference if resolve(op, backend, "cpu") == "reference" else native


def _move(op: str, weight: Tensor, patch: Patch, back: bool, backend: Backend) -> None:
    check_tensor(op, "weight", weight)
    if not isinstance(patch, Patch):
        raise TypeError(f"{op}: patch must be a Patch, got {type(patch).__name__}; call make_patch first")
    if weight.shape != patch.shape:
        raise shape_error(op, "weight", str(list(patch.shape)), weight, "the patch is of another tensor")
    if weight.dtype != patch.dtype:
        raise dtype_error(op, "weight", patch.dtype, weight, "the patch is of another tensor")
    check_same_device(op, weight=weight, patch=patch.data)
    with torch.no_grad():
        target = weight.detach()
        work = target.cpu().contiguous()
        _kernels(op, backend).apply_patch(work, patch.data.cpu(), back)
        write_back(weight, target, work)
