"""Random ranks: sizes, numbers of choices that differ by rank, experts named twice or not there, chunks."""

import random
from functools import partial

import pytest
import torch
from torch import Tensor

from moe_kernels import expert_ffn
from moe_kernels.distributed import expert_parallel_ffn
from moe_kernels.testing import assert_close_to_reference
from tests.distributed.test_expert_parallel import ffn_step, mesh_of

CASES = 40


def draw(seed: int) -> tuple[int, list[tuple[Tensor, ...]], Tensor, Tensor, int | None]:
    """world_size; x, ids, weights, grad of each rank; gate_up_proj, down_proj; chunk_tokens. All in float64."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    world_size = choose.choice([1, 2, 4])
    num_experts, hidden_size, intermediate_size = world_size * choose.randint(1, 3), choose.choice([1, 4, 19]), 5
    top_k, batches = choose.choice([0, 1, 2, 5]), []
    for _ in range(world_size):
        top_k = choose.choice([top_k, top_k, choose.randint(0, 5)])
        num_tokens = choose.choice([0, 1, 3, 9])
        ids = torch.randint(-2, num_experts + 2, (num_tokens, top_k), generator=generator)
        if choose.random() < 0.2:
            ids[:] = choose.randrange(num_experts)
        x, grad = normal(num_tokens, hidden_size), normal(num_tokens, hidden_size)
        batches.append((x, choose.choice([ids, ids.int()]), normal(num_tokens, top_k), grad))
    gate_up = normal(num_experts, 2 * intermediate_size, hidden_size)
    down = normal(num_experts, hidden_size, intermediate_size)
    return world_size, batches, gate_up, down, choose.choice([None, None, 1, 2, 20])


def on_ranks(seeds: range) -> list[dict[str, Tensor]]:
    found = []
    for seed in seeds:
        world_size, batches, gate_up, down, chunk_tokens = draw(seed)
        mesh = mesh_of(world_size)["expert"]
        x, ids, weights, grad = batches[mesh.get_local_rank()]
        mine = [stack.chunk(world_size)[mesh.get_local_rank()] for stack in (gate_up, down)]
        ffn = partial(expert_parallel_ffn, group=mesh.get_group(), chunk_tokens=chunk_tokens)
        found.append(ffn_step(ffn, x, ids, weights, *mine, grad))
    return found


def together(seed: int) -> dict[str, Tensor]:
    _, batches, gate_up, down, _ = draw(seed)
    most = max(ids.shape[1] for _, ids, _, _ in batches)
    x, grad = (torch.cat([batch[at] for batch in batches]) for at in (0, 3))
    ids = torch.cat([padded(ids.long(), most, -1) for _, ids, _, _ in batches])
    weights = torch.cat([padded(weights, most, 0) for _, _, weights, _ in batches])
    return ffn_step(partial(expert_ffn, backend="reference"), x, ids, weights, gate_up, down, grad)


def padded(table: Tensor, columns: int, value: int) -> Tensor:
    return torch.nn.functional.pad(table, (0, columns - table.shape[1]), value=value)


@pytest.fixture(scope="module")
def results(ranks) -> list[list[dict[str, Tensor]]]:
    return ranks.run(on_ranks, range(CASES))


@pytest.mark.parametrize("seed", range(CASES))
def test_equals_one_process(results, seed):
    world_size = draw(seed)[0]
    expected = together(seed)
    for name, value in expected.items():
        parts = [rank[seed][name] for rank in results[:world_size]]
        if name == "grad of topk_weights":
            parts = [padded(part, value.shape[1], 0) for part in parts]
        assert_close_to_reference(torch.cat(parts), value, value, name)
