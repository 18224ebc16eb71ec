"""routed_lora and apply_ on DTensors against the whole op."""

from functools import partial

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import moe_kernels
from moe_kernels import Patch, TernaryDelta, compress, make_patch, routed_lora
from moe_kernels.distributed import apply_, apply_patch_, expert_parallel_lora, unapply_, unapply_patch_
from moe_kernels.testing import assert_close_to_reference, random_routing
from tests.distributed.ranks import full
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
    return {name: full(value) for name, value in found.items()}


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
    """A weight with zeros of both signs, and task vectors of every kind: planes, packed signs, values."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight.view(-1)[::7], weight.view(-1)[3::7] = 0.0, -0.0
    signs, difference = torch.randint(-1, 2, shape, generator=generator), torch.randn(shape, generator=generator)
    difference.view(-1)[1::5] *= 1e-6  # in float16 a sign without a value
    values = [compress(difference, 0.9, values=kind) for kind in (torch.float32, torch.bfloat16, torch.float16)]
    return weight, [TernaryDelta.from_signs(signs, 0.3), compress(difference, 0.4), *values]


COEFFICIENTS = [1.0, -2.0, 0.5, 3.0, -0.25]


#: of a mesh of 2 x 2
PLACEMENTS = {
    "experts": (Replicate(), Shard(0)),
    "columns": (Replicate(), Shard(2)),
    "both": (Shard(1), Shard(0)),
    "replicas": (Replicate(), Replicate()),
    "a slice of several parts": (Shard(0), _StridedShard(1, split_factor=3)),
}


def apply_to_shards(shape: tuple[int, ...], placements, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, deltas = task_vectors(shape, dtype)
    weight = distribute_tensor(weight, mesh_of(2), placements, src_data_rank=None).requires_grad_()
    undo = apply_(weight, deltas, COEFFICIENTS, undo=True)
    changed = full(weight).clone()
    unapply_(weight, undo)
    return changed, full(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placements", PLACEMENTS.values(), ids=PLACEMENTS)
@pytest.mark.parametrize("shape", [(8, 6, 10), (3, 5, 7)], ids=str)  # even, and with shards of several sizes
def test_task_vectors_on_shards(ranks, shape, placements, dtype):
    weight, deltas = task_vectors(shape, dtype)
    expected = weight.clone()
    moe_kernels.apply_(expected, deltas, COEFFICIENTS)
    assert not torch.equal(expected, weight)
    bits = getattr(torch, f"int{8 * dtype.itemsize}")
    for changed, back in ranks.run(apply_to_shards, shape, placements, dtype):
        assert torch.equal(changed.view(bits), expected.view(bits))
        assert torch.equal(back.view(bits), weight.view(bits))


def patch_shards(weight: Tensor, patch: Patch, placements) -> tuple[Tensor, Tensor]:
    # what a process is sent lies in memory that all of them share
    weight = distribute_tensor(weight.clone(), mesh_of(2), placements).requires_grad_()
    apply_patch_(weight, patch)
    changed = full(weight).clone()
    unapply_patch_(weight, patch)
    return changed, full(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("placements", PLACEMENTS.values(), ids=PLACEMENTS)
def test_patches_on_shards(ranks, placements, dtype):
    base, _ = task_vectors((8, 6, 10), dtype)
    weight = torch.where(torch.arange(480).view(8, 6, 10) % 3 == 0, -3 * base, base)  # far, and over zero
    weight.view(-1)[5], base.view(-1)[6] = torch.inf, torch.nan
    bits = getattr(torch, f"int{8 * dtype.itemsize}")
    for changed, back in ranks.run(patch_shards, base, make_patch(weight, base), placements):
        assert torch.equal(changed.view(bits), weight.view(bits))
        assert torch.equal(back.view(bits), base.view(bits))


def wrong_kind(kind: str) -> None:
    weight, deltas = task_vectors((8, 6, 10), torch.float32)
    sharded = distribute_tensor(weight, mesh_of(2), (Replicate(), Shard(0)))
    if kind == "a patch":
        apply_(sharded, make_patch(weight * 2, weight))
    elif kind == "a task vector":
        apply_patch_(sharded, deltas[0])
    else:
        apply_(sharded, task_vectors((8, 6, 9), torch.float32)[1])


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            "a patch",
            "TypeError: apply_: deltas must be TernaryDelta or PackedDelta, got Patch; a Patch is for apply_patch_",
        ),
        ("a task vector", "TypeError: apply_patch_: patch must be a Patch, got TernaryDelta; call make_patch"),
        ("a shape", "ValueError: apply_: deltas must be of shape [8, 6, 10] like the whole weight, got [8, 6, 9]"),
    ],
)
def test_another_kind_is_refused(ranks, kind, message):
    for line in failure(ranks, wrong_kind, kind):
        assert line == message


def test_plain_weights_are_refused():
    weight, deltas = task_vectors((2, 2, 2), torch.float32)
    with pytest.raises(ValueError, match="apply_: weight must be a DTensor, got Tensor; use moe_kernels.apply_"):
        apply_(weight, deltas)
    assert not distributed.is_initialized()
