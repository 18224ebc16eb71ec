"""Task vectors as they lie in a file: split-Rice blocks. docs/task_vector_format.md has the layout."""

import hashlib
import math
import struct
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from moe_kernels._checks import value_error

MAGIC = b"STVEC\0\1\0"
#: elements of a block
BLOCK = 4096
HEADER_BYTES = 128
#: after the payload: readers load whole words
SPARE_BYTES = 16
MAX_DIMS = 7
#: magic, numel, log2 block, blocks, scale, sigma, kind, crc, payload offset, nnz, base hash, ndim, dtype, shape
HEADER = struct.Struct("<8sQIIffIIQQQII7Q")


#: numbers of dtypes in a header
DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}
DTYPE_OF = {code: dtype for dtype, code in DTYPES.items()}
#: of the blocks' contents
TERNARY, VALUES, PATCH = 0, 1, 2


class Header(NamedTuple):
    """What the first bytes of packed data say, checked."""

    kind: int
    dtype: torch.dtype | None
    shape: torch.Size
    scale: float
    sigma: float
    nnz: int
    base_hash: int


def read_header(op: str, data: Tensor) -> Header:
    """Raises ValueError where ``data`` is not in the packed format of this version."""

    def damaged(actual: str) -> ValueError:
        return value_error(op, "data", "a packed task vector, version 1", actual, "call compress")

    if data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous():
        raise damaged(f"{list(data.shape)} {data.dtype}")
    if data.numel() < HEADER_BYTES or data.numel() % 64:
        raise damaged(f"{data.numel()} bytes")
    fields = HEADER.unpack(data[:HEADER_BYTES].cpu().numpy().tobytes())
    magic, numel, log2_block, num_blocks, scale, sigma, kind, _, payload, nnz, base_hash, ndim, code = fields[:13]
    if magic != MAGIC:
        raise damaged("a later version" if magic[:5] == MAGIC[:5] else "other bytes")
    if kind > PATCH:
        raise damaged(f"kind {kind}")
    dtype = DTYPE_OF.get(code)
    if kind == TERNARY and code != 0 or kind != TERNARY and dtype is None or kind == VALUES and dtype == torch.float64:
        raise damaged(f"kind {kind} of dtype {code}")
    dims = fields[13 : 13 + min(ndim, MAX_DIMS)]
    fits = ndim <= MAX_DIMS and all(dim < 2**43 for dim in dims) and math.prod(dims) == numel < 2**43
    fits = fits and log2_block == 12 and num_blocks == -(-numel // BLOCK) and math.isfinite(scale)
    if not fits or payload != _round_up(HEADER_BYTES + 8 * num_blocks) or data.numel() < payload + SPARE_BYTES:
        raise damaged("a damaged header or fewer bytes than it says")
    return Header(kind, dtype, torch.Size(dims), scale, sigma, nnz, base_hash)


P = TypeVar("P", bound="Packed")


class Packed:
    """What everything in the packed format has: ``data``, ``shape``, ``nnz`` and ``base_hash``."""

    data: Tensor
    shape: torch.Size
    nnz: int
    base_hash: int

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def density(self) -> float:
        """The part of elements that is not zero; of an empty tensor 0."""
        return self.nnz / self.numel if self.numel else 0.0

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    def to(self: P, device: torch.device | str) -> P:
        """The same on a device."""
        return replace(self, data=self.data.to(device))

    def fits(self, weight: Tensor) -> bool:
        """Whether the difference was taken from ``weight``, bit for bit, or from a base that was not recorded."""
        return self.shape == weight.shape and self.base_hash in (0, fingerprint(weight))


@dataclass(frozen=True, eq=False)
class PackedDelta(Packed):
    """A sparse task vector in the packed format: 0.36 bit a parameter at 5 % density, no pickle, a checksum.

    Made by :func:`moe_kernels.compress` or :meth:`from_bytes`; :func:`moe_kernels.apply_` reads it as it lies, and
    :func:`moe_kernels.decompress` makes bit planes of a ternary one. ``data`` says everything about itself: it is what
    a safetensors file holds under the weight's name.

    Attributes:
        data: [nbytes] uint8, contiguous.
        shape: of the tensor.
        scale: what one step of t is worth; as in :class:`~moe_kernels.TernaryDelta`.
        sigma: unbiased standard deviation of the differences before all but the largest were dropped (over all tensors
            of a global threshold); 0 where unknown.
        nnz: how many elements are not zero.
        base_hash: :func:`fingerprint` of the weight that the difference was taken from; 0: none, fits any.
        values: None where t is -1, 0 or 1. Else t is a number from -1 to 1, and this the dtype of its magnitude.
    """

    data: Tensor
    shape: torch.Size
    scale: float
    sigma: float
    nnz: int
    base_hash: int
    values: torch.dtype | None = None

    @staticmethod
    def from_bytes(data: Tensor) -> "PackedDelta":
        """The task vector that [nbytes] uint8 on the CPU holds; every byte is checked.

        Raises:
            ValueError: it is no packed task vector, of a later version, cut short or damaged.
        """
        from moe_kernels.ops.task_vector.api import check_packed

        packed = PackedDelta.from_header(data)
        check_packed(packed)
        return packed

    @staticmethod
    def from_header(data: Tensor) -> "PackedDelta":
        """As :meth:`from_bytes`, for bytes that were checked before: the header alone is read."""
        header = read_header("PackedDelta", data)
        if header.kind == PATCH:
            raise value_error("PackedDelta", "data", "a task vector", "a patch", "call Patch.from_bytes")
        return PackedDelta(data, header.shape, header.scale, header.sigma, header.nnz, header.base_hash, header.dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``scale * t`` in ``dtype``, rounded once.

        Raises:
            ValueError: the bytes are damaged.
        """
        from moe_kernels.ops.task_vector.api import decompress, read_packed

        if self.values is None:
            return decompress(self).dense(dtype)
        return (read_packed(self)[1].double() * self.scale).to(dtype)


def from_bytes(data: Tensor) -> Packed:
    """The task vector or the patch that [nbytes] uint8 on the CPU holds; every byte is checked.

    Raises:
        ValueError: it is neither, of a later version, cut short or damaged.
    """
    from moe_kernels.ops.task_vector.patch import Patch

    return (Patch if read_header("from_bytes", data).kind == PATCH else PackedDelta).from_bytes(data)


def fingerprint(tensor: Tensor) -> int:
    """BLAKE2b of 8 bytes over the elements in order, as a little-endian integer; never 0, which stands for none."""
    octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.blake2b(octets.numpy(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def signed(number: int) -> int:
    """The int64 of the same bits, which ops take."""
    return number - 2**64 if number >= 2**63 else number


def _round_up(count: int) -> int:
    return -(-count // 64) * 64
