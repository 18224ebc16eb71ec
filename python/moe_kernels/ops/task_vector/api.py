"""What is done with task vectors: :func:`apply_`, :func:`unapply_`, :func:`decompress`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels._checks import FLOAT_DTYPES, check_same_device, check_tensor, dtype_error, shape_error, value_error
from moe_kernels._dispatch import Backend, resolve
from moe_kernels.ops.task_vector import native, reference
from moe_kernels.ops.task_vector.packed import PackedDelta
from moe_kernels.ops.task_vector.ternary import TernaryDelta, popcount


@dataclass(eq=False)
class Undo:
    """What :func:`apply_` kept so that :func:`unapply_` can restore a weight to the last bit.

    Two bits for each element that a task vector touches, and the few weights that arithmetic cannot find again. The
    task vectors are held, not copied: they must stay as they are.

    Attributes:
        deltas: the task vectors that were added.
        values: of ``t = 1`` of each.
        parts: the tensors, as ``apply_ternary_undoable`` (or the reference) gives them.
        version: generation of the weight, PyTorch's own count of its in-place changes; None for a weight of inference
            mode, which has none.
    """

    deltas: tuple[TernaryDelta | PackedDelta, ...]
    values: tuple[float, ...]
    parts: tuple[Tensor, ...]
    version: int | None

    @property
    def nbytes(self) -> int:
        """Memory beyond the task vectors', in bytes."""
        return sum(part.numel() * part.element_size() for part in self.parts)


def apply_(
    weight: Tensor,
    deltas: TernaryDelta | PackedDelta | Sequence[TernaryDelta | PackedDelta],
    coefficients: float | Sequence[float] = 1.0,
    *,
    undo: bool = False,
    backend: Backend = "auto",
) -> Undo | None:
    """Adds task vectors to a weight in place, all of them in one pass with one rounding.

    ``weight = round(weight + s)`` with ``s = sum_i value_i * t_i`` and ``value_i = coefficient_i * delta_i.scale``,
    where any ``t_i`` is not zero. Sums run in the order of ``deltas`` in float32 (float64 for float64 weights), in
    which ``value_i`` is rounded once, and each product where t is no sign; ``s`` is added last. All backends give the
    same bits. Elements that no vector touches, and NaN, keep their bits.

    Args:
        weight: any shape, float32, bfloat16, float16 or float64. It may require gradients: it is changed as by an
            optimiser, outside of autograd. Weights that are not contiguous go through a contiguous copy.
        deltas: task vectors of the weight's shape, on its device. Packed ones are decoded on the way, a block of 4096
            elements at a time on the CPU; on a GPU their planes are made first, and the host waits for whether all
            blocks are whole. The CUDA kernels take up to 64.
            Vectors of values have kernels on the CPU; on a GPU the reference adds them.
        coefficients: one for each, or one for all (ComPEFT's alpha, task arithmetic's lambda); may be negative.
        undo: whether to keep what :func:`unapply_` needs. On CUDA the host then waits for the device twice, for sizes.
        backend: see :mod:`moe_kernels`.

    Returns:
        The :class:`Undo`, or None where ``undo`` is false.

    Sources: ComPEFT (arXiv 2311.13171) for ternary task vectors; task arithmetic (arXiv 2212.04089).
    """
    op = "apply_"
    deltas, values = _check(op, weight, deltas, coefficients)
    if not deltas:
        return Undo((), (), (), _version(weight)) if undo else None
    parts: tuple[Tensor, ...] | None = None
    with torch.no_grad():
        target = weight.detach()
        work = target.contiguous()
        backend = resolve(_named(op, deltas), backend, weight.device.type)
        if backend == "reference":
            if undo:
                parts = reference.apply_undoable_(work, _planes(deltas), values)
            else:
                reference.apply_(work, _planes(deltas), values)
        elif undo:
            parts = _kernels(backend).apply_ternary_undoable(work, _tensors(deltas, backend), values)
        else:
            _kernels(backend).apply_ternary(work, _tensors(deltas, backend), values)
        write_back(weight, target, work)
    return Undo(tuple(deltas), tuple(values), parts, _version(weight)) if undo else None


def unapply_(weight: Tensor, undo: Undo, *, backend: Backend = "auto") -> None:
    """Takes back what :func:`apply_` added: every bit of the weight is as it was before.

    Args:
        weight: as :func:`apply_` left it.
        undo: what it returned with ``undo=True``.
        backend: the one that applied, or any other of the same kind (the reference keeps other tensors).

    Raises:
        RuntimeError: the weight was changed in place since, or was already taken back; it is left alone.
    """
    op = "unapply_"
    check_tensor(op, "weight", weight)
    if not isinstance(undo, Undo):
        raise TypeError(f"{op}: undo must be what apply_ returned with undo=True, got {type(undo).__name__}")
    if undo.version != _version(weight):
        raise RuntimeError(
            f"{op}: the weight was changed since apply_ (version {_version(weight)}, expected {undo.version}); nothing "
            "was taken back. Undo in reverse order, or add several task vectors in one call"
        )
    if not undo.deltas:
        return
    _check(op, weight, undo.deltas, 1.0)
    with torch.no_grad():
        target = weight.detach()
        work = target.contiguous()
        if len(undo.parts) == 2:
            reference.unapply_(work, _planes(undo.deltas), undo.values, *undo.parts)
        elif (backend := resolve(_named(op, undo.deltas), backend, weight.device.type)) == "reference":
            raise value_error(op, "backend", "that of apply_", "reference")
        else:
            _kernels(backend).unapply_ternary(work, _tensors(undo.deltas, backend), undo.values, *undo.parts)
        write_back(weight, target, work)


def decompress(
    packed: PackedDelta | Mapping[str, PackedDelta], *, backend: Backend = "auto"
) -> TernaryDelta | dict[str, TernaryDelta]:
    """Bit planes of a packed ternary task vector, or of each one of a state dict: 2 bits a parameter, fast to use.

    On a GPU the kernels read the blocks where they lie, and the host waits for the device: once, and in CUDA for the
    header too. The checksum, which was looked at when the bytes were read (:meth:`PackedDelta.from_bytes`), is not
    looked at again.

    Raises:
        ValueError: the bytes are damaged, or t is no sign: of those there is ``packed.dense()``.
    """
    if isinstance(packed, Mapping):
        return {name: decompress(one, backend=backend) for name, one in packed.items()}
    if not isinstance(packed, PackedDelta):
        raise TypeError(f"decompress: packed must be a PackedDelta, got {type(packed).__name__}; call compress first")
    if packed.values is not None:
        raise value_error("decompress", "packed", "ternary", f"values in {packed.values}", "call packed.dense()")
    return TernaryDelta(read_packed(packed, backend)[0], packed.shape, packed.scale)


class Overlap(NamedTuple):
    """How far two ternary task vectors agree, counted in elements.

    Attributes:
        both: not zero in both.
        agree: of those, of one sign.
        cosine: of the two vectors; 0 where one of them is zero everywhere.
    """

    both: int
    agree: int
    cosine: float


Ternary = TernaryDelta | PackedDelta


def compare(first: Ternary | Mapping[str, Ternary], second: Ternary | Mapping[str, Ternary]) -> Overlap:
    """Overlap, sign conflicts and cosine of two ternary task vectors, from their bit planes alone.

    ``cosine = (agree - disagree) / sqrt(nnz_first * nnz_second)``; scales cancel. Of two state dicts: of the tensors
    that both have, as one vector.

    Raises:
        ValueError: shapes that differ, or a task vector whose t is no sign.
    """
    op = "compare"
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        pairs = [(first[name], second[name], name) for name in first if name in second]
    else:
        pairs = [(first, second, "second")]
    both = agree = first_nnz = second_nnz = 0
    for one, other, name in pairs:
        one, other = _ternary(op, one), _ternary(op, other)
        if one.shape != other.shape:
            raise value_error(op, name, f"of shape {list(one.shape)}", list(other.shape))
        check_same_device(op, first=one.planes, second=other.planes)
        shared = one.planes[:, 0] & other.planes[:, 0]
        count = int(popcount(shared).sum())
        both += count
        agree += count - int(popcount(shared & (one.planes[:, 1] ^ other.planes[:, 1])).sum())
        first_nnz, second_nnz = first_nnz + one.nnz, second_nnz + other.nnz
    norm = math.sqrt(first_nnz * second_nnz)
    return Overlap(both, agree, (2 * agree - both) / norm if norm else 0.0)


def _ternary(op: str, delta) -> TernaryDelta:
    if not isinstance(delta, (TernaryDelta, PackedDelta)):
        expected = "task vectors, or two state dicts of them"
        raise TypeError(f"{op}: first and second must be {expected}, got {type(delta).__name__}; call compress")
    return decompress(delta) if isinstance(delta, PackedDelta) else delta


def check_packed(packed: PackedDelta) -> None:
    """Reads all of it, on the host, which sums up the checksum. Raises ValueError where it is damaged."""
    read_packed(packed.to("cpu"))


def read_packed(packed: PackedDelta, backend: Backend = "auto") -> tuple[Tensor, Tensor | None]:
    """Planes, and t in float32 where it is no sign.

    Raises:
        ValueError: the bytes are damaged.
    """
    backend = resolve("decompress", backend, packed.device.type)
    # what only the CPU reads is read there
    on_host = backend == "reference" or packed.values is not None
    data = packed.data.cpu() if on_host else packed.data
    kernels = reference if backend == "reference" else native
    try:
        if packed.values is not None:
            planes, t = kernels.unpack_values(data)
            return planes.to(packed.device), t.view(packed.shape).to(packed.device)
        if backend == "triton":
            from moe_kernels.ops.task_vector import unpack_triton  # imported when it is first asked for

            return unpack_triton.unpack_ternary(data, packed.numel, packed.nnz), None
        return kernels.unpack_ternary(data).to(packed.device), None
    except RuntimeError as error:
        raise ValueError(str(error).split("\n")[0]) from None


def _check(op: str, weight: Tensor, deltas, coefficients) -> tuple[list[TernaryDelta], list[float]]:
    check_tensor(op, "weight", weight)
    if weight.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, "weight", FLOAT_DTYPES, weight)
    deltas = [deltas] if isinstance(deltas, (TernaryDelta, PackedDelta)) else list(deltas)
    for delta in deltas:
        if not isinstance(delta, (TernaryDelta, PackedDelta)):
            expected = "TernaryDelta or PackedDelta"
            raise TypeError(f"{op}: deltas must be {expected}, got {type(delta).__name__}; call compress first")
        if delta.shape != weight.shape:
            raise shape_error(op, "weight", str(list(delta.shape)), weight, "the task vector is of another tensor")
    check_same_device(op, weight=weight, **{f"deltas[{i}]": _tensor(delta) for i, delta in enumerate(deltas)})
    given = (
        [float(coefficients)] * len(deltas) if isinstance(coefficients, (int, float)) else [*map(float, coefficients)]
    )
    if len(given) != len(deltas):
        raise value_error(op, "coefficients", f"one number or {len(deltas)}, one a delta", f"{len(given)}")
    values = [coefficient * delta.scale for coefficient, delta in zip(given, deltas, strict=True)]
    dtype = reference.accumulator(weight.dtype)
    # the largest sum is below infinity: no s is NaN
    if not sum(map(abs, values)) <= torch.finfo(dtype).max:
        raise value_error(op, "coefficients", f"such that the sum of |coefficient * scale| is finite in {dtype}", given)
    return deltas, values if dtype == torch.float64 else torch.tensor(values, dtype=dtype).tolist()


def _tensor(delta: TernaryDelta | PackedDelta) -> Tensor:
    return delta.data if isinstance(delta, PackedDelta) else delta.planes


def _named(op: str, deltas) -> str:
    """What :func:`resolve` knows the op as: vectors of values have kernels on the CPU alone."""
    has_values = any(isinstance(delta, PackedDelta) and delta.values is not None for delta in deltas)
    return f"{op} of values" if has_values else op


def _kernels(backend: str):
    """The module whose functions run: native, or their Triton twins, which are imported when first asked for."""
    if backend == "native":
        return native
    from moe_kernels.ops.task_vector import triton

    return triton


def _tensors(deltas, backend: str) -> list[Tensor]:
    """What the kernels take: Triton's only planes."""
    return [_tensor(delta) for delta in (deltas if backend == "native" else _planes(deltas))]


def _planes(deltas) -> list[TernaryDelta | PackedDelta]:
    """Packed vectors of signs as planes."""
    return [decompress(d) if isinstance(d, PackedDelta) and d.values is None else d for d in deltas]


def _version(weight: Tensor) -> int | None:
    return None if weight.is_inference() else weight._version


def write_back(weight: Tensor, target: Tensor, work: Tensor) -> None:
    """``work``, which is ``target`` or a copy of it that was changed, becomes the weight; PyTorch counts one change."""
    if work.data_ptr() != target.data_ptr():
        target.copy_(work)
    elif not weight.is_inference():
        torch.autograd.graph.increment_version(weight)
