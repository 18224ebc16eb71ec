"""The execution model itself: right kernels run clean in every build and order, each fault is reported."""

import re
import subprocess

import pytest
import torch

from tests.gpu.shim import library
from tests.gpu.shim.exercise import sanitized

pytestmark = pytest.mark.skipif(library.missing_reason() is not None, reason=str(library.missing_reason()))

WRONG = ""  # no report: the numbers are wrong

#: fault of selftest.cpp -> the build that must see it, and what it must say
FAULTS = {
    "weak_wait": ("plain", WRONG),
    "no_barrier_after_wait": ("tsan", "data race"),
    "no_barrier_before_sums": ("tsan", "data race"),
    "blocks_race": ("tsan", "data race"),
    "uninitialised": ("plain", WRONG),
    "short_shared": ("plain", r"wrote outside shared array sums of 12 bytes"),
    "all_threads_copy": ("asan", "heap-buffer-overflow"),
    "read_past_the_end": ("asan", "heap-buffer-overflow"),
    "barrier_in_one_warp": (
        "plain",
        r"(?s)divergence: block .* reached __syncthreads at different places.*selftest.cpp",
    ),
    "two_barriers": ("plain", r"divergence: block \(\d, 0, 0\) reached __syncthreads at different places"),
    "exit_before_barrier": ("plain", r"threads 77 have exited"),
    "lane_missing": ("plain", r"threads 3, 35, 67, 99 have exited"),
    "half_mask": ("plain", r"is not in its own mask|reads lane \d+, which is not in its mask"),
    "warps_wait_for_each_other": ("plain", r"(?s)deadlock in block.*__syncwarp\(mask 0xffffffff\).*__ballot_sync"),
    "too_many_threads": ("plain", "launch refused: 1025 threads"),
    "too_much_shared": ("plain", "launch refused: 300000 bytes of dynamic shared memory"),
}


def selftest(flavour: str, fault: str, seed: int = 0) -> subprocess.CompletedProcess:
    program = library.build([library.SHIM / "selftest.cpp"], "selftest", flavour, program=True)
    command, environment = sanitized([str(program), fault, str(seed)], flavour)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("flavour", library.FLAVOURS)
def test_right_kernels_run_clean_in_any_order(flavour):
    for seed in range(5):
        process = selftest(flavour, "none", seed)
        assert process.returncode == 0, process.stderr
        assert process.stderr == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_reported(fault):
    flavour, report = FAULTS[fault]
    process = selftest(flavour, fault)
    if report == WRONG:
        assert process.returncode == 1, process.stderr
    else:
        assert process.returncode not in (0, 1)
        assert re.search(report, process.stderr), process.stderr


def test_an_error_in_a_kernel_is_an_exception_and_the_next_launch_works():
    ops = library.load() and getattr(torch.ops, library.NAMESPACE)
    with pytest.raises(RuntimeError, match="num_groups must be at most"):
        ops.route(torch.zeros(1, 8192), None, 1, 0, False, 1.0, 4096, 1, 0, 0)
    ids, _ = ops.route(torch.zeros(1, 4), None, 1, 0, False, 1.0, 1, 1, 0, 0)
    assert ids.tolist() == [[0]]


def test_a_launch_past_the_limits_is_refused_before_it():
    """Rows of 2-byte elements that no wide access fits, and one block more along them than a grid has."""
    ops = library.load() and getattr(torch.ops, library.NAMESPACE)
    index = torch.zeros(1, dtype=torch.int32)
    for op, columns in ((ops.permute, 128), (lambda x, i: ops.unpermute(x, i[:, None], None), 64)):
        longest = torch.ones(1, 65535 * columns - 1, dtype=torch.bfloat16)
        assert op(longest, index).all()
        with pytest.raises(
            RuntimeError, match="hidden_size must take fewer than 65536 blocks, got 65536 for hidden_size="
        ):
            op(torch.ones(1, 65535 * columns + 1, dtype=torch.bfloat16), index)


# every bfloat16 and float16 number, and the float32 numbers between two of them, the halfway ones included
def test_conversions_round_as_pytorch_does():
    ops = library.load() and getattr(torch.ops, library.NAMESPACE)
    plan = torch.zeros(1, 1, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float16):
        exact = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        exact = exact[exact.isfinite()].float().sort().values
        weights = (exact[:-1] + exact[1:]) / 2
        weights = torch.cat([exact, weights, weights.nextafter(weights + 1), weights.nextafter(weights - 1)])
        rows = torch.ones(1, 1, dtype=dtype).expand(weights.numel(), 1)
        out = ops.unpermute(
            rows.contiguous(), torch.arange(weights.numel(), dtype=torch.int32)[:, None], weights[:, None].contiguous()
        )
        assert torch.equal(out[:, 0], weights.to(dtype)), dtype
        back = ops.unpermute(exact.to(dtype)[:1, None], plan, None)
        assert torch.equal(back, exact.to(dtype)[:1, None])
