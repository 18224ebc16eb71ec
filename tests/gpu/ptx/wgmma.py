"""wgmma: descriptors, swizzled operands in shared memory, and results that come late.

A product is worked out when it is waited for, from what shared memory holds then; until then its accumulators are NaN
and its operands count as being read. Each group needs its ``wgmma.fence``, though PTX would let a group whose
registers nobody touched go without.

Source: PTX ISA 9.0, chapter 9.7.15 (asynchronous warpgroup-level matrix instructions): descriptor, canonical layouts.
"""

from __future__ import annotations

import re

import numpy as np

from .compiler import Fault, naming, operation
from .control import collective
from .formats import U32
from .parser import PtxError, Reg, Vec
from .tensor_ops import BITS, elements, fragment_a, fragment_c, read_accumulator, to_registers

#: descriptor code to the bytes of a swizzled row
SWIZZLE_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}


def swizzle(addresses: np.ndarray, width: int) -> np.ndarray:
    """Exchanges 16-byte chunks within ``width`` bytes by the number of the 128-byte line."""
    return addresses ^ (((addresses >> 7) & (width // 16 - 1)) << 4)


def chunk_addresses(descriptor: int, rows: np.ndarray, depth: int, size: int, mn_major: bool) -> np.ndarray:
    """Shared offsets of the 16-byte chunks of one operand.

    Args:
        rows: indices along m (or n).
        depth: k; size: bytes of an element.

    Returns:
        [rows, depth * size / 16] for k-major operands, [depth, rows * size / 16] for m-major (or n-major) ones.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> 16) & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    width = SWIZZLE_BYTES[(descriptor >> 62) & 3]
    if (descriptor >> 49) & 7:
        raise Fault("unsupported", "a matrix descriptor with a base offset is not read by this bench")
    if mn_major:
        k, chunk = np.arange(depth)[:, None], (rows[:: 16 // size] * size // 16)[None, :]
        in_row = width // 16
        if width == 16:
            return start + (k // 8) * leading + (k % 8) * 16 + chunk * stride
        at = start + (k // 8) * stride + (k % 8) * width + (chunk // in_row) * leading + (chunk % in_row) * 16
    else:
        chunk = np.arange(depth * size // 16)[None, :]
        row = rows[:, None]
        if width == 16:
            return start + (row // 8) * stride + (row % 8) * 16 + chunk * leading
        at = start + (row // 8) * stride + (row % 8) * width + chunk * 16
    return swizzle(at, width)


class _Product:
    """One wgmma of several warps: each works out its 16 rows."""

    def __init__(self, types, columns, depth, slots, place):
        (self.d_type, self.a_type, self.b_type), self.columns, self.depth = types, columns, depth
        self.slots, self.place = slots, place

    def operand(self, m, type_, chunks, warps, is_left: bool, mn_major: bool) -> np.ndarray:
        size = BITS[type_] // 8
        flat = chunks[warps].reshape(len(warps), -1)
        window = np.repeat(self.block[warps], flat.shape[1])
        words = m.shared.load(flat.ravel(), window, size, 16 // size)
        values = elements(np.ascontiguousarray(words).view(U32).reshape(-1, 4), type_)
        values = values.reshape(len(warps), *chunks.shape[1:3], -1).reshape(len(warps), chunks.shape[1], -1)
        k_last = values.swapaxes(1, 2) if mn_major else values
        return k_last if is_left else k_last.swapaxes(1, 2)

    def finish(self, m, warps: np.ndarray) -> None:
        """``warps`` index this product's own list."""
        left = self.left_values[warps] if self.left_values is not None else self.operand(
            m, self.a_type, self.left, warps, True, self.major[0]
        )  # fmt: skip
        right = self.operand(m, self.b_type, self.right, warps, False, self.major[1])
        product = (left * self.sign[0]) @ (right * self.sign[1])
        place = self.place
        product = product[:, place[0], place[1]].reshape(len(warps) * 32, -1)
        ids = (self.warps[warps][:, None] * 32 + np.arange(32)).ravel()
        state = m.accumulators[self.slots]
        keep = np.repeat(self.scale[warps], 32)[:, None]
        state["values"][ids] = np.where(keep, state["values"][ids], 0) + product
        if self.d_type == "f32":
            state["values"][ids] = state["values"][ids].astype(np.float32)
        state["flying"][ids] -= 1
        landed = ids[state["flying"][ids] == 0]
        words = to_registers(state["values"][landed], self.d_type)
        for at, slot in enumerate(self.slots):
            m.registers[slot][landed] = words[:, at]


def _build_product(ins, c):
    shape = re.search(r"m64n(\d+)k(\d+)", ins.opcode)
    columns, depth = int(shape.group(1)), int(shape.group(2))
    types = ins.types[-3:]
    if types[1] not in BITS or ins.has("sp"):
        raise PtxError(f"line {ins.line}: {ins.opcode} is not read by this bench")
    size = BITS[types[1]] // 8
    target, left, right, scale, *flags = ins.operands
    slots = tuple(c.slots[item.name] for item in target.items)
    reads = [c.read(item, "b32") for item in target.items]
    left_reads = [c.read(item, "b32") for item in left.items] if isinstance(left, Vec) else None
    left_descriptor = None if left_reads else c.read(left, "b64")
    right_descriptor = c.read(right, "b64")
    keep = c.read(scale, "pred") if isinstance(scale, Reg) else c.read(scale, "u32")
    numbers = [flag.value for flag in flags]
    signs = numbers[:2] or [1, 1]
    majors = [bool(value) for value in numbers[2:]]
    if left_reads:
        majors = [False] + (majors or [False])
    majors = majors or [False, False]
    place, a_place = fragment_c(columns), fragment_a(4, 4 // size)
    all_columns = np.arange(columns)

    def action(m, i):
        ids = m.ids[i]
        warps = np.unique(ids >> 5)
        if not m.wgmma_fenced[warps].all():
            bare = warps[~m.wgmma_fenced[warps]] * 32
            raise Fault("wgmma", "no wgmma.fence orders the registers before this group of products", bare)
        product = _Product(types, columns, depth, slots, place)
        product.warps, product.block = warps, m.block_of[warps * 32]
        product.sign, product.major = signs, majors
        product.group = m.wgmma_group[warps].copy()
        product.done = np.zeros(len(warps), np.bool_)
        product.scale = np.broadcast_to(keep(m, i), len(ids)).astype(np.bool_)[::32]
        product.left_values, product.granules = None, []
        first = np.broadcast_to(right_descriptor(m, i), len(ids))[::32].tolist()
        product.right = np.stack([chunk_addresses(d, all_columns, depth, size, majors[1]) for d in first])
        reading = [product.right.reshape(len(warps), -1)]
        if left_reads:
            words = np.stack([read(m, i) for read in left_reads], 1)
            product.left_values = np.zeros((len(warps), 16, depth))
            product.left_values[:, a_place[0], a_place[1]] = elements(words, types[1]).reshape(len(warps), 32, -1)
        else:
            first = np.broadcast_to(left_descriptor(m, i), len(ids))[::32].tolist()
            own = (warps % m.warps_per_block) % 4 * 16
            product.left = np.stack(
                [
                    chunk_addresses(d, np.arange(16) + row, depth, size, majors[0])
                    for d, row in zip(first, own, strict=True)
                ]
            )
            reading.append(product.left.reshape(len(warps), -1))
        _start_reading(m, product, np.concatenate(reading, 1))
        _start_accumulating(m, i, ids, product, reads)
        m.wgmma_queue.append(product)
        m.counters.tensor_flops += 2 * 16 * columns * depth * len(warps)

    return _whole_warpgroup(ins, c, action)


def _start_reading(m, product, chunks: np.ndarray) -> None:
    window = np.repeat(product.block, chunks.shape[1])
    with naming(np.repeat(product.warps * 32, chunks.shape[1])):
        m.shared.load(chunks.ravel(), window, 2, 8)
    flat = chunks + (product.block * m.shared.stride)[:, None]
    per = max(1, 16 >> m.shadow.shift)
    granules = ((flat >> m.shadow.shift)[:, :, None] + np.arange(per)).reshape(len(chunks), -1)
    product.granules = granules
    m.shadow.start_async_read(granules, product.warps * 32, product.warps)


def _start_accumulating(m, i, ids, product, reads) -> None:
    state = m.accumulators.get(product.slots)
    values = read_accumulator(m, i, reads, product.d_type)
    if state is None:
        state = dict(values=np.zeros((m.n, values.shape[1]), values.dtype), flying=np.zeros(m.n, np.int32))
        m.accumulators[product.slots] = state
    fresh = state["flying"][ids] == 0
    state["values"][ids[fresh]] = values[fresh]
    state["flying"][ids] += 1
    for slot in product.slots:
        m.registers[slot][i] = 0xFFFFFFFF


def _whole_warpgroup(ins, c, action):
    """All four warps of a warpgroup must come; they are 128 neighbouring threads."""
    inner = collective(ins, c, None, action, whole_warp=True)

    def run(m, pc, index, active):
        if len(active) == 0:
            return pc + 1
        present = np.zeros(m.n, np.bool_)
        present[active] = True
        group = (active // m.threads_per_block) * 32 + active % m.threads_per_block // 128
        sizes = np.bincount(group)
        ready = sizes[group] == 128
        if ready.all():
            return inner(m, pc, index, active)
        m.pc[index] = pc + 1
        if ready.any():
            inner(m, pc, active[ready], active[ready])
            m.pc[active[ready]] = pc + 1
        m.stall_group(active[~ready], pc)
        return None

    return run


def _build_wait(ins, c):
    keep = ins.operands[0].value

    def run(m, i):
        waits = np.zeros(m.n >> 5, np.bool_)
        waits[np.unique(m.warp_of[i])] = True
        for product in m.wgmma_queue:
            warps = product.warps
            ready = waits[warps] & ~product.done & (product.group < m.wgmma_group[warps] - keep)
            chosen = np.flatnonzero(ready)
            if len(chosen):
                product.finish(m, chosen)
                product.done |= ready
                others = [
                    (other.granules[flying], other.warps[flying])
                    for other in m.wgmma_queue
                    if (flying := np.flatnonzero(~other.done & np.isin(other.warps, warps[chosen]))).size
                ]
                m.shadow.finish_async_read(product.granules[chosen], warps[chosen], others)
        m.wgmma_queue = [product for product in m.wgmma_queue if not product.done.all()]

    return run


def _build_commit(ins, c):
    def run(m, i):
        warps = np.unique(m.warp_of[i])
        m.wgmma_group[warps] += 1
        m.wgmma_fenced[warps] = False

    return run


@operation("wgmma")
def build_wgmma(ins, c):
    if ins.parts[1] == "mma_async":
        built = _build_product(ins, c)
        built.is_control = True
        return built
    if ins.parts[1] == "commit_group":
        return _build_commit(ins, c)
    if ins.parts[1] == "wait_group":
        return _build_wait(ins, c)

    def fence(m, i):
        m.wgmma_fenced[np.unique(m.warp_of[i])] = True

    return fence
