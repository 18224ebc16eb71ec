"""Instructions to Python closures ``run(machine, threads)`` over numpy arrays that hold one element for each thread.

``threads`` is ``slice(None)`` when all threads of the machine run, else a sorted index array. Each operation is built
once for each kernel by the builder registered under its opcode's first word.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable

import numpy as np

from . import parser
from .formats import DTYPE, F32, F64, STORAGE, U16, U32, U64, f32_to_bf16
from .parser import Imm, Instruction, Kernel, Not, Pair, PtxError, Reg, Sink, Special, Sym, Vec

BUILDERS: dict[str, Callable] = {}

#: where the state spaces lie among the generic addresses; shared and local offsets are 32-bit and start below these
GLOBAL_BASE = 0x7F00_0000_0000
SHARED_BASE = 0x7E00_0000_0000
LOCAL_BASE = 0x7D00_0000_0000
PARAM_BASE = 0x7C00_0000_0000
WINDOW = 0x0100_0000_0000


class Fault(Exception):
    """What a kernel did wrong: the kind, the PTX line, and which threads of which blocks."""

    def __init__(self, kind: str, message: str, threads=None):
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.threads = kind, message, threads
        self.line: int | None = None
        self.located = False


@contextlib.contextmanager
def naming(ids: np.ndarray):
    """A fault inside marks rows of an access; outside it names the threads ``ids`` of those rows."""
    try:
        yield
    except Fault as fault:
        if fault.threads is not None and np.asarray(fault.threads).dtype == np.bool_:
            fault.threads = np.unique(ids[fault.threads])
        raise


def operation(*names: str):
    def register(builder):
        for name in names:
            BUILDERS[name] = builder
        return builder

    return register


def immediate(value: int | float, type_: str):
    dtype = DTYPE[type_]
    if type_ == "pred":
        return np.bool_(value)
    if isinstance(value, float):
        if type_ in ("b32", "u32", "s32"):
            return U32(struct.unpack("<I", struct.pack("<f", value))[0]).view(dtype)
        if type_ in ("b64", "u64", "s64"):
            return U64(struct.unpack("<Q", struct.pack("<d", value))[0]).view(dtype)
        if type_ == "bf16":
            return U16(f32_to_bf16(F32(value)))
        return dtype(value)
    size = np.dtype(dtype).itemsize
    raw = STORAGE[size](value & ((1 << 8 * size) - 1))
    # an integer written where a float stands is its value, but for the 16-bit formats, whose immediates are bits
    return dtype(value) if dtype in (F32, F64) else raw.view(dtype)


class Compiler:
    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.slots = {name: slot for slot, name in enumerate(kernel.registers)}
        self.types = list(kernel.registers.values())

    def build(self, instruction: Instruction) -> Callable:
        builder = BUILDERS.get(instruction.name)
        if builder is None:
            raise PtxError(f"line {instruction.line}: {instruction.opcode} is not read by this bench")
        return builder(instruction, self)

    # --- operands -----------------------------------------------------------------------------------------------
    def read(self, operand, type_: str) -> Callable:
        """``f(machine, threads)`` to the operand as an array (or scalar) of ``type_``."""
        dtype = np.dtype(DTYPE[type_])
        if isinstance(operand, Reg):
            return self._read_register(operand, dtype)
        if isinstance(operand, Not):
            inner = self._read_register(operand.item, np.dtype(np.bool_))
            return lambda m, i: ~inner(m, i)
        if isinstance(operand, Imm):
            constant = immediate(operand.value, type_)
            return lambda m, i: constant
        if isinstance(operand, Special):
            name = operand.name
            return lambda m, i: m.special(name, i).astype(STORAGE[dtype.itemsize]).view(dtype)
        if isinstance(operand, Sym):
            variable, offset = operand.variable, operand.offset
            return lambda m, i: np.asarray(m.address_of(variable) + offset).astype(STORAGE[dtype.itemsize]).view(dtype)
        if isinstance(operand, Vec):
            return self._read_packed(operand, dtype)
        raise PtxError(f"operand {operand} is not read by this bench")

    def _read_register(self, register: Reg, dtype: np.dtype) -> Callable:
        slot = self.slots[register.name]
        if register.type == "pred" or register.type == "b128":
            return lambda m, i: m.registers[slot][i]
        size = parser.TYPE_SIZE[register.type]
        if size == dtype.itemsize:
            return lambda m, i: m.registers[slot][i].view(dtype)
        unsigned = STORAGE[dtype.itemsize]
        return lambda m, i: m.registers[slot][i].astype(unsigned).view(dtype)

    def _read_packed(self, operand: Vec, dtype: np.dtype) -> Callable:
        """``{low, high}`` as one wider value."""
        size = dtype.itemsize // len(operand.items)
        parts = [self.read(item, f"b{8 * size}") for item in operand.items]

        def run(m, i):
            total = np.zeros(m.count(i), STORAGE[dtype.itemsize])
            for index, part in enumerate(parts):
                total |= part(m, i).astype(total.dtype) << total.dtype.type(8 * size * index)
            return total.view(dtype)

        return run

    def write(self, operand, type_: str) -> Callable:
        """``f(machine, threads, value)``; a value narrower than the register is extended by its sign."""
        if isinstance(operand, Sink):
            return lambda m, i, value: None
        if isinstance(operand, Vec):
            size = parser.TYPE_SIZE[type_] // len(operand.items)
            parts = [self.write(item, f"b{8 * size}") for item in operand.items]

            def run(m, i, value):
                value = np.array(value).view(STORAGE[8 * size * len(parts) // 8])
                for index, part in enumerate(parts):
                    part(m, i, (value >> value.dtype.type(8 * size * index)).astype(STORAGE[size]))

            return run
        if not isinstance(operand, Reg):
            raise PtxError(f"result {operand} is not read by this bench")
        slot = self.slots[operand.name]
        if operand.type in ("pred", "b128"):

            def run(m, i, value):
                m.registers[slot][i] = value

            return run
        storage = STORAGE[parser.TYPE_SIZE[operand.type]]
        if parser.TYPE_SIZE[operand.type] == np.dtype(DTYPE[type_]).itemsize:

            def run(m, i, value):
                m.registers[slot][i] = value.view(storage)

            return run
        extended = np.dtype(storage).str.replace("u", "i") if type_.startswith("s") else storage

        def run(m, i, value):
            m.registers[slot][i] = value.astype(extended).view(storage)

        return run

    def pair(self, operand, type_: str) -> tuple[Callable, Callable]:
        """``d|p``: the result, and the predicate beside it."""
        if isinstance(operand, Pair):
            return self.write(operand.first, type_), self.write(operand.second, "pred")
        return self.write(operand, type_), lambda m, i, value: None

    def address(self, operand: parser.Addr) -> Callable:
        """``f(machine, threads)`` to int64 addresses, one for each thread."""
        base, offset = operand.base, operand.offset
        if isinstance(base, Reg):
            inner = self.read(base, "b64" if base.type.endswith("64") else "b32")
            return lambda m, i: inner(m, i).astype(np.int64) + offset
        if isinstance(base, Imm):
            return lambda m, i: np.full(m.count(i), base.value + offset, np.int64)
        variable = base.variable
        return lambda m, i: np.full(m.count(i), m.offset_of(variable) + offset, np.int64)
