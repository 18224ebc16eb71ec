"""Ternary task vectors as they lie in a file: split-Rice blocks. docs/task_vector_format.md has the layout."""

import hashlib
import math
import struct
from dataclasses import dataclass

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
#: magic, numel, log2 block, blocks, scale, sigma, kind, crc, payload offset, nnz, base hash, ndim, reserved, shape
HEADER = struct.Struct("<8sQIIffIIQQQII7Q")


@dataclass(frozen=True, eq=False)
class PackedDelta:
    """A ternary task vector in the packed format: 0.36 bit a parameter at 5 % density, no pickle, a checksum.

    Made by :func:`moe_kernels.compress` or :meth:`from_bytes`; :func:`moe_kernels.apply_` reads it as it lies, and
    :func:`moe_kernels.decompress` makes bit planes of it. ``data`` says everything about itself: it is what a
    safetensors file holds under the weight's name.

    Attributes:
        data: [nbytes] uint8, contiguous.
        shape: of the tensor.
        scale: what one step of t is worth; as in :class:`~moe_kernels.TernaryDelta`.
        sigma: unbiased standard deviation of the differences before all but the largest were dropped (over all tensors
            of a global threshold); 0 where unknown.
        nnz: how many elements are not zero.
        base_hash: :func:`fingerprint` of the weight that the difference was taken from; 0: none, fits any.
    """

    data: Tensor
    shape: torch.Size
    scale: float
    sigma: float
    nnz: int
    base_hash: int

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

        def damaged(actual: str) -> ValueError:
            return value_error("PackedDelta", "data", "a packed task vector, version 1", actual, "call compress")

        if data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous():
            raise damaged(f"{list(data.shape)} {data.dtype}")
        if data.numel() < HEADER_BYTES or data.numel() % 64:
            raise damaged(f"{data.numel()} bytes")
        fields = HEADER.unpack(data[:HEADER_BYTES].cpu().numpy().tobytes())
        magic, numel, log2_block, num_blocks, scale, sigma, kind, _, payload, nnz, base_hash, ndim, _ = fields[:13]
        if magic != MAGIC:
            raise damaged("a later version" if magic[:5] == MAGIC[:5] else "other bytes")
        if kind != 0:
            raise damaged(f"kind {kind}")
        dims = fields[13 : 13 + min(ndim, MAX_DIMS)]
        fits = ndim <= MAX_DIMS and all(dim < 2**43 for dim in dims) and math.prod(dims) == numel < 2**43
        fits = fits and log2_block == 12 and num_blocks == -(-numel // BLOCK) and math.isfinite(scale)
        if not fits or payload != _round_up(HEADER_BYTES + 8 * num_blocks) or data.numel() < payload + SPARE_BYTES:
            raise damaged("a damaged header or fewer bytes than it says")
        return PackedDelta(data, torch.Size(dims), scale, sigma, nnz, base_hash)

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

    def to(self, device: torch.device | str) -> "PackedDelta":
        """The same task vector on a device."""
        return PackedDelta(self.data.to(device), self.shape, self.scale, self.sigma, self.nnz, self.base_hash)

    def fits(self, weight: Tensor) -> bool:
        """Whether the difference was taken from ``weight``, bit for bit, or from a base that was not recorded."""
        return self.shape == weight.shape and self.base_hash in (0, fingerprint(weight))


def fingerprint(tensor: Tensor) -> int:
    """BLAKE2b of 8 bytes over the elements in order, as a little-endian integer; never 0, which stands for none."""
    octets = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.blake2b(octets.numpy(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _round_up(count: int) -> int:
    return -(-count // 64) * 64
