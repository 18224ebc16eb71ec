"""What must hold of the compiled library beyond its results."""

import shutil
import subprocess
from pathlib import Path

import pytest

import moe_kernels
from moe_kernels import _extension

LIBRARY = Path(moe_kernels.__file__).parent / "libmoe_kernels_cpu.so"

pytestmark = [
    pytest.mark.skipif(_extension.cpu_missing_reason() is not None, reason=str(_extension.cpu_missing_reason())),
    pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed"),
]

ISAS = ["portable", "avx2", "avx512", "avx512_bf16"]


def symbols() -> list[tuple[str, str]]:
    listing = subprocess.run(["nm", "--demangle", LIBRARY], capture_output=True, text=True, check=True).stdout
    return [(line.split()[1], line) for line in listing.splitlines() if len(line.split()) >= 3]


def test_no_weak_symbol_was_compiled_for_one_instruction_set():
    # the linker keeps one copy of a weak symbol for the whole library: an AVX-512 one would crash an older processor
    weak = [line for kind, line in symbols() if kind in "WwVu"]
    assert weak, "nm lists symbols"
    for line in weak:
        assert not any(f"moe::{isa}::" in line for isa in ISAS), line


def test_microkernel_objects_define_nothing_shared():
    # the same, seen from the objects: all that they define is local or their table
    objects = sorted((Path(__file__).parent.parent / "build").rglob("microkernels_*.dir/**/table.cpp.o"))
    for path in objects:
        if "sanitize" in str(path):
            continue
        listing = subprocess.run(["nm", "--demangle", path], capture_output=True, text=True, check=True).stdout
        shared = [line for line in listing.splitlines() if " W " in line or " V " in line or " u " in line]
        assert shared == [], path
    if not objects:
        pytest.skip("no build folder beside the tests")


def test_depends_on_no_python_and_no_cuda():
    needed = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True).stdout
    libraries = [line.split("[")[1].rstrip("]") for line in needed.splitlines() if "(NEEDED)" in line]
    assert "libtorch_cpu.so" in libraries
    assert not any("python" in name or "cuda" in name or "gomp" in name for name in libraries), libraries


def test_build_info_names_the_kernel_set():
    info = _extension.build_info()
    assert info["kernel set"] in info["runnable kernel sets"].split(", ")
