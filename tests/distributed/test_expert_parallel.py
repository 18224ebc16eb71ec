"""ExpertParallel: outputs, gradients and bytes against one process; ranks with few tokens, or none; bad input.

The four ranks form a mesh of (4 / world_size, world_size): with a world of 2, two halves do the same and must agree.
"""

import copy
from functools import cache, partial

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

from moe_kernels import expert_ffn
from moe_kernels.distributed import ExpertParallel, expert_parallel_ffn
from moe_kernels.nn import MoEFeedForward
from moe_kernels.testing import assert_close_to_reference, random_routing
from tests.distributed.ranks import WORLD_SIZE

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 20, 12, 8, 3

#: tokens on each of four ranks; with fewer ranks, the first ranks get their neighbours' too
TOKENS = {"even": [6, 6, 6, 6], "uneven": [1, 9, 2, 5], "an empty rank": [0, 7, 0, 3], "no tokens": [0, 0, 0, 0]}
#: experts of every token instead of the router's choice
FORCED = {"routed": None, "all to one expert": [5, 5, 5], "of one rank": [6, 7, 6], "some skipped": [1, -1, 6]}


@cache
def mesh_of(world_size: int):
    return init_device_mesh("cpu", (WORLD_SIZE // world_size, world_size), mesh_dim_names=("data", "expert"))


def build(dtype: torch.dtype = torch.float32, **options) -> MoEFeedForward:
    torch.manual_seed(1)
    return MoEFeedForward(HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, **options).to(dtype)


def step(layer, x: Tensor, forced: Tensor | None, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one batch."""
    x = x.clone().requires_grad_()
    out = layer(x, forced)
    out.backward(grad)
    found = {"out": out.detach(), "grad of x": x.grad}
    found |= {f"grad of {name}": parameter.grad for name, parameter in layer.named_parameters()}
    return found


def batch(num_tokens: int, forced: list[int] | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return x, None if forced is None else torch.tensor(forced).expand(num_tokens, -1), grad


def share(world_size: int, tokens: list[int], rank: int) -> slice:
    """The tokens of a rank in a world."""
    each = [sum(part) for part in torch.tensor(tokens).view(world_size, -1).tolist()]
    return slice(sum(each[:rank]), sum(each[: rank + 1]))


def sharded_step(
    world_size: int, tokens: list[int], forced: list[int] | None, dtype: torch.dtype, options: dict
) -> dict:
    mesh = mesh_of(world_size)["expert"]
    layer = parallelize_module(build(dtype, **options), mesh, ExpertParallel())
    assert layer.gate_up_proj.placements == (Shard(0),) and layer.num_experts == EXPERTS
    assert layer.gate_up_proj.to_local().shape[0] == EXPERTS // world_size
    mine = share(world_size, tokens, mesh.get_local_rank())
    arguments = [None if argument is None else argument[mine] for argument in batch(sum(tokens), forced, dtype)]
    found = step(layer, *arguments)
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}


def one_process(results: list[dict], world_size: int, scale: int = 1) -> dict[str, Tensor]:
    """What one process would have: tokens one after another, gradients of what is replicated added up.

    scale: a layer's experts have the mean over the ranks, times their number it is the sum, exactly (a power of two).
    """
    for first, second in zip(results, results[world_size:], strict=False):  # the other halves of the mesh
        assert all(torch.equal(first[name], second[name]) for name in first)
    results = results[:world_size]
    together = {}
    for name, value in results[0].items():
        values = [result[name] for result in results]
        if name in OF_EXPERTS:
            assert all(torch.equal(value, other) for other in values)
            together[name] = value * scale
        else:
            together[name] = torch.cat(values) if name in OF_TOKENS else torch.stack(values).sum(0)
    return together


OF_TOKENS = ("out", "grad of x", "grad of topk_weights")
OF_EXPERTS = ("grad of gate_up_proj", "grad of down_proj")


def in_double(arguments: list) -> list:
    return [value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in arguments]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("forced", FORCED.values(), ids=FORCED)
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_equals_one_process(ranks, world_size, tokens, forced):
    check_against_one_process(ranks, world_size, tokens, forced, torch.float32, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype(ranks, dtype):
    check_against_one_process(ranks, 4, TOKENS["uneven"], None, dtype, {})


@pytest.mark.parametrize(
    "options",
    [
        {"shared_intermediate_size": 8, "shared_gate": True},
        {"num_identity_experts": 2, "num_null_experts": 2},
        {"router_bias": True, "balanced": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_kind_of_layer(ranks, options):
    check_against_one_process(ranks, 4, TOKENS["uneven"], None, torch.float32, options)


def check_against_one_process(ranks, world_size, tokens, forced, dtype, options):
    actual = one_process(ranks.run(sharded_step, world_size, tokens, forced, dtype, options), world_size, world_size)
    arguments = batch(sum(tokens), forced, dtype)
    layer = build(dtype, **options)
    eager = step(layer, *arguments)
    expected = step(copy.deepcopy(layer).double(), *in_double(arguments))
    for name, value in actual.items():
        assert_close_to_reference(value, expected[name], eager[name], name)
        if world_size == 1:
            assert torch.equal(value, eager[name]), f"{name}: not equal to the bit"


def ffn_step(ffn, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, grad: Tensor) -> dict:
    x, weights, gate_up, down = leaves = [leaf.clone().requires_grad_() for leaf in (x, weights, gate_up, down)]
    out = ffn(x, ids, weights, gate_up, down)
    out.backward(grad)
    names = ("grad of x", "grad of topk_weights", "grad of gate_up_proj", "grad of down_proj")
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in zip(names, leaves, strict=True)}


def ffn_arguments(num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    x, _, grad = batch(num_tokens, None, dtype)
    ids, weights = random_routing(num_tokens, EXPERTS, TOP_K, seed=3, skip=0.2)
    if num_tokens:
        ids[0] = torch.tensor([7, -1, 6])  # two experts of one rank, in falling order
    layer = build(dtype)
    return [x, ids, weights, layer.gate_up_proj.detach(), layer.down_proj.detach(), grad]


def sharded_ffn_step(world_size: int, tokens: list[int], dtype: torch.dtype, **options) -> dict:
    mesh = mesh_of(world_size)["expert"]
    rank, group = mesh.get_local_rank(), mesh.get_group()
    mine, experts = (
        share(world_size, tokens, rank),
        slice(rank * EXPERTS // world_size, (rank + 1) * EXPERTS // world_size),
    )
    x, ids, weights, gate_up, down, grad = ffn_arguments(sum(tokens), dtype)
    ffn = partial(expert_parallel_ffn, group=group, **options)
    found = ffn_step(ffn, x[mine], ids[mine], weights[mine], gate_up[experts], down[experts], grad[mine])
    for name in OF_EXPERTS:
        parts = [torch.empty_like(found[name]) for _ in range(world_size)]
        distributed.all_gather(parts, found[name], group=group)
        found[name] = torch.cat(parts)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_function_equals_one_process_to_the_bit_where_promised(ranks, world_size, dtype):
    tokens = TOKENS["uneven"]
    actual = one_process(ranks.run(sharded_ffn_step, world_size, tokens, dtype), world_size)
    arguments = ffn_arguments(sum(tokens), dtype)
    kernel = ffn_step(expert_ffn, *arguments)
    eager = ffn_step(partial(expert_ffn, backend="reference"), *arguments)
    expected = ffn_step(partial(expert_ffn, backend="reference"), *in_double(arguments))
    for name, value in actual.items():
        assert_close_to_reference(value, expected[name], eager[name], name)
    # an expert adds its rows in one process' order; a weight's gradient and a token whose experts share a rank are sums
    # of one rank
    for name in (*OF_EXPERTS, "grad of topk_weights"):
        assert torch.equal(actual[name], kernel[name]), f"{name}: not equal to the bit"
    owners = arguments[1].where(arguments[1] < EXPERTS, -1) // (EXPERTS // world_size)
    on_one = torch.tensor([len({*row} - {-1}) <= 1 for row in owners.tolist()])
    assert on_one.any()
    for name in ("out", "grad of x"):
        assert torch.equal(actual[name][on_one], kernel[name][on_one]), f"{name}: not equal to the bit"


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_token_has_the_same_bits_wherever_it_starts(ranks, world_size):
    tokens = [[4, 4, 4, 4], [1, 9, 2, 4], [0, 16, 0, 0]]
    results = [one_process(ranks.run(sharded_ffn_step, world_size, each, torch.float32), world_size) for each in tokens]
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name
