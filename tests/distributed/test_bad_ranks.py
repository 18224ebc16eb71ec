"""Ranks that do not fit together, that end or that hang: every other rank gets an error which says so."""

import contextlib
import os
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from moe_kernels import expert_ffn
from moe_kernels.distributed import ExpertParallel, expert_parallel_ffn, ffn, shard_experts
from moe_kernels.nn import MoEFeedForward, feed_forward
from tests.distributed.ranks import Ranks
from tests.distributed.test_expert_parallel import mesh_of


class Model(nn.Module):
    def __init__(self, hidden_size: int = 8, num_experts: int = 8, **options):
        super().__init__()
        self.mlp = MoEFeedForward(hidden_size, 4, num_experts, 2, **options)


def failure(ranks, function, *arguments) -> list[str]:
    """The last line of every rank's traceback."""
    outcomes = ranks.outcomes(function, *arguments)
    assert all(failed is not None for _, failed in outcomes), outcomes
    return [failed.strip().splitlines()[-1] for _, failed in outcomes]


def build_unlike(rank: int, options: dict) -> None:
    mine = options if distributed.get_rank() == rank else {}
    shard_experts(Model(**mine), mesh_of(4)["expert"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_size": 12}, r"gate_up_proj must be the same on all ranks of the expert group, got [8, 8, 8] "
            "torch.float32 on rank 0 and [8, 8, 12] torch.float32 on rank 2"),
        ({"num_experts": 12}, "got [8, 8, 8] torch.float32 on rank 0 and [12, 8, 8] torch.float32 on rank 2"),
        ({"dtype": torch.bfloat16}, "got [8, 8, 8] torch.float32 on rank 0 and [8, 8, 8] torch.bfloat16 on rank 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_layers_that_differ(ranks, options, message):
    for line in failure(ranks, build_unlike, 2, options):
        assert line.startswith("ValueError: ExpertParallel: mlp: ") and message in line


def cannot_spread(rank: int) -> None:
    model = Model()
    if distributed.get_rank() == rank:
        del model.mlp.gate_up_proj
        model.mlp.gate_up_proj = torch.ones(8, 8, 8)
    shard_experts(model, mesh_of(4)["expert"])


def test_a_layer_that_one_rank_cannot_spread(ranks):
    lines = failure(ranks, cannot_spread, 2)
    own = "ValueError: ExpertParallel: mlp: gate_up_proj must be a plain parameter, got Tensor; shard it once, before"
    assert lines[2].startswith(own)
    for line in (lines[0], lines[1], lines[3]):
        assert line.startswith(
            "RuntimeError: ExpertParallel: mlp: all ranks must be able to spread the layer, but rank 2"
        )
        assert f"rank 2: {own}" in line


def forward_unlike(rank: int, how: str) -> None:
    model = shard_experts(Model(), mesh_of(4)["expert"])
    x = torch.randn(3, 8, requires_grad=True)
    odd = distributed.get_rank() == rank
    with torch.autocast("cpu", torch.bfloat16, enabled=odd and how == "dtype"):
        with torch.set_grad_enabled(not (odd and how == "gradients")):
            model.mlp(x)


@pytest.mark.parametrize(
    "how, message",
    [
        ("dtype", "dtype of hidden_states must be the same on all ranks of the expert group, got torch.float32 on "
            "rank 0 and torch.bfloat16 on rank 1"),
        ("gradients", "who needs a gradient must be the same on all ranks of the expert group, got hidden_states and "
            "topk_weights on rank 0 and neither on rank 1"),
    ],
    ids=["dtype", "gradients"],
)  # fmt: skip
def test_calls_that_differ(ranks, how, message):
    for line in failure(ranks, forward_unlike, 1, how):
        assert line.startswith("ValueError: ExpertParallel: mlp: ") and message in line


def forward_of_one(rank: int, bad: dict) -> None:
    arguments = {"hidden_states": torch.randn(3, 8), "topk_ids": torch.zeros(3, 2, dtype=torch.int32)}
    arguments |= {"topk_weights": torch.ones(3, 2)} | (bad if distributed.get_rank() == rank else {})
    weights = torch.randn(2, 8, 8), torch.randn(2, 8, 4)
    group = distributed.group.WORLD
    expert_parallel_ffn(*arguments.values(), *weights, group=group, layer="layer 5")


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"topk_weights": torch.ones(3, 1)}, "ValueError: ExpertParallel: layer 5: topk_weights must be of shape "
            "[3, 2] like topk_ids, got [3, 1]"),
        ({"topk_ids": torch.zeros(4, 2, dtype=torch.int32)}, "ValueError: ExpertParallel: layer 5: topk_ids must be of "
            "shape [num_tokens=3, top_k], got [4, 2]"),
        ({"topk_ids": torch.zeros(3, 2)}, "TypeError: ExpertParallel: layer 5: topk_ids must be one of torch.int32"),
        ({"hidden_states": torch.zeros(3, 8).long()}, "TypeError: ExpertParallel: layer 5: hidden_states must be one"),
        ({"hidden_states": torch.zeros(8)}, "ValueError: ExpertParallel: layer 5: hidden_states must be of shape "),
    ],
    ids=["weights", "tokens", "float ids", "integers", "dimensions"],
)  # fmt: skip
def test_an_error_of_one_rank_reaches_all(ranks, bad, message):
    lines = failure(ranks, forward_of_one, 2, bad)
    assert lines[2].startswith(message)
    for line in (lines[0], lines[1], lines[3]):
        assert "RuntimeError: ExpertParallel: layer 5" in line and "ranks [2] met an error before it" in line


def layer_of_one(rank: int) -> None:
    layer = shard_experts(Model(), mesh_of(4)["expert"]).mlp
    layer(hidden_states=torch.randn(3, 12 if distributed.get_rank() == rank else 8))


def test_a_wrong_input_of_one_rank_reaches_all(ranks):
    lines = failure(ranks, layer_of_one, 1)
    assert lines[1].startswith(
        "ValueError: ExpertParallel: mlp: hidden_states must be of shape [..., hidden_size=8], got"
    )
    for line in (lines[0], lines[2], lines[3]):
        assert "RuntimeError: ExpertParallel: mlp" in line and "ranks [1] met an error before it" in line


def shard(kind: str) -> None:
    mesh = mesh_of(4)["expert"]
    if kind == "divisible":
        shard_experts(Model(num_experts=6), mesh)
    elif kind == "dimensions":
        shard_experts(Model(), mesh_of(2))
    elif kind == "twice":
        shard_experts(shard_experts(Model(), mesh), mesh)
    elif kind == "no experts":
        shard_experts(nn.Linear(2, 2), mesh)
    elif kind == "another class":
        parallelize_module(nn.Linear(2, 2), mesh, ExpertParallel())
    elif kind == "without a name":
        parallelize_module(Model(num_experts=6), mesh, {"mlp": ExpertParallel()})


@pytest.mark.parametrize(
    "kind, message",
    [
        ("divisible", "ValueError: ExpertParallel: mlp: num_experts must be a multiple of the 4 ranks, got 6; choose"),
        ("dimensions", "ValueError: ExpertParallel: mlp: device_mesh must be of one dimension, got 2; give the dim"),
        ("twice", "ValueError: ExpertParallel: mlp: gate_up_proj must be a plain parameter, got DTensor; shard it"),
        ("no experts", "ValueError: shard_experts: model must be one with a MoEFeedForward or an experts module of"),
        ("another class", "TypeError: ExpertParallel: module must be a MoEFeedForward or an experts module of trans"),
        ("without a name", "ValueError: ExpertParallel: MoEFeedForward(hidden_size=8, intermediate_size=4, num_"),
    ],
)  # fmt: skip
def test_refusals(ranks, kind, message):
    for line in failure(ranks, shard, kind):
        assert line.startswith(message)


#: seconds of a process group; the ranks give each other two more to say that they wait
PATIENCE = 3
WAITING = "ExpertParallel: mlp: all ranks of the expert group must reach this exchange"


@pytest.fixture(scope="module")
def three():
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    ranks = Ranks(3)
    yield ranks
    ranks.close()


def step_with_an_error(where: str, chunk_tokens: int | None) -> tuple[float, str]:
    """Seconds until this rank's error, and the error; rank 1 meets one of its own and lives on."""
    distributed.barrier()
    group = distributed.new_group(timeout=timedelta(seconds=PATIENCE))
    model, mesh = Model(num_experts=6, shared_intermediate_size=4), DeviceMesh.from_group(group, "cpu")
    layer = shard_experts(model, mesh, chunk_tokens=chunk_tokens).mlp
    x, calls = torch.randn(3, 8, requires_grad=True), []

    def broken(hidden_states, *arguments, **options):
        if arguments[2].shape[0] == 1:
            breaks = where == "shared expert"
        else:
            calls.append(hidden_states)
            breaks = where == "experts" or (where, len(calls)) == ("again", 3)
        if breaks:
            raise ArithmeticError("broken experts")
        return expert_ffn(hidden_states, *arguments, **options)

    begin = time.monotonic()
    try:
        with contextlib.ExitStack() as patches:
            if distributed.get_rank() == 1:
                if where in ("router", "routing hook"):
                    broken_router = lambda *_: [][0]  # noqa: E731
                    if where == "router":
                        layer.router.register_forward_hook(broken_router)
                    else:
                        layer.register_routing_hook(broken_router)
                for module in (ffn, feed_forward):
                    patches.enter_context(mock.patch.object(module, "expert_ffn", broken))
            out = layer(x)
            if where == "between" and distributed.get_rank() == 1:
                raise ArithmeticError("between layers")
            if where == "backward" and distributed.get_rank() == 1:
                out.register_hook(lambda _: [][0])
            out.sum().backward()
    except Exception as error:
        return time.monotonic() - begin, f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


@pytest.mark.parametrize("chunk_tokens", [None, 2])
@pytest.mark.parametrize(
    "where, own, told",
    [
        ("router", "IndexError", "ranks [1] met an error before it; rank 1: IndexError: list index out of range"),
        ("routing hook", "IndexError", "ranks [1] met an error before it; rank 1: IndexError: list index out of range"),
        ("shared expert", "ArithmeticError", "; rank 1 met ArithmeticError: broken experts in mlp"),
        ("experts", "ArithmeticError", "; rank 1 met ArithmeticError: broken experts in mlp"),
        ("between", "ArithmeticError", "; ranks [1] did not come"),
        ("backward", "IndexError", "; ranks [1] did not come"),
    ],
    ids=lambda value: value if value in ("router", "routing hook", "shared expert", "experts", "between") else "",
)
def test_an_error_anywhere_on_one_rank_reaches_all(three, where, own, told, chunk_tokens):
    outcomes = three.run(step_with_an_error, where, chunk_tokens)
    assert outcomes[1][1].startswith(own)
    for seconds, error in (outcomes[0], outcomes[2]):
        assert WAITING in error and told in error
        # told by the exchange itself: at once
        assert seconds < (PATIENCE if "before it" in told else PATIENCE + 5)


def test_an_error_in_the_backward_of_chunks_reaches_all(three):
    outcomes = three.run(step_with_an_error, "again", 2)  # two chunks forward, and run again for backward
    assert outcomes[1][1] == "ArithmeticError: broken experts"
    for _, error in (outcomes[0], outcomes[2]):
        assert WAITING in error and "; rank 1 met ArithmeticError: broken experts in mlp" in error


def step_with_a_fault(fault: str, where: str) -> float:
    """Seconds until this rank's error; the last rank ends or hangs in the middle of a layer."""
    distributed.barrier()  # ranks start at their own time, and the group is impatient
    group = distributed.new_group(timeout=timedelta(seconds=PATIENCE))
    layer = shard_experts(Model(), DeviceMesh.from_group(group, "cpu")).mlp
    x = torch.randn(3, 8, requires_grad=True)

    def strike(*_):
        if distributed.get_rank() == distributed.get_world_size() - 1:
            if fault == "ends":
                os._exit(1)
            time.sleep(PATIENCE + 3)

    if where == "forward":  # the router has run, the experts have not
        layer.register_routing_hook(strike)
    begin = time.monotonic()
    try:
        out = layer(x)
        if where == "backward":
            strike()
        out.sum().backward()
    except RuntimeError as error:
        assert WAITING in str(error) and "timeout; ranks [1] did not come; see its own error" in str(error), error
        return time.monotonic() - begin
    raise AssertionError("no error")


@pytest.mark.parametrize("fault, where", [("ends", "forward"), ("ends", "backward"), ("hangs", "forward")])
def test_a_rank_that_ends_or_hangs(fault, where):
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    ranks = Ranks(2)
    try:
        (seconds, failed), (_, other) = ranks.outcomes(step_with_a_fault, fault, where)
        assert failed is None, failed
        assert seconds < 10
        assert (other == "died") == (fault == "ends")
    finally:
        ranks.close()
