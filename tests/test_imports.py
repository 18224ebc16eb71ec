"""Importing: in fresh processes, with parts of the installation taken away."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moe_kernels

PACKAGE = Path(moe_kernels.__file__).parent


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def output(code: str, **environment: str) -> str:
    process = python(code, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


RUN_AN_OP = """
import torch, moe_kernels
plan = moe_kernels.plan_dispatch(torch.tensor([[1], [0]], dtype=torch.int32), 2)
print(moe_kernels.permute(torch.tensor([[1.0], [2.0]]), plan).flatten().tolist())
"""


def test_importing_pulls_in_neither_triton_nor_transformers():
    heavy = "('triton', 'transformers', 'matplotlib', 'rich', 'tqdm', 'torch.distributed.tensor')"
    code = "import torch, sys; before = set(sys.modules); import moe_kernels;"
    assert output(code + f"print([m for m in {heavy} if m in set(sys.modules) - before])") == "[]"


def test_without_triton():
    assert output("import sys; sys.modules['triton'] = None" + RUN_AN_OP) == "[2.0, 1.0]"


def test_without_the_compiled_part(tmp_path):
    link = tmp_path / "moe_kernels"
    link.mkdir()
    for path in PACKAGE.iterdir():
        if path.suffix != ".so":
            (link / path.name).symlink_to(path)
    environment = {"PYTHONPATH": str(tmp_path)}
    assert output(RUN_AN_OP, **environment) == "[2.0, 1.0]"
    process = python(RUN_AN_OP.replace("plan)", "plan, backend='native')"), **environment)
    assert "RuntimeError: permute: backend='native' is unavailable: libmoe_kernels_cpu.so is not in" in process.stderr
    assert "use backend='reference'" in process.stderr


def test_default_backend_from_the_environment():
    code = "from moe_kernels import _dispatch; print(_dispatch.resolve('op', 'auto', 'cpu'))"
    assert output(code, MOE_KERNELS_BACKEND="reference") == "reference"
    process = python("import moe_kernels", MOE_KERNELS_BACKEND="cuda")
    assert "MOE_KERNELS_BACKEND must be one of auto, reference, native, triton, got 'cuda'" in process.stderr


def test_log_names_op_and_backend():
    process = python(RUN_AN_OP, MOE_KERNELS_LOG="1")
    assert "moe_kernels: permute backend=" in process.stderr


def test_beside_the_other_package_of_this_name(tmp_path):
    info = tmp_path / "moe_kernels-0.8.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moe-kernels\nVersion: 0.8.2\n")
    process = python("import moe_kernels", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert "ImportError: moe_kernels: the distribution moe-kernels 0.8.2 is installed beside" in process.stderr
    assert "pip uninstall moe-kernels" in process.stderr


def test_public_names_are_there_and_documented():
    for name in moe_kernels.__all__:
        assert getattr(moe_kernels, name).__doc__, name


def test_forced_kernel_set():
    host = pytest.importorskip("moe_kernels._host")
    code = "from moe_kernels import _host; print(_host.chosen_isa());" + RUN_AN_OP
    for isa in host.runnable_isas():
        assert output(code, MOE_KERNELS_CPU_ISA=isa) == f"{isa}\n[2.0, 1.0]"
    process = python(RUN_AN_OP, MOE_KERNELS_CPU_ISA="sse9")
    assert process.returncode != 0 and "MOE_KERNELS_CPU_ISA must be one of portable" in process.stderr
