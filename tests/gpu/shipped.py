"""What the compiled library ships for GPUs: the PTX and the machine code of each kernel, read back from the file."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path

import moe_kernels

from . import build

LIBRARY = Path(moe_kernels.__file__).parent / "libmoe_kernels_cuda.so"


@functools.cache
def missing_reason() -> str | None:
    """Why there is nothing to read, or None."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not built (no nvcc, or a PyTorch without CUDA)"
    try:
        build.find_tool("cuobjdump")
    except RuntimeError as missing:
        return str(missing)
    return None


def plain_name(mangled: str) -> str:
    """A kernel's name as g++ has it: nvcc gives the anonymous namespace the name of its file."""
    match = re.match(r"_ZN3moe(\d+)(_GLOBAL__N_\w*)", mangled)
    return f"_ZN3moe12_GLOBAL__N_1{match[2][int(match[1]) :]}" if match else mangled


def _extract(what: str) -> dict[str, bytes]:
    """File name to contents of everything of one kind (``ptx``, ``elf``) in the library."""
    with tempfile.TemporaryDirectory() as folder:
        command = [build.find_tool("cuobjdump"), f"-x{what}", "all", str(LIBRARY)]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@functools.cache
def ptx() -> dict[str, tuple[str, str]]:
    """Plain name of each kernel to its PTX, without the other kernels of its file, and its name there."""
    found = {}
    for content in _extract("ptx").values():
        head, *kernels = re.split(r"^(?=(?:\.\w+ )?\.entry)", content.decode(), flags=re.M)
        for text in kernels:
            name = re.search(r"\.entry\s+(\w+)", text)[1]
            found[plain_name(name)] = (head + text, name)
    return found


@functools.cache
def cubins(arch: str) -> dict[str, tuple[bytes, str]]:
    """Plain name of each kernel to its machine code's file for one architecture and its name there."""
    found = {}
    for file, content in _extract("elf").items():
        if file.split(".")[-2] == arch:
            for name in set(re.findall(rb"\.text\.(_ZN3moe\w+)", content)):
                found[plain_name(name.decode())] = (content, name.decode())
    if not found:
        raise RuntimeError(
            f"{LIBRARY.name} has no machine code for {arch}; build it with the MOE_KERNELS_CUDA_ARCHS of CMakeLists.txt"
        )
    return found
