"""The Triton kernel that makes bit planes of packed ternary task vectors: a program for each block of 4096 elements.

docs/task_vector_format.md has the layout. What a processor does one code after the other is done for 512 bits of the
unary part at once: the ones among them are counted by a scan, the gaps' low parts are read at random and summed by
another, and each position sets its bit by an atomic: no other element has that bit, so their order does not matter.
Signs that lie apart from the positions are ranked by a scan over the block. Whatever the bytes are, nothing outside of
them is read; a block that is none is reported.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_kernels.ops.task_vector.packed import BLOCK, HEADER_BYTES, SPARE_BYTES

BITS = 512  # of the unary part at once


@triton.jit
def _bit(bytes_ptr, at, limit, wanted):
    """Bits of a string of `limit` bits; 0 outside."""
    octet = tl.load(bytes_ptr + at // 8, mask=wanted & (at >= 0) & (at < limit), other=0).to(tl.int32)
    return (octet >> (at % 8).to(tl.int32)) & 1


@triton.jit
def _field(bytes_ptr, at, width, limit, wanted):
    """`width` <= 12 bits from any bit on."""
    value = tl.zeros(at.shape, tl.int32)
    for i in tl.static_range(3):  # an octet at a time: fields begin anywhere
        octet = tl.load(bytes_ptr + at // 8 + i, mask=wanted & (at // 8 + i < limit // 8), other=0)
        value |= octet.to(tl.int32) << (8 * i)
    return (value >> (at % 8).to(tl.int32)) & ((1 << width) - 1)


@triton.jit
def _set_bits(planes_ptr, positions, plane, wanted):
    """Of a block's planes as int32: [groups, nonzero low, high, negative low, high]."""
    at = planes_ptr + positions // 64 * 4 + 2 * plane + positions // 32 % 2
    tl.atomic_or(at, tl.full(positions.shape, 1, tl.int32) << (positions % 32), mask=wanted, sem="relaxed")


@triton.jit
def _unpack_kernel(
    packed_ptr,  # uint8
    planes_ptr,  # [num_groups, 4] int32, zero
    counts_ptr,  # [num_blocks]: what the descriptors say, -1 of a damaged block
    payload,  # offset in bytes
    payload_bytes,
    numel,
    HEADER_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    words = (packed_ptr + HEADER_BYTES).to(tl.pointer_type(tl.int64))
    descriptor = tl.load(words + block)
    offset = (descriptor & 0x3FFFFFFFF) * 4
    count = ((descriptor >> 34) & 0x7FFF).to(tl.int32)
    mode = ((descriptor >> 49) & 7).to(tl.int32)
    k = ((descriptor >> 52) & 15).to(tl.int32)
    size = tl.minimum(numel - block * BLOCK, BLOCK).to(tl.int32)
    whole = (descriptor >> 56 == 0) & (offset <= payload_bytes) & (count <= size) & (k <= 11) & (mode <= 4)
    whole &= (mode != 0) | (count == 0)
    bytes_ptr = packed_ptr + payload + tl.where(whole, offset, 0)
    limit = tl.where(whole, (payload_bytes - offset) * 8, 0)
    planes = planes_ptr + block * (BLOCK // 16)
    signs_at = tl.zeros((), tl.int64)  # where signs begin that lie apart
    if (mode == 1) | (mode == 4):
        number = tl.where(mode == 1, count, size - count)
        width = k + tl.where(mode == 1, 1, 0)
        whole &= number > 0
        unary = number.to(tl.int64) * width
        whole &= unary < limit
        # all high parts sum to less than a block's elements
        most = tl.where(whole, number + (BLOCK >> k) + 1, 0)
        before = tl.zeros((), tl.int32)  # ones, in the chunks that are done
        low_before = tl.zeros((), tl.int32)
        end = unary
        for first in range(0, most, BITS):
            index = first + tl.arange(0, BITS)
            bits = _bit(bytes_ptr, unary + index, limit, index < most)
            rank = before + tl.cumsum(bits, 0) - bits
            coded = (bits != 0) & (rank < number)
            field = _field(bytes_ptr, rank.to(tl.int64) * width, width, limit, coded)
            low = tl.where(coded, tl.where(mode == 1, field >> 1, field), 0)
            position = ((index - rank) << k) + low_before + tl.cumsum(low, 0) + rank
            inside = coded & (position >= 0) & (position < size)
            whole &= tl.sum((coded & (position >= size)).to(tl.int32), 0) == 0
            _set_bits(planes, position, 0, inside)
            if mode == 1:
                _set_bits(planes, position, 1, inside & (field % 2 == 1))
            end = tl.maximum(end, unary + tl.max(tl.where(coded, index + 1, 0), 0))
            before += tl.sum(bits, 0)
            low_before += tl.sum(low, 0)
        whole &= before >= number
        signs_at = end
    if mode == 2:
        signs_at = tl.cast(size, tl.int64)
    if (mode == 2) | (mode == 3) | (mode == 4):
        whole &= signs_at + count <= limit
        tl.debug_barrier()  # what other warps have set
        elements = tl.arange(0, BLOCK)
        exists = elements < size
        stored = tl.load(planes + elements // 64 * 4 + elements // 32 % 2, mask=exists, other=0)
        zeros = (stored >> (elements % 32)) & 1
        nonzero = tl.where(mode == 4, 1 - zeros, 1)
        if mode == 2:
            nonzero = _bit(bytes_ptr, elements.to(tl.int64), limit, exists)
        nonzero = tl.where(exists, nonzero, 0)
        whole &= tl.sum(nonzero, 0) == count
        sign = _bit(bytes_ptr, signs_at + tl.cumsum(nonzero, 0) - nonzero, limit, nonzero != 0)
        shifts = tl.arange(0, 32)[None, :]
        # bits of 32 elements never meet: their sum is the word
        nonzero_words = tl.sum(tl.reshape(nonzero, (BLOCK // 32, 32)) << shifts, 1)
        sign_words = tl.sum(tl.reshape(sign, (BLOCK // 32, 32)) << shifts, 1)
        tl.debug_barrier()
        halves = tl.arange(0, BLOCK // 32)
        at = planes + halves // 2 * 4 + halves % 2
        there = halves // 2 < tl.cdiv(size, 64)
        tl.store(at, nonzero_words, mask=there)
        tl.store(at + 2, sign_words, mask=there)
    tl.store(counts_ptr + block, tl.where(whole, count, -1))


def unpack_ternary(data: Tensor, numel: int, nnz: int) -> Tensor:
    """Planes of packed bytes whose header was read (:class:`PackedDelta`). The host waits for the device once.

    The checksum was looked at when the bytes were read on the CPU (:meth:`PackedDelta.from_bytes`), and is not again.

    Raises:
        RuntimeError: a block is damaged.
    """
    if data.data_ptr() % 16:  # part of other bytes: a copy has the alignment that the format counts on
        data = data.clone()
    num_blocks = triton.cdiv(numel, BLOCK)
    planes = torch.zeros(triton.cdiv(numel, 64), 2, dtype=torch.int64, device=data.device)
    if num_blocks == 0:
        return planes
    counts = torch.zeros(num_blocks, dtype=torch.int64, device=data.device)
    payload = triton.cdiv(HEADER_BYTES + 8 * num_blocks, 64) * 64
    with torch.cuda.device_of(data):
        _unpack_kernel[(num_blocks,)](
            data, planes.view(torch.int32), counts, payload, data.numel() - payload - SPARE_BYTES, numel,
            HEADER_BYTES=HEADER_BYTES, BLOCK=BLOCK, BITS=BITS, num_warps=4,
        )  # fmt: skip
    found = torch.stack([counts.clamp(min=0).sum(), (counts < 0).sum()]).tolist()
    if found != [nnz, 0]:
        damaged = int((counts < 0).nonzero()[0]) if found[1] else -1
        raise RuntimeError(f"decompress: block {damaged} of the packed task vector is damaged")
    return planes
