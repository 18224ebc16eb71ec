"""mma.sync, ldmatrix, stmatrix, movmatrix.

Products are summed in float64 and rounded once, so a test may compare with a float64 reference; the devices' order of
summation and their truncation are not modelled.

Source: PTX ISA 9.0, chapter 9.7.14 (warp-level matrix instructions), fragment figures.
"""

from __future__ import annotations

import re

import numpy as np

from .compiler import SHARED_BASE, naming
from .control import collective, control
from .formats import FP8_TABLES, U16, U32, bf16_to_f32, narrow
from .memory_ops import count_shared
from .parser import PtxError, Vec

BITS = {"bf16": 16, "f16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8}


def elements(words: np.ndarray, type_: str) -> np.ndarray:
    """32-bit words [..., n] to the numbers they hold [..., n * per word], as float64 or int64."""
    words = np.ascontiguousarray(words)
    if type_ == "tf32":  # the devices read the upper 19 bits
        return (words & U32(0xFFFFE000)).view(np.float32).astype(np.float64)
    if type_ == "bf16":
        return bf16_to_f32(words.view(U16)).astype(np.float64)
    if type_ == "f16":
        return words.view(np.float16).astype(np.float64)
    if type_ in FP8_TABLES:
        return FP8_TABLES[type_][words.view(np.uint8)]
    return words.view({"s8": np.int8, "u8": np.uint8}[type_]).astype(np.int64)


def fragment_a(registers: int, per: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [32, registers * per] of a 16-row left operand."""
    lane, register, at = np.ogrid[:32, :registers, :per]
    rows = lane // 4 + 8 * (register & 1) + 0 * at
    columns = (lane % 4) * per + (register >> 1) * 4 * per + at
    return rows.reshape(32, -1), columns.reshape(32, -1)


def fragment_b(registers: int, per: int) -> tuple[np.ndarray, np.ndarray]:
    """k and n [32, registers * per] of an 8-column right operand."""
    lane, register, at = np.ogrid[:32, :registers, :per]
    k = (lane % 4) * per + register * 4 * per + at
    n = lane // 4 + 0 * register + 0 * at
    return k.reshape(32, -1), n.reshape(32, -1)


def fragment_c(columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [32, columns / 2] of a 16-row result: in each 8 columns two of row g, then two of row g + 8."""
    lane, group, at = np.ogrid[:32, : columns // 8, :4]
    rows = lane // 4 + 8 * (at >> 1) + 0 * group
    cols = 8 * group + 2 * (lane % 4) + (at & 1)
    return rows.reshape(32, -1), cols.reshape(32, -1)


def read_accumulator(m, i, reads, type_: str) -> np.ndarray:
    """[threads, values] in float64 or int64."""
    raw = np.stack([np.broadcast_to(read(m, i), m.count(i)) for read in reads], 1)
    if type_ == "f32":
        return raw.view(np.float32).astype(np.float64)
    if type_ == "f16":
        return raw.view(np.float16).astype(np.float64)
    return raw.view(np.int32).astype(np.int64)


def to_registers(values: np.ndarray, type_: str) -> np.ndarray:
    """The inverse: [threads, registers] of 32-bit words."""
    if type_ == "f32":
        return np.ascontiguousarray(values.astype(np.float32)).view(U32)
    if type_ == "f16":
        return np.ascontiguousarray(narrow(values, "f16")).view(U32)
    return np.ascontiguousarray(values.astype(np.int32)).view(U32)


@control("mma")
def build_mma(ins, c):
    shape = next(re.fullmatch(r"m(\d+)n(\d+)k(\d+)", part) for part in ins.parts if re.fullmatch(r"m\d+n\d+k\d+", part))
    rows, columns, depth = (int(size) for size in shape.groups())
    d_type, a_type, b_type, c_type = ins.types[-4:]
    if (rows, columns) != (16, 8) or a_type not in BITS or ins.has("sp", "sp::ordered_metadata", "block_scale"):
        raise PtxError(f"line {ins.line}: {ins.opcode} is not read by this bench")
    per = 32 // BITS[a_type]
    d, a, b, acc = (operand.items if isinstance(operand, Vec) else (operand,) for operand in ins.operands[:4])
    writes = [c.write(item, "b32") for item in d]
    reads_a, reads_b, reads_c = ([c.read(item, "b32") for item in part] for part in (a, b, acc))
    place_a, place_b, place_c = fragment_a(len(a), per), fragment_b(len(b), per), fragment_c(8)
    flops = 2 * rows * columns * depth

    def action(m, i):
        count = m.count(i) // 32
        words = np.stack([read(m, i) for read in reads_a], 1)
        left = np.zeros((count, 16, depth), np.int64 if a_type in ("s8", "u8") else np.float64)
        left[:, place_a[0], place_a[1]] = elements(words, a_type).reshape(count, 32, -1)
        words = np.stack([read(m, i) for read in reads_b], 1)
        right = np.zeros((count, depth, 8), left.dtype)
        right[:, place_b[0], place_b[1]] = elements(words, b_type).reshape(count, 32, -1)
        product = (left @ right)[:, place_c[0], place_c[1]].reshape(count * 32, -1)
        result = to_registers(read_accumulator(m, i, reads_c, c_type) + product, d_type)
        for at, write in enumerate(writes):
            write(m, i, result[:, at])
        m.counters.tensor_flops += flops * count

    return collective(ins, c, None, action, whole_warp=True)


def _matrices(ins) -> int:
    return next((int(flag[1:]) for flag in ("x1", "x2", "x4") if flag in ins.flags), 1)


def _rows(m, i, address, count: int):
    """Offsets and thread ids of the lanes that name the rows, [warps * count * 8]."""
    addresses = address(m, i).reshape(-1, 32)[:, : 8 * count].ravel()
    ids = m.ids[i].reshape(-1, 32)[:, : 8 * count].ravel()
    return np.where(addresses >= SHARED_BASE, addresses - SHARED_BASE, addresses), ids


def _check_shape(ins):
    if not ins.has("m8n8") or "b16" not in ins.flags:
        raise PtxError(f"line {ins.line}: {ins.opcode} is not read by this bench")


@control("ldmatrix")
def build_ldmatrix(ins, c):
    _check_shape(ins)
    count, transposed = _matrices(ins), "trans" in ins.flags
    targets = ins.operands[0].items if isinstance(ins.operands[0], Vec) else (ins.operands[0],)
    writes = [c.write(item, "b32") for item in targets]
    address = c.address(ins.operands[1])

    def action(m, i):
        offsets, ids = _rows(m, i, address, count)
        window = m.block_of[ids]
        with naming(ids):
            values = m.shared.load(offsets, window, 2, 8)
        m.shadow.read(offsets + window * m.shared.stride, 16, ids, m.warp_of[ids])
        count_shared(m, offsets, ids, 16, phase_lanes=8)
        matrices = values.reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(U32)  # [warps, matrices, 8 rows, 4 words]
        for at, write in enumerate(writes):
            write(m, i, words[:, at].reshape(-1))

    return collective(ins, c, None, action, whole_warp=True)


@control("stmatrix")
def build_stmatrix(ins, c):
    _check_shape(ins)
    count, transposed = _matrices(ins), "trans" in ins.flags
    sources = ins.operands[1].items if isinstance(ins.operands[1], Vec) else (ins.operands[1],)
    reads = [c.read(item, "b32") for item in sources]
    address = c.address(ins.operands[0])

    def action(m, i):
        offsets, ids = _rows(m, i, address, count)
        words = np.stack([read(m, i).reshape(-1, 8, 4) for read in reads], 1)
        matrices = np.ascontiguousarray(words).view(U16)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        window = m.block_of[ids]
        with naming(ids):
            m.shared.store(offsets, window, np.ascontiguousarray(matrices).reshape(-1, 8), 2)
        m.shadow.write(offsets + window * m.shared.stride, 16, ids, m.warp_of[ids])
        count_shared(m, offsets, ids, 16, phase_lanes=8)

    return collective(ins, c, None, action, whole_warp=True)


@control("movmatrix")
def build_movmatrix(ins, c):
    source, target = c.read(ins.operands[1], "b32"), c.write(ins.operands[0], "b32")

    def action(m, i):
        matrices = np.ascontiguousarray(source(m, i)).view(U16).reshape(-1, 8, 8).swapaxes(1, 2)
        target(m, i, np.ascontiguousarray(matrices).view(U32).reshape(-1))

    return collective(ins, c, None, action, whole_warp=True)
