"""The demo that trains on real text: the same curve in one process and on four ranks, and what torchrun starts."""

import json
import os
import subprocess
import sys

import pytest
import torch

from moe_kernels.demo.over_ranks import train
from moe_kernels.testing import assert_close_to_reference

STEPS = 8


@pytest.fixture(scope="module")
def alone() -> torch.Tensor:
    return torch.tensor(train(STEPS, 1, 1, torch.float64, 0), dtype=torch.float64)


@pytest.mark.parametrize("experts_over, split_over", [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4), (1, 2)])
def test_curve_equals_one_process(ranks, alone, experts_over, split_over):
    assert alone[-1] < alone[0] - 0.5
    for curve in ranks.run(train, STEPS, experts_over, split_over, torch.float64, 0):
        assert_close_to_reference(torch.tensor(curve, dtype=torch.float64), alone, alone, "curve")


@pytest.mark.parametrize("layout", [(4, 1), (2, 2)], ids=str)
def test_two_runs_have_the_same_bits(ranks, layout):
    first, second = (ranks.run(train, STEPS, *layout, torch.float32, 0) for _ in range(2))
    assert first == second


def test_started_by_torchrun(ranks, alone, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += ["-m", "moe_kernels.demo.over_ranks", "--steps", str(STEPS), "--dtype", "float64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "curve.json"
    done = subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"step {STEPS:4d}  loss" in done.stdout
    curve = torch.tensor(json.loads(out.read_text()), dtype=torch.float64)
    assert_close_to_reference(curve, alone, alone, "curve")
    assert curve.tolist() == ranks.run(train, STEPS, 4, 1, torch.float64, 0)[0]  # to the bit
    done = subprocess.run(
        [*command, "--experts-over", "3"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0 and "--experts-over=3 times --split-over=1 must divide the 4 ranks" in done.stderr
