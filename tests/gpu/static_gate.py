"""The static gate: what the compilers made of each kernel configuration, read from the machine code without a GPU.

A kernel states its limits beside itself as a :class:`Limits`; :func:`measure` compiles and reads, :func:`breaches`
compares. ``python -m tests.gpu.static_gate`` prints the table of every registered configuration.

Sources: CUDA Occupancy Calculator (allocation granularities); CUDA C++ Programming Guide (table of capabilities).
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import build


@dataclass(frozen=True)
class Device:
    """What an SM has to share out."""

    registers: int = 65536
    max_warps: int = 64
    max_blocks: int = 32
    shared: int = 0  # bytes of an SM
    shared_per_block: int = 0
    reserved: int = 1024  # taken by the system in each block


DEVICES = {
    "sm_80": Device(shared=164 * 1024, shared_per_block=163 * 1024),
    "sm_90a": Device(shared=228 * 1024, shared_per_block=227 * 1024),
    "sm_100a": Device(shared=228 * 1024, shared_per_block=227 * 1024),
}

#: SASS mnemonics by what they are
GROUPS = {
    "tensor": r"(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b",
    "mma.sync": r"HMMA\b",
    "async copy": r"(LDGSTS|UTMALDG|UTMASTG|UBLKCP)\b",
    "128-bit global": r"(LDG|STG)\.(\w+\.)*128\b",
    "global": r"(LDG|STG)\b",
    "local": r"(LDL|STL)\b",
    "fp64": r"(DADD|DMUL|DFMA|DSETP|DMMA)\b",
    "barrier": r"BAR\b",
    "shuffle": r"SHFL\b",
    "atomic": r"(ATOM|ATOMG|ATOMS|RED|REDG)\b",
    "float atomic": r"(ATOM|ATOMG|RED|REDG)\.(\w+\.)*(ADD|MIN|MAX)\.(\w+\.)*(F16|BF16|F32|F64)",
}


@dataclass(frozen=True)
class Limits:
    """What a configuration may cost, and the machine code that it must or must not have.

    ``at_least`` and ``at_most`` map names of :data:`GROUPS` to counts. Local memory, spills and FP64 are refused unless
    a limit allows them.
    """

    registers: int = 255
    spills: int = 0  # bytes
    stack: int = 0
    min_occupancy: float = 0.0
    at_least: dict = field(default_factory=dict)
    at_most: dict = field(default_factory=lambda: {"local": 0, "fp64": 0, "float atomic": 0})


@dataclass(frozen=True)
class Configuration:
    """One kernel as it is shipped: how to get its machine code, how it is launched, what it may cost.

    ``cubin`` compiles for an architecture and returns the machine code and the dynamic shared memory.
    """

    name: str
    kernel: str
    threads: int
    cubin: Callable[[str], tuple[bytes, int]]
    limits: Limits = Limits()
    architectures: tuple[str, ...] = build.ARCHITECTURES


@dataclass(frozen=True)
class Measured:
    configuration: Configuration
    arch: str
    registers: int
    stack: int
    static_shared: int
    dynamic_shared: int
    spills: int
    blocks_per_sm: int
    counts: Counter

    @property
    def occupancy(self) -> float:
        return self.blocks_per_sm * -(-self.configuration.threads // 32) / DEVICES[self.arch].max_warps


def blocks_per_sm(device: Device, registers: int, threads: int, shared: int) -> int:
    """Blocks that fit an SM: registers are given out to warps by 256, shared memory by 128 bytes."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = device.registers // per_warp // warps if registers else device.max_blocks
    per_block = -(-(shared + device.reserved) // 128) * 128
    return min(device.max_blocks, device.max_warps // warps, by_registers, device.shared // per_block)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([build.find_tool(name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout


@functools.lru_cache(maxsize=32)
def _dump(cubin: bytes, what: str) -> str:
    """What cuobjdump says of all kernels of a file."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("cuobjdump", what, file.name)


def sass(cubin: bytes, kernel: str) -> list[str]:
    """The instructions of one kernel, predicates and addresses stripped."""
    text = _dump(cubin, "-sass")
    part = re.split(r"^\s*Function : ", text, flags=re.M)
    body = next((piece for piece in part[1:] if piece.split()[0] == kernel), None)
    if body is None:
        raise RuntimeError(f"no kernel {kernel} in this cubin")
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;/]*);", body)
    return [instruction.strip() for instruction in found]


def resources(cubin: bytes, kernel: str) -> dict[str, int]:
    """``REG``, ``STACK``, ``SHARED``, ``LOCAL`` of one kernel."""
    text = _dump(cubin, "-res-usage")
    match = re.search(rf"Function {re.escape(kernel)}:\s*\n?\s*(REG:.*)", text)
    if match is None:
        raise RuntimeError(f"no kernel {kernel} in this cubin:\n{text}")
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", match.group(1))}


def count_groups(instructions: list[str]) -> Counter:
    return Counter(
        {group: sum(re.match(pattern, instruction) is not None for instruction in instructions)
         for group, pattern in GROUPS.items()}
    )  # fmt: skip


def spilled_bytes(instructions: list[str]) -> int:
    """Bytes of local stores: what does not fit the registers, and what is indexed by the thread."""
    width = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2, "8": 1, "16": 2}
    stores = [instruction.split()[0].split(".")[1:] for instruction in instructions if instruction.startswith("STL")]
    return sum(next((width[part] for part in parts if part in width), 4) for parts in stores)


def measure(configuration: Configuration, arch: str) -> Measured:
    cubin, dynamic = configuration.cubin(arch)
    used = resources(cubin, configuration.kernel)
    if arch != "sm_80" and used["SHARED"]:  # from sm_90 on it contains what the system reserves
        used["SHARED"] -= DEVICES[arch].reserved
    instructions = sass(cubin, configuration.kernel)
    fits = blocks_per_sm(DEVICES[arch], used["REG"], configuration.threads, used["SHARED"] + dynamic)
    return Measured(
        configuration, arch, used["REG"], used["STACK"], used["SHARED"], dynamic, spilled_bytes(instructions), fits,
        count_groups(instructions),
    )  # fmt: skip


def breaches(measured: Measured) -> list[str]:
    """Each limit that a configuration breaks, as a sentence."""
    limits, found = measured.configuration.limits, []
    where = f"{measured.configuration.name} on {measured.arch}"

    def check(what, value, limit, bad):
        if bad:
            found.append(f"{where}: {what} must be {limit}, got {value}")

    check("registers", measured.registers, f"at most {limits.registers}", measured.registers > limits.registers)
    check("spilled bytes", measured.spills, f"at most {limits.spills}", measured.spills > limits.spills)
    check("stack", measured.stack, f"at most {limits.stack}", measured.stack > limits.stack)
    shared = measured.static_shared + measured.dynamic_shared
    device = DEVICES[measured.arch]
    check("shared memory", shared, f"at most {device.shared_per_block}", shared > device.shared_per_block)
    check("threads", measured.configuration.threads, "at most 1024", measured.configuration.threads > 1024)
    check("blocks on an SM", 0, "at least 1", measured.blocks_per_sm == 0)
    low = measured.occupancy < limits.min_occupancy
    check("occupancy", f"{measured.occupancy:.0%}", f"at least {limits.min_occupancy:.0%}", low)
    for group, least in limits.at_least.items():
        check(f"{group} instructions", measured.counts[group], f"at least {least}", measured.counts[group] < least)
    for group, most in limits.at_most.items():
        check(f"{group} instructions", measured.counts[group], f"at most {most}", measured.counts[group] > most)
    return found


def table(rows: list[Measured]) -> str:
    shown = ("tensor", "async copy", "128-bit global", "global", "barrier")
    head = ["kernel", "arch", "threads", "regs", "spill", "stack", "shared", "blocks", "occupancy", *shown]
    lines = [head] + [
        [row.configuration.name, row.arch, row.configuration.threads, row.registers, row.spills, row.stack,
         row.static_shared + row.dynamic_shared, row.blocks_per_sm, f"{row.occupancy:.0%}",
         *(row.counts[group] for group in shown)]
        for row in rows
    ]  # fmt: skip
    lines = [[str(cell) for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    aligned = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]  # fmt: skip
    return "\n".join(line.rstrip() for line in aligned)


def from_cuda(path: Path, dynamic_shared: int = 0, flags: tuple[str, ...] = ()) -> Callable:
    return lambda arch: (build.nvcc(path.read_text(), arch, "cubin", flags), dynamic_shared)


def from_triton(compile_for: Callable[[int], build.Compiled]) -> Callable:
    """``compile_for(capability)`` gives a :class:`build.Compiled`."""

    def cubin(arch: str) -> tuple[bytes, int]:
        compiled = compile_for(int(re.search(r"\d+", arch).group()))
        return compiled.cubin, compiled.shared_bytes

    return cubin


def main() -> int:
    from .configurations import CONFIGURATIONS

    rows = [measure(configuration, arch) for configuration in CONFIGURATIONS for arch in configuration.architectures]
    print(table(rows))
    broken = [sentence for row in rows for sentence in breaches(row)]
    print("\n".join(broken))
    return bool(broken)


if __name__ == "__main__":
    raise SystemExit(main())
