"""Runs every op that has a CUDA kernel through the shim and compares it with the reference, in a process of its own.

``MOE_KERNELS_TEST_SIMT`` names the build (a sanitizer has to be preloaded: :func:`run` does it);
``MOE_KERNELS_TEST_SIMT_SOURCE`` a changed source that stands in for the one of its name.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.gpu.shim.library import ROOT

PRELOAD = {"plain": (), "asan": ("libasan.so", "libubsan.so"), "tsan": ("libtsan.so",), "ucontext": ()}


def sanitized(command: list[str], flavour: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment under which a build of this flavour runs, in a program or loaded by Python."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in PRELOAD[flavour]
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=99",
    }
    # ThreadSanitizer's shadow memory does not fit every random address space layout
    return (["setarch", "-R", *command] if flavour == "tsan" else command), environment


def run(flavour: str, changed_source: Path | None = None) -> subprocess.CompletedProcess:
    """This file in a fresh process; it exits with 0 where every result is right and no sanitizer complains."""
    command = [sys.executable, "-m", "tests.gpu.shim.exercise"]
    settings = {
        "MOE_KERNELS_TEST_SIMT": flavour,
        "MOE_KERNELS_TEST_SIMT_SOURCE": str(changed_source or ""),
        "OMP_NUM_THREADS": "1",
    }
    command, environment = sanitized(command, flavour)
    return subprocess.run(
        command, cwd=ROOT, env={**environment, **settings}, capture_output=True, text=True, timeout=600
    )


def exercise_permute(seed: int) -> None:
    import torch

    from moe_kernels import permute, plan_dispatch, unpermute
    from moe_kernels.testing import random_routing
    from tests.ops.helpers import check

    # one tile with several warps, two tiles, more experts than one pass takes
    for num_tokens, num_experts, top_k, hidden_size in [(70, 6, 3, 40), (530, 5, 4, 8), (9, 1100, 2, 2100)]:
        topk_ids, weights = random_routing(num_tokens, num_experts, top_k, seed=seed, skip=0.2)
        plan = plan_dispatch(topk_ids, num_experts, backend="native")
        for actual, expected in zip(plan, plan_dispatch(topk_ids, num_experts, backend="reference"), strict=True):
            assert torch.equal(actual, expected), "plan_dispatch"
        for dtype in (torch.float32, torch.bfloat16):
            for size in (hidden_size, hidden_size - 1):
                x = torch.randn(num_tokens, size).to(dtype)
                rows = torch.randn(num_tokens * top_k, size).to(dtype)
                check(lambda x, backend, plan=plan: permute(x, plan, backend=backend), [x], "native")
                op = lambda rows, w, backend, plan=plan: unpermute(rows, plan, w, backend=backend)  # noqa: E731
                check(op, [rows, weights], "native")
    empty = plan_dispatch(torch.zeros(0, 2, dtype=torch.int32), 3, backend="native")
    assert empty.expert_offsets.tolist() == [0] * 4


def exercise_route(seed: int) -> None:
    import torch

    from moe_kernels import route, route_weights
    from tests.ops.helpers import check

    # registers of a lane: 2, 8, 16 and none; a token more than the blocks have warps
    for num_experts in (12, 200, 300, 600):
        for arguments in (
            dict(top_k=3, renormalize=True),
            dict(top_k=3, scaling_factor=2.5, num_null_experts=num_experts - 2),
            dict(
                top_k=4, score="sigmoid", num_groups=4, topk_groups=2, group_score="top2_sum",
                expert_bias=0.1 * torch.randn(num_experts),
            ),
        ):  # fmt: skip
            logits = torch.randn(9, num_experts)
            ids, _ = route(logits, **arguments, backend="native")
            assert torch.equal(ids, route(logits, **arguments, backend="reference")[0]), "route"
            check(lambda x, backend, a=arguments: route(x, **a, backend=backend)[1], [logits], "native")
            check(
                lambda x, backend, ids=ids: route_weights(x, ids, renormalize=True, backend=backend), [logits], "native"
            )
    ties = torch.zeros(5, 40)
    assert route(ties, 3, backend="native")[0].tolist() == [[0, 1, 2]] * 5, "ties"


def exercise_task_vector(seed: int) -> None:
    import torch

    from moe_kernels import apply_
    from tests.gpu.exercises import exercise_many_blocks, exercise_task_vector
    from tests.gpu.shim import library
    from tests.ops.test_task_vector import same_bits, ternary, weights

    exercise_task_vector("native")
    for dtype in (torch.float16, torch.float64):
        for size in (1, 65, 4097):
            weight, delta = weights(size, dtype), ternary(size, 0.5)
            expected = weight.clone()
            apply_(expected, delta, backend="reference")
            apply_(weight, delta, backend="native")
            assert same_bits(weight, expected), "apply_"
    if library.flavour() != "tsan":  # two million threads
        exercise_many_blocks("native")


def shared(name: str):
    """An exercise that the interpreters run too."""

    def run_it(seed: int) -> None:
        from tests.gpu.exercises import EXERCISES

        EXERCISES[name]("native")

    return run_it


def exercise_logit_fusion(seed: int) -> None:
    from tests.gpu import exercises

    exercises.exercise_logit_fusion("native", exercises.WEIGHED_SOURCES, ("logits", "log_probs", "probs"))
    exercises.exercise_logit_fusion("native", exercises.BOUNDED_SOURCES, ("log_probs",))
    exercises.exercise_logit_rows("native")


EXERCISES = {
    "plan_dispatch_cuda.cu": exercise_permute,
    "permute_cuda.cu": exercise_permute,
    "route_cuda.cu": exercise_route,
    "task_vector_cuda.cu": exercise_task_vector,
    "decode_cuda.cu": shared("decode"),
    "logit_fusion_cuda.cu": exercise_logit_fusion,
    "merge_cuda.cu": shared("merge"),
    "ternary_linear_cuda.cu": shared("ternary_linear"),
}


def main() -> None:
    import pytest
    import torch

    import moe_kernels  # noqa: F401
    from tests.gpu.shim import library

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    changed = os.environ.get("MOE_KERNELS_TEST_SIMT_SOURCE")  # what is not changed need not run
    exercises = [EXERCISES[Path(changed).name]] if changed else list(dict.fromkeys(EXERCISES.values()))
    with pytest.MonkeyPatch.context() as patch:
        library.redirect(patch)
        for seed in range(1 if library.flavour() == "tsan" else 2):  # it runs a hundred times slower
            for exercise in exercises:
                library.set_seed(seed)
                torch.manual_seed(seed)
                exercise(seed)


if __name__ == "__main__":
    main()
