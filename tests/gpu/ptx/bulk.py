"""Bulk and tensor copies (TMA) between global and shared memory.

A copy into shared memory lands when somebody has polled its mbarrier in vain; a copy out of it reads when its group is
waited for, and writes then. A tensor map is one of this module's :class:`TensorMap` objects, not the driver's bits.

Source: PTX ISA 9.0, chapters 5.5 (tensors) and 9.7.9.27 (bulk copies).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .compiler import GLOBAL_BASE, PARAM_BASE, WINDOW, Fault, naming
from .counters import SECTOR
from .mbarriers import complete_bytes, find, shared_offset
from .parser import PtxError
from .wgmma import swizzle

_MAGIC = b"tensormp"


@dataclass(eq=False)
class TensorMap:
    """What ``cuTensorMapEncodeTiled`` would make: a tensor, the box that one copy moves, and the swizzle.

    Args:
        tensor: [..., inner]; the innermost dimension is contiguous, other strides are multiples of 16 bytes.
        box: sizes of the box in the tensor's order of dimensions, each at most 256.
        swizzle: 0, 32, 64 or 128 bytes; the box's inner size must fit into it.
    """

    tensor: object
    box: tuple[int, ...]
    swizzle: int = 0

    def __post_init__(self):
        tensor, item = self.tensor, self.tensor.element_size()
        if tensor.stride(-1) != 1 or any(stride * item % 16 for stride in tensor.stride()[:-1]):
            raise ValueError("TensorMap: strides must be 1 inside and multiples of 16 bytes outside")
        if tensor.data_ptr() % 16 or tensor.dim() != len(self.box) or max(self.box) > 256:
            raise ValueError("TensorMap: the tensor must be 16-byte aligned and the box within 256 of each dimension")
        if self.swizzle and self.box[-1] * item > self.swizzle:
            raise ValueError(f"TensorMap: {self.box[-1] * item} bytes inside do not fit a {self.swizzle}-byte swizzle")
        if self.box[-1] * item % 16:
            raise ValueError("TensorMap: the inner size of the box must be a multiple of 16 bytes")

    def encode_for(self, launch) -> bytes:
        self.address = launch.memory.add(self.tensor) - GLOBAL_BASE
        launch.tensor_maps.append(self)
        return _MAGIC + (len(launch.tensor_maps) - 1).to_bytes(8, "little") + bytes(112)

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.tensor.element_size()

    def places(self, coordinates: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Global offsets of the box's elements, in shared-memory order, and which lie in the tensor.

        ``coordinates`` are innermost first, as PTX has them.
        """
        item = self.tensor.element_size()
        total, inside = np.zeros((1,) * len(self.box), np.int64), np.ones((1,) * len(self.box), np.bool_)
        for axis, first in enumerate(reversed(coordinates)):
            shape = [1] * len(self.box)
            shape[axis] = -1
            index = (np.arange(self.box[axis]) + first).reshape(shape)
            total = total + index * self.tensor.stride(axis) * item
            inside = inside & (index >= 0) & (index < self.tensor.shape[axis])
        return (total + self.address).ravel(), inside.ravel()


def _tensor_map(m, address: int, thread: int) -> TensorMap:
    if PARAM_BASE <= address < PARAM_BASE + WINDOW:
        memory, offset = m.parameters, address - PARAM_BASE
    else:
        memory, offset = m.global_memory, address - GLOBAL_BASE
    raw = memory.data[offset : offset + 16].tobytes() if 0 <= offset <= memory.size - 16 else b""
    if raw[:8] != _MAGIC:
        raise Fault("tensor map", f"no tensor map at {address:#x}", np.array([thread]))
    return m.launch.tensor_maps[int.from_bytes(raw[8:], "little")]


def _count(m, offsets: np.ndarray, item: int, write: bool) -> None:
    sectors = np.unique(offsets // SECTOR)
    if write:
        m.counters.write_bytes += len(offsets) * item
        m.counters.write_sectors += len(sectors)
        m.launch.sectors_written[sectors] = True
    else:
        m.counters.read_bytes += len(offsets) * item
        m.counters.read_sectors += len(sectors)
        m.launch.sectors_read[sectors] = True


def build_bulk(ins, c):
    if ins.has("commit_group"):

        def commit(m, i):
            m.bulk_group[i] += 1

        return commit
    if ins.has("wait_group"):
        keep, only_read = ins.operands[0].value, "read" in ins.flags
        return lambda m, i: finish_bulk(m, m.ids[i], keep, only_read)
    if ins.has("im2col", "prefetch", "multicast::cluster", "reduce", "gather4", "tile::gather4", "tile::scatter4"):
        raise PtxError(f"line {ins.line}: {ins.opcode} is not read by this bench")
    into_shared = next(part for part in ins.parts if part in ("global", "shared::cta", "shared::cluster")) != "global"
    if "tensor" in ins.flags:
        return _tensor_load(ins, c) if into_shared else _tensor_store(ins, c)
    return _plain_load(ins, c) if into_shared else _plain_store(ins, c)


def _each(m, i, *arrays):
    ids = m.ids[i]
    return zip(ids.tolist(), *(np.broadcast_to(array, len(ids)).tolist() for array in arrays), strict=True)


def _land(m, thread: int, flat: np.ndarray, raw: np.ndarray, chunks: np.ndarray, barrier_offset: int) -> None:
    """Starts a copy of ``raw`` to flat shared bytes; it lands when the mbarrier is polled."""
    one = np.full(len(chunks), thread)
    granules = m.shadow.start_copy(chunks, one, m.warp_of[one], 16, by_engine=True)
    m.shared.poison(flat)
    barrier = find(m, thread, barrier_offset)
    block = int(m.block_of[thread])

    def land():
        m.shared.data[flat] = raw
        clock = m.shadow.finish_engine_copy(granules, block)
        complete_bytes(m, barrier, len(flat), clock)

    barrier.landing.append(land)


def _shared_bytes(m, thread: int, offset: int, size: int, width: int, write: bool) -> tuple[np.ndarray, np.ndarray]:
    """Flat places of ``size`` bytes from ``offset``, swizzled, and those of their 16-byte chunks."""
    block = int(m.block_of[thread])
    chunks = offset + np.arange(0, size, 16)
    chunks = swizzle(chunks, width) if width else chunks
    window = np.full(len(chunks), block)
    with naming(np.full(len(chunks), thread)):
        if write:
            m.shared.store(chunks, window, np.full((len(chunks), 2), 2**64 - 1, np.uint64), 8)
        else:
            m.shared.load(chunks, window, 8, 2)
    flat = chunks + block * m.shared.stride
    return (flat[:, None] + np.arange(16)).ravel()[:size], flat


def _aligned(offset: int, align: int, thread: int) -> None:
    if offset % align:
        raise Fault(
            "misaligned", f"shared offset {offset:#x} of a copy must be a multiple of {align}", np.array([thread])
        )


def _tensor_load(ins, c):
    to, source, signal = (c.address(operand) for operand in ins.operands[:3])
    coordinates = [c.read(item, "s32") for item in ins.operands[1].extra[0].items]

    def run(m, i):
        position = [np.broadcast_to(read(m, i), m.count(i)) for read in coordinates]
        for at, (thread, offset, address, barrier) in enumerate(
            _each(m, i, shared_offset(to(m, i)), source(m, i), shared_offset(signal(m, i)))
        ):
            tensor_map = _tensor_map(m, address, thread)
            _aligned(offset, 128, thread)
            places, inside = tensor_map.places([int(axis[at]) for axis in position])
            item = tensor_map.tensor.element_size()
            values = np.zeros((len(places), item), np.uint8)
            values[inside] = m.global_memory.load(places[inside], None, item).view(np.uint8)
            _count(m, places[inside], item, False)
            flat, chunks = _shared_bytes(m, thread, offset, tensor_map.bytes, tensor_map.swizzle, True)
            _land(m, thread, flat, values.ravel(), chunks, barrier)

    return run


def _plain_load(ins, c):
    to, source, signal = c.address(ins.operands[0]), c.address(ins.operands[1]), c.address(ins.operands[3])
    size = c.read(ins.operands[2], "u32")

    def run(m, i):
        for thread, offset, address, count, barrier in _each(
            m, i, shared_offset(to(m, i)), source(m, i), size(m, i), shared_offset(signal(m, i))
        ):
            _aligned(offset | count | address, 16, thread)
            places = address - GLOBAL_BASE + np.arange(count)
            with naming(np.full(count, thread)):
                raw = m.global_memory.load(places, None, 1)[:, 0]
            _count(m, places, 1, False)
            flat, chunks = _shared_bytes(m, thread, offset, count, 0, True)
            _land(m, thread, flat, raw, chunks, barrier)

    return run


def _send(m, thread: int, flat, chunks, write) -> None:
    one = np.full(len(chunks), thread)
    granules = m.shadow.granules(chunks, 16)
    m.shadow.start_async_read(granules, one, m.warp_of[one])
    group = int(m.bulk_group[thread])
    m.bulk_copies.append(
        dict(thread=thread, group=group, flat=flat, granules=granules, write=write, raw=None, line=m.line)
    )


def _tensor_store(ins, c):
    to, source = c.address(ins.operands[0]), c.address(ins.operands[1])
    coordinates = [c.read(item, "s32") for item in ins.operands[0].extra[0].items]

    def run(m, i):
        position = [np.broadcast_to(read(m, i), m.count(i)) for read in coordinates]
        for at, (thread, address, offset) in enumerate(_each(m, i, to(m, i), shared_offset(source(m, i)))):
            tensor_map = _tensor_map(m, address, thread)
            _aligned(offset, 128, thread)
            places, inside = tensor_map.places([int(axis[at]) for axis in position])
            item = tensor_map.tensor.element_size()
            flat, chunks = _shared_bytes(m, thread, offset, tensor_map.bytes, tensor_map.swizzle, False)

            def write(raw, places=places, inside=inside, item=item):
                values = raw.reshape(-1, item)[inside].view(
                    {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[item]
                )
                m.global_memory.store(places[inside], None, values, item)
                _count(m, places[inside], item, True)

            _send(m, thread, flat, chunks, write)

    return run


def _plain_store(ins, c):
    to, source, size = c.address(ins.operands[0]), c.address(ins.operands[1]), c.read(ins.operands[2], "u32")

    def run(m, i):
        for thread, address, offset, count in _each(m, i, to(m, i), shared_offset(source(m, i)), size(m, i)):
            _aligned(offset | count | address, 16, thread)
            flat, chunks = _shared_bytes(m, thread, offset, count, 0, False)
            places = address - GLOBAL_BASE + np.arange(count)

            def write(raw, places=places):
                m.global_memory.store(places, None, raw[:, None], 1)
                _count(m, places, 1, True)

            _send(m, thread, flat, chunks, write)

    return run


def finish_bulk(m, ids: np.ndarray, keep: int, only_read: bool) -> None:
    threads = set(ids.tolist())
    left = []
    for copy in m.bulk_copies:
        thread = copy["thread"]
        if thread not in threads or copy["group"] >= m.bulk_group[thread] - keep:
            left.append(copy)
            continue
        if copy["raw"] is None:
            copy["raw"] = m.shared.data[copy["flat"]].copy()
            warps = m.warp_of[np.full(len(copy["granules"]), thread)]
            m.shadow.finish_async_read(copy["granules"], warps, [])
        if only_read:
            left.append(copy)
        else:
            copy["write"](copy["raw"])
    m.bulk_copies = left


def finish_kernel(m) -> None:
    """Shared memory goes with the block, so every copy out of it must have been waited for; writes may still come."""
    for copy in m.bulk_copies:
        if copy["raw"] is None:
            where = m.describe(np.array([copy["thread"]]))
            raise Fault("bulk copy", f"the copy of line {copy['line']} still reads when its block ends, by {where}")
        copy["write"](copy["raw"])
