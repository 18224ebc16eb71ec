"""The mended Triton interpreter: bfloat16 as PyTorch has it, and addresses outside the tensors as errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed; pip install triton")


def test_cases_under_the_interpreter():
    """Triton is an interpreter or a compiler for a whole process, so the cases have one of their own."""
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/interpreted_cases.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_install_refuses_a_compiling_process():
    from . import triton_interpreter

    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
            triton_interpreter.install()
