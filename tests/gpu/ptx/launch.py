"""Running a kernel of some PTX on torch tensors: :func:`run_ptx`."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter

import numpy as np

# imported for the builders that they register
from . import alu, convert, mbarriers, memory_ops, tensor_ops, wgmma  # noqa: F401
from .compiler import GLOBAL_BASE, Compiler
from .control import CONTROL
from .counters import Counters, classify
from .machine import Machine
from .memory import GlobalMemory, Space
from .parser import Kernel, parse

#: threads that run as one numpy operation; more blocks in flight cost memory and win little
CHUNK_THREADS = 2048
#: static shared memory starts here: sm_90 keeps the first KiB for itself
SHARED_START = 1024
GUARD = 16


class Program:
    """A kernel compiled to closures, with the layout of its variables."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        compiler = Compiler(kernel)
        compiler.on_release = {}
        self.code = []
        for instruction in kernel.instructions:
            guard = compiler.slots[instruction.guard.name] if instruction.guard else None
            control = CONTROL.get(instruction.name)
            built = control(instruction, compiler) if control else compiler.build(instruction)
            # a builder says by `is_control` that its operation sets program counters itself
            is_control = control is not None or getattr(built, "is_control", False)
            self.code.append(
                (None if is_control else built, guard, instruction.guard_negated, built if is_control else None)
            )
        self.types = compiler.types
        self.on_release = compiler.on_release
        self.joins = frozenset(kernel.labels.values())
        self.granule = _granule(kernel)
        self._lay_out()

    def _lay_out(self) -> None:
        self.offsets: dict = {}
        shared, local = SHARED_START, 0
        self._static, self._dynamic_align = [], 16
        self.dynamic, self.module_variables = [], []
        for variable in self.kernel.variables:
            if variable.space == "shared" and variable.size:
                shared = -(-shared // variable.align) * variable.align
                self.offsets[variable] = shared
                self._static.append((shared, variable.size))
                shared += variable.size + GUARD
            elif variable.space == "shared":
                self.dynamic.append(variable)
                self._dynamic_align = max(self._dynamic_align, variable.align)
            elif variable.space == "local":
                local = -(-local // variable.align) * variable.align
                self.offsets[variable] = local
                local += variable.size
            else:
                self.module_variables.append(variable)
        align = self._dynamic_align
        self.dynamic_start = -(-shared // align) * align
        for variable in self.dynamic:
            self.offsets[variable] = self.dynamic_start
        self.local_size = local
        self.static_shared = sum(size for _, size in self._static)
        offset = 0
        for parameter in self.kernel.parameters:
            offset = -(-offset // parameter.align) * parameter.align
            self.offsets[parameter] = offset
            offset += parameter.size
        self.parameter_size = offset

    def shared_size(self, dynamic: int) -> int:
        return self.dynamic_start + dynamic

    def shared_ranges(self, dynamic: int) -> list[tuple[int, int]]:
        return self._static + [(self.dynamic_start, dynamic)]


def _granule(kernel: Kernel) -> int:
    """The narrowest access to shared memory: the races are looked for at this size."""
    widths = [16]
    for instruction in kernel.instructions:
        if instruction.name in ("ld", "st", "atom", "red") and memory_ops.is_generic_or(instruction, "shared"):
            type_, width, count = memory_ops._access_shape(instruction)
            widths.append(width * count)
        elif instruction.name == "cp" and "bulk" not in instruction.flags and len(instruction.operands) > 2:
            widths.append(instruction.operands[2].value)
        elif instruction.name == "mbarrier":
            widths.append(8)
    return min(widths)


@functools.lru_cache(maxsize=256)
def compile_ptx(ptx_text: str, kernel_name: str | None = None) -> Program:
    return Program(parse(ptx_text, kernel_name))


class Launch:
    """One grid: its memory, its parameters, its counters."""

    def __init__(self, program: Program, grid, block, args, shared_bytes, max_steps, uninitialized, pointed_to=()):
        self.program, self.grid, self.block, self.shared_bytes = program, grid, block, shared_bytes
        self.counters, self.max_steps, self.steps = Counters(), max_steps, 0
        self.issues = np.zeros(len(program.code), np.int64)
        self.conflicts: Counter = Counter()
        self.machine: Machine | None = None
        self.tensor_maps: list = []
        self.memory = GlobalMemory(GLOBAL_BASE)
        for variable in program.module_variables:
            address = self.memory.add_bytes(max(variable.size, 1), variable.initial, variable.align)
            program.offsets[variable] = address
        self.parameter_space = Space("parameter", max(program.parameter_size, 16))
        uninitialized = {id(tensor) for tensor in uninitialized}
        for tensor in pointed_to:
            self.memory.add(tensor, written=id(tensor) not in uninitialized)
        raw = self._pack(args, uninitialized)
        self.parameter_space.allow(0, program.parameter_size, written=True)
        self.parameter_space.data[: len(raw)] = np.frombuffer(raw, np.uint8)
        self.global_space = self.memory.freeze()
        self.sectors_read = np.zeros(len(self.global_space.data) // 32 + 1, np.bool_)
        self.sectors_written = np.zeros_like(self.sectors_read)

    def _pack(self, args, uninitialized) -> bytes:
        import torch

        parameters = self.program.kernel.parameters
        raw = bytearray(self.program.parameter_size)
        args = list(args) + [0] * (len(parameters) - len(args))
        for parameter, value in zip(parameters, args, strict=True):
            if isinstance(value, torch.Tensor):
                value = self.memory.add(value, written=id(value) not in uninitialized)
            elif hasattr(value, "encode_for"):
                value = value.encode_for(self)
            elif isinstance(value, bytes):
                value = self.memory.translate(value)
            at = self.program.offsets[parameter]
            raw[at : at + parameter.size] = _pack_value(parameter, value)
        return bytes(raw)

    def current_line(self) -> int:
        return self.machine.line


def _pack_value(parameter, value) -> bytes:
    if isinstance(value, (bytes, bytearray)):
        if len(value) != parameter.size:
            raise ValueError(f"parameter {parameter.name} has {parameter.size} bytes, got {len(value)}")
        return bytes(value)
    if value is None:
        value = 0
    if isinstance(value, float):
        # Triton declares its scalars as .b32, whatever they hold
        return np.asarray(value, {4: np.float32, 8: np.float64, 2: np.float16}[parameter.size]).tobytes()
    return (int(value) % (1 << 8 * parameter.size)).to_bytes(parameter.size, "little")


def _three(size) -> tuple[int, int, int]:
    size = (size,) if isinstance(size, int) else tuple(size)
    return size + (1,) * (3 - len(size))


def run_ptx(
    ptx_text: str,
    kernel_name: str | None,
    grid,
    block,
    args,
    shared_bytes: int = 0,
    seed: int | None = None,
    *,
    uninitialized=(),
    max_steps: int = 2_000_000,
) -> Counters:
    """Executes one launch of a kernel and returns what it counted, as :func:`execute` does."""
    options = dict(uninitialized=uninitialized, max_steps=max_steps)
    return execute(ptx_text, kernel_name, grid, block, args, shared_bytes, seed, **options).counters


def execute(
    ptx_text: str,
    kernel_name: str | None,
    grid,
    block,
    args,
    shared_bytes: int = 0,
    seed: int | None = None,
    *,
    uninitialized=(),
    pointed_to=(),
    max_steps: int = 2_000_000,
) -> Launch:
    """Executes one launch of a kernel and returns it, with what it counted and what it left unwritten.

    Every access is checked for bounds, alignment and unwritten bytes; shared memory for races between warps; barriers
    and warp collectives for threads that do not come. What is wrong raises :class:`Fault`, whose message names the PTX
    line and the threads. The tensors hold what the kernel had written so far either way.

    Args:
        ptx_text: what ``nvcc -ptx`` or ``triton.compile(…).asm["ptx"]`` gave.
        kernel_name: of the entry; None if the PTX has one.
        grid, block: an int or up to three of them. Triton: ``block = 32 * num_warps``.
        args: one for each parameter, in order: a CPU tensor (its device address), an int, a float, ``bytes`` of a
            struct passed by value, or a :class:`TensorMap`. Parameters at the end that have none are zero, which is
            right for the scratch pointers that Triton appends.
        shared_bytes: dynamic shared memory; for Triton ``metadata.shared``.
        seed: None runs blocks and warps in their order, a number in a random one, and lanes of atomics too.
        uninitialized: tensors that the kernel must write before it reads.
        pointed_to: tensors whose addresses on the host stand in ``args`` of ``bytes``, as a program passes them.
        max_steps: instructions of thread groups until a livelock is reported.
    """
    program = compile_ptx(ptx_text, kernel_name)
    grid, block = _three(grid), _three(block)
    threads = math.prod(block)
    limit = program.kernel.max_threads or 1024
    if not 0 < threads <= min(limit, 1024) or block[2] > 64:
        raise ValueError(f"run_ptx: block must have 1 to {min(limit, 1024)} threads, got {block}")
    if not all(grid) or grid[1] > 65535 or grid[2] > 65535 or grid[0] > 2**31 - 1:
        raise ValueError(f"run_ptx: grid must be within (2**31 - 1, 65535, 65535) and not empty, got {grid}")
    if len(args) > len(program.kernel.parameters):
        raise ValueError(f"run_ptx: args must have {len(program.kernel.parameters)} entries, got {len(args)}")
    launch = Launch(program, grid, block, args, shared_bytes, max_steps, uninitialized, pointed_to)
    generator = None if seed is None else np.random.default_rng(seed)
    blocks = [(x, y, z) for z, y, x in itertools.product(*(range(n) for n in reversed(grid)))]
    if generator is not None:
        blocks = [blocks[at] for at in generator.permutation(len(blocks))]
    chunk = max(1, CHUNK_THREADS // (-(-threads // 32) * 32))
    try:
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), chunk):
                launch.machine = Machine(program, launch, blocks[first : first + chunk], generator)
                launch.machine.run()
    finally:
        launch.memory.write_back()
    _finish(launch)
    return launch


def _finish(launch: Launch) -> None:
    counters = launch.counters
    counters.read_unique_sectors = int(launch.sectors_read.sum())
    counters.write_unique_sectors = int(launch.sectors_written.sum())
    for instruction, count in zip(launch.program.kernel.instructions, launch.issues, strict=True):
        if count:
            counters.by_opcode[instruction.opcode] += int(count)
            counters.by_class[classify(instruction.opcode)] += int(count)
    counters.instructions = int(launch.issues.sum())
    counters.conflicts_by_line = launch.conflicts
