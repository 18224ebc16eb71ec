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


def test_microkernel_objects_define_nothing_shared():
    # the linker keeps one copy of a weak symbol for the whole library: an AVX-512 one would crash an older processor
    objects = sorted((Path(__file__).parent.parent / "build").rglob("microkernels_*.dir/**/*table.cpp.o"))
    for path in objects:
        if {"sanitize", "emulated"} & set(path.parts):  # builds that only tests run
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
