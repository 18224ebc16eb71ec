"""The op tests on Triton's interpreter, in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_kernels import _extension

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(_extension.triton_missing_reason() is not None, reason=str(_extension.triton_missing_reason()))
@pytest.mark.parametrize(
    "room",
    [
        "permute", "route", "grouped_gemm", "expert_ffn", "merge", "task_vector", "task_vector_decode",
        "ternary_linear", "routed_lora", "logit_fusion",
    ],
)  # fmt: skip
def test_ops_in_the_interpreter(room):
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/ops/test_{room}.py", "-k", "triton-cpu"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    assert process.returncode == 0, process.stdout[-4000:]
    assert " passed" in process.stdout
