"""Chunks: the same results, and on no rank more rows at a time than a chunk of everybody's tokens."""

import itertools
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from moe_kernels import expert_ffn
from moe_kernels.distributed import expert_parallel_ffn, ffn, shard_experts
from moe_kernels.testing import assert_close_to_reference
from tests.distributed.test_bad_ranks import Model, failure
from tests.distributed.test_expert_parallel import (
    HIDDEN,
    OF_TOKENS,
    TOKENS,
    ffn_arguments,
    ffn_step,
    in_double,
    mesh_of,
    one_process,
    sharded_ffn_step,
)


def in_chunks(
    world_size: int, tokens: list[int], dtype: torch.dtype, chunk_tokens: int | None
) -> tuple[dict, list[int]]:
    """Results, and the rows of each call of the experts."""
    rows = []

    def seen(hidden_states: Tensor, *arguments, **options) -> Tensor:
        rows.append(hidden_states.shape[0])
        return expert_ffn(hidden_states, *arguments, **options)

    with mock.patch.object(ffn, "expert_ffn", seen):
        return sharded_ffn_step(world_size, tokens, dtype, chunk_tokens=chunk_tokens), rows


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_one_process(ranks, world_size, tokens, chunk_tokens):
    results = ranks.run(in_chunks, world_size, tokens, torch.float32, chunk_tokens)
    whole = ranks.run(in_chunks, world_size, tokens, torch.float32, None)
    actual = one_process([found for found, _ in results], world_size)
    unchunked = one_process([found for found, _ in whole], world_size)
    arguments = ffn_arguments(sum(tokens), torch.float32)
    eager = ffn_step(partial(expert_ffn, backend="reference"), *arguments)
    expected = ffn_step(partial(expert_ffn, backend="reference"), *in_double(arguments))
    for name, value in actual.items():
        assert_close_to_reference(value, expected[name], eager[name], name)
        if name in OF_TOKENS:
            assert torch.equal(value, unchunked[name]), f"{name}: not equal to the bit"
    most = max(sum(part) for part in torch.tensor(tokens).view(world_size, -1).tolist())
    for _, rows in results:
        assert len(rows) == 2 * max(-(-most // chunk_tokens), 1)  # forward, and again for backward
        assert max(rows) <= world_size * chunk_tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gradients_of_chunks_are_added_in_float32(ranks, dtype):
    results = ranks.run(in_chunks, 4, TOKENS["uneven"], dtype, 1)
    actual = one_process([found for found, _ in results], 4)
    arguments = ffn_arguments(sum(TOKENS["uneven"]), dtype)
    eager = ffn_step(partial(expert_ffn, backend="reference"), *arguments)
    expected = ffn_step(partial(expert_ffn, backend="reference"), *in_double(arguments))
    for name, value in actual.items():
        assert_close_to_reference(value, expected[name], eager[name], name)


def kept_for_backward(num_tokens: int, chunk_tokens: int | None) -> int:
    """Elements that this rank keeps where all tokens of all ranks go to the first rank's experts."""
    rank = distributed.get_rank()
    x, _, weights, gate_up, down, _ = ffn_arguments(num_tokens, torch.float32)
    experts = slice(2 * rank, 2 * rank + 2)
    weights, gate_up, down = (
        leaf.clone().requires_grad_() for leaf in (weights[:, :2], gate_up[experts], down[experts])
    )
    ids, kept = torch.tensor([0, 1]).expand(num_tokens, 2), {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        arguments = (x.requires_grad_(), ids, weights, gate_up, down)
        expert_parallel_ffn(*arguments, group=distributed.group.WORLD, chunk_tokens=chunk_tokens)
    return sum(kept.values()) - gate_up.numel() - down.numel()


def test_memory_under_total_imbalance(ranks):
    whole, chunked = (ranks.run(kept_for_backward, 64, chunk) for chunk in (None, 4))
    assert whole[0] > 4 * 64 * HIDDEN  # everybody's tokens
    assert max(chunked) <= 64 * (HIDDEN + 2 * 2)  # its own tokens, ids and weights


def peak_of_a_step(num_tokens: int, chunk_tokens: int | None) -> int:
    """The most bytes that this rank has allocated at a time where all tokens of all ranks go to the first's experts."""
    rank = distributed.get_rank()
    x, _, weights, gate_up, down, grad = ffn_arguments(num_tokens, torch.float32)
    experts = slice(2 * rank, 2 * rank + 2)
    ids = torch.tensor([0, 1]).expand(num_tokens, 2)
    ffn = partial(expert_parallel_ffn, group=distributed.group.WORLD, chunk_tokens=chunk_tokens)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        ffn_step(ffn, x, ids, weights[:, :2], gate_up[experts], down[experts], grad)
    found = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes))


def test_peak_under_total_imbalance(ranks):
    """What a token more costs, forward and backward: with chunks its own rank alone, and as little on every rank."""
    few, many = 128, 512
    peaks = {chunk: [ranks.run(peak_of_a_step, count, chunk) for count in (few, many)] for chunk in (None, 8)}
    a_token = {
        chunk: [(more - less) / (many - few) for less, more in zip(*pair, strict=True)] for chunk, pair in peaks.items()
    }
    row = HIDDEN * 4
    # the first rank keeps rows, activations and gradients of the tokens of all four
    assert a_token[None][0] > 5 * 4 * row
    # a token's output and gradients, and what they are put together from, on its own rank
    assert max(a_token[8]) < 6 * row


def layer_in_chunks(autocast: bool) -> None:
    layers = []
    for chunk_tokens in (None, 2):
        torch.manual_seed(0)
        layer = shard_experts(Model(shared_intermediate_size=4), mesh_of(4)["expert"], chunk_tokens=chunk_tokens).mlp
        x = torch.randn(5, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x)
        out.float().square().sum().backward()
        layers.append((out, x.grad, layer.router.weight.grad))
        assert layer.gate_up_proj.grad.to_local().any()
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
    for chunked, whole in zip(*reversed(layers), strict=True):
        assert torch.equal(chunked, whole)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_in_chunks(ranks, autocast):
    ranks.run(layer_in_chunks, autocast)


def unlike_chunks(chunk_tokens: int, of_rank_3: int) -> None:
    chunk_tokens = of_rank_3 if distributed.get_rank() == 3 else chunk_tokens
    shard_experts(Model(), mesh_of(4)["expert"], chunk_tokens=chunk_tokens).mlp(torch.randn(3, 8))


def test_bad_chunks(ranks):
    for line in failure(ranks, unlike_chunks, 2, 4):
        assert "ExpertParallel: mlp: chunk_tokens must be the same on all ranks" in line and "4 on rank 3" in line
    for line in failure(ranks, unlike_chunks, 0, 0):
        assert "chunk_tokens must be at least 1, or None, got 0" in line
