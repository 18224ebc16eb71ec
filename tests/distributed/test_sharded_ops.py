"""routed_lora and apply_ on DTensors against the whole op."""

from functools import partial

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import moe_kernels
from moe_kernels import TernaryDelta, compress, routed_lora
from moe_kernels.distributed import apply_, expert_parallel_lora, unapply_
from moe_kernels.testing import assert_close_to_reference, random_routing
from tests.distributed.test_bad_ranks import failure
from tests.distributed.test_expert_parallel import TOKENS, in_double, mesh_of, share

IN, OUT, RANK, ADAPTERS = 12, 10, 3, 8


def lora_arguments(num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((num_tokens, IN), (ADAPTERS, RANK, IN), (ADAPTERS, OUT, RANK), (num_tokens, OUT), (num_tokens, OUT))
    x, lora_a, lora_b, base, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    ids, weights = random_routing(num_tokens, ADAPTERS, 3, seed=6)
    ids[::4, 1] = -1
    return [x, lora_a, lora_b, ids, weights, base, grad]


def lora_step(lora, x, lora_a, lora_b, ids, weights, base, grad) -> dict[str, Tensor]:
    leaves = [leaf.clone().detach().requires_grad_() for leaf in (x, lora_a, lora_b, weights, base)]
    x, lora_a, lora_b, weights, base = leaves
    out = lora(x, lora_a, lora_b, ids, weights, scaling=0.5, base=base)
    out.backward(grad)
    names = ("x", "lora_a", "lora_b", "weights", "base")
    return {"out": out.detach()} | {f"grad of {name}": leaf.grad for name, leaf in zip(names, leaves, strict=True)}


def sharded_lora(tokens: list[int], world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    mesh = mesh_of(world_size)["expert"]
    x, lora_a, lora_b, *of_tokens = lora_arguments(sum(tokens), dtype)
    mine = share(world_size, tokens, mesh.get_local_rank())
    factors = (distribute_tensor(factor, mesh, [Shard(0)]) for factor in (lora_a, lora_b))
    found = lora_step(expert_parallel_lora, x[mine], *factors, *(tensor[mine] for tensor in of_tokens))
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_lora_equals_one_process(ranks, tokens, world_size, dtype):
    results = ranks.run(sharded_lora, tokens, world_size, dtype)[:world_size]
    arguments = lora_arguments(sum(tokens), dtype)
    eager = lora_step(partial(routed_lora, backend="reference"), *arguments)
    expected = lora_step(partial(routed_lora, backend="reference"), *in_double(arguments))
    for name in eager:
        values = [result[name] for result in results]
        value = values[0] if "lora" in name else torch.cat(values)
        assert_close_to_reference(value, expected[name], eager[name], name)


def bad_factors() -> None:
    mesh = mesh_of(4)["expert"]
    x, lora_a, lora_b, ids, *_ = lora_arguments(3, torch.float32)
    whole = distribute_tensor(lora_b, mesh, [Replicate()])
    expert_parallel_lora(x, distribute_tensor(lora_a, mesh, [Shard(0)]), whole, ids)


def test_factors_must_be_shared_equally(ranks):
    for line in failure(ranks, bad_factors):
        assert "expert_parallel_lora: lora_b must be a DTensor with Shard(0) over the 4 ranks" in line


def task_vectors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list]:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(shape, generator=generator).to(dtype)
    signs, difference = torch.randint(-1, 2, shape, generator=generator), torch.randn(shape, generator=generator)
    return weight, [TernaryDelta.from_signs(signs, 0.3), compress(difference, 0.4)]


#: of a mesh of 2 x 2
PLACEMENTS = {
    "experts": (Replicate(), Shard(0)),
    "columns": (Replicate(), Shard(2)),
    "both": (Shard(1), Shard(0)),
    "replicas": (Replicate(), Replicate()),
}


def apply_to_shards(shape: tuple[int, ...], placements, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, deltas = task_vectors(shape, dtype)
    weight = distribute_tensor(weight, mesh_of(2), placements).requires_grad_()
    undo = apply_(weight, deltas, [1.0, -2.0], undo=True)
    changed = weight.full_tensor().detach().clone()
    unapply_(weight, undo)
    return changed, weight.full_tensor().detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placements", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("shape", [(8, 6, 10), (3, 5, 7)], ids=str)  # even, and with shards of several sizes
def test_task_vectors_on_shards(ranks, shape, placements, dtype):
    weight, deltas = task_vectors(shape, dtype)
    expected = weight.clone()
    moe_kernels.apply_(expected, deltas, [1.0, -2.0])
    assert not torch.equal(expected, weight)
    for changed, back in ranks.run(apply_to_shards, shape, placements, dtype):
        assert torch.equal(changed, expected)
        assert torch.equal(back, weight)


def test_plain_weights_are_refused():
    weight, deltas = task_vectors((2, 2, 2), torch.float32)
    with pytest.raises(ValueError, match="apply_: weight must be a DTensor, got Tensor; use moe_kernels.apply_"):
        apply_(weight, deltas)
    assert not distributed.is_initialized()
