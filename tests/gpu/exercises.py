"""Short runs of the rooms' ops against the reference, made so that a changed kernel shows: ragged sizes, rows that are
further apart than they are long, ties, skipped pairs, more slots and experts than a kernel takes at once.
"""

from collections.abc import Callable

import torch

from moe_kernels import permute, plan_dispatch, route, route_weights, unpermute
from moe_kernels.testing import random_routing
from tests.ops.helpers import check, strided

from .ptx import Fault


def exercise_plan(backend: str, num_tokens: int, num_experts: int, top_k: int) -> None:
    topk_ids = strided(random_routing(num_tokens, num_experts, top_k, skip=0.2)[0].long())
    topk_ids[0, 0] = 1 - 2**32  # its lower half would be an expert
    results = [plan_dispatch(topk_ids, num_experts, backend=name) for name in (backend, "reference")]
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def exercise_permute(backend: str) -> None:
    topk_ids, weights = random_routing(9, 50, 40, skip=0.2)  # 40: the CUDA backward takes 32 at once
    plan = plan_dispatch(topk_ids, 50, backend="reference")
    x, rows = torch.randn(9, 272)[:, :264], torch.randn(360, 272)[:, :264]
    assert torch.equal(permute(x, plan, backend=backend), permute(x, plan, backend="reference"))
    check(lambda rows, w, backend: unpermute(rows, plan, w, backend=backend), [rows, weights], backend)


def exercise_route(backend: str) -> None:
    arguments = dict(top_k=3, renormalize=True, num_groups=4, topk_groups=2, group_score="top2_sum")
    logits = strided(torch.randn(5, 60).round())  # with ties
    ids, _ = route(logits, **arguments, backend=backend)
    assert torch.equal(ids, route(logits, **arguments, backend="reference")[0])
    check(lambda x, backend: route(x, **arguments, backend=backend)[1], [logits], backend)
    check(lambda x, backend: route_weights(x, ids, backend=backend), [logits], backend)


EXERCISES: dict[str, Callable[[str], None]] = {
    "one tile": lambda backend: exercise_plan(backend, 500, 9, 4),
    "two passes": lambda backend: exercise_plan(backend, 40, 2600, 3),
    "two tiles": lambda backend: exercise_plan(backend, 600, 1100, 4),
    "permute": exercise_permute,
    "route": exercise_route,
}


def report_of(name: str, backend: str) -> str:
    """What an exercise finds wrong: a fault of the interpreter, other numbers, or nothing."""
    try:
        EXERCISES[name](backend)
    except Fault as fault:
        return str(fault)
    except AssertionError as error:
        return f"numbers: {error}"
    return "nothing"
