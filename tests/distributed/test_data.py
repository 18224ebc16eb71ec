"""Experts and data on two dimensions of a mesh: training by DDP and FSDP2 equals one process."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from moe_kernels import balance_loss
from moe_kernels import distributed as moe_distributed
from moe_kernels.nn import ModuleStatistics, MoEFeedForward
from moe_kernels.testing import assert_close_to_reference
from tests.distributed.ranks import full
from tests.distributed.test_bad_ranks import failure
from tests.distributed.test_expert_parallel import mesh_of

HIDDEN, STEPS, MICRO_BATCHES = 12, 3, 2
#: rows of a micro-batch on each rank; each rank's loss is a sum, so that one process has the sum of them
TOKENS = [3, 5, 0, 4]


class Block(nn.Module):
    def __init__(self, recompute: bool, **options):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.mlp = MoEFeedForward(HIDDEN, 8, 8, 2, **options)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))

        return checkpoint(run, x, use_reentrant=False) if self.recompute else run(x)


def build(recompute: bool) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(HIDDEN, HIDDEN), Block(recompute, shared_intermediate_size=4), Block(recompute, balanced=True)
    )


def batches(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[steps, micro-batches, tokens of all ranks, hidden]"""
    generator = torch.Generator().manual_seed(2)
    shape = (STEPS, MICRO_BATCHES, sum(TOKENS), HIDDEN)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def train(model: nn.Module, mine: slice, scale: float, dtype: torch.dtype, before_last=lambda last: None) -> dict:
    """Loss of each step, the first step's gradients and the parameters after the last."""
    # a foreach optimizer would mix DTensors of different meshes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9, foreach=False)
    found = {"losses": []}
    for xs, targets in zip(*batches(dtype), strict=True):
        total = 0
        for index, (x, target) in enumerate(zip(xs, targets, strict=True)):
            with before_last(index == MICRO_BATCHES - 1) or torch.enable_grad():
                loss = (model(x[mine]) - target[mine]).square().sum() * scale
                loss.backward()
            total = total + loss.detach()
        found["losses"].append(total / scale)
        if "grad of 0.weight" not in found:
            found |= {f"grad of {clean(name)}": full(weight.grad).clone() for name, weight in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    found["losses"] = torch.stack(found["losses"])
    return found | {clean(name): full(weight.detach()).clone() for name, weight in model.named_parameters()}


def clean(name: str) -> str:
    return name.removeprefix("module.")


def train_on_ranks(how: str, world_size: int, recompute: bool, chunk_tokens: int | None = None) -> tuple[dict, Tensor]:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    mine = slice(sum(TOKENS[:rank]), sum(TOKENS[: rank + 1]))
    mesh = mesh_of(world_size)
    model = moe_distributed.shard_experts(build(recompute), mesh["expert"], chunk_tokens=chunk_tokens)
    layer, before_last = model[2].mlp, lambda last: None
    if how == "ddp":
        model = moe_distributed.data_parallel(model, mesh["data"])
        before_last = lambda last: None if last else model.no_sync()  # noqa: E731
    else:
        flat = init_device_mesh("cpu", (world,))
        moe_distributed.fully_shard_experts(model, flat, mesh["data"])
        fully_shard(model, mesh=flat)
        assert layer.gate_up_proj.to_local().shape[0] == 8 // world
    # gradients are means over ranks: times their number, they are sums
    found = train(model, mine, world, torch.float32, before_last)
    counts = layer.expert_counts.clone()
    layer.update_expert_bias(group=distributed.group.WORLD)
    return found, counts, layer.expert_bias


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.needs_fsdp)])
def test_training_equals_one_process(ranks, how, world_size, recompute):
    check_training(ranks.run(train_on_ranks, how, world_size, recompute))


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.needs_fsdp)])
def test_training_in_chunks_equals_one_process(ranks, how):
    check_training(ranks.run(train_on_ranks, how, 2, False, 2))


def check_training(results: list) -> None:
    model, everything = build(False), slice(None)
    expected = train(copy.deepcopy(model).double(), everything, 1, torch.float64)
    eager = train(model, everything, 1, torch.float32)
    for found, _, _ in results[1:]:
        for name in found.keys() - {"losses"}:
            assert torch.equal(found[name], results[0][0][name]), name
    actual = results[0][0] | {"losses": torch.stack([found["losses"] for found, _, _ in results]).sum(0)}
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close_to_reference(value, expected[name], eager[name], name)
    # the last layer's picks, once each though recomputed, and the bias of all ranks' tokens
    layer = model[2].mlp
    assert torch.equal(sum(counts for _, counts, _ in results), layer.expert_counts)
    assert layer.expert_counts.sum() == STEPS * MICRO_BATCHES * sum(TOKENS) * 2
    layer.update_expert_bias()
    for _, _, bias in results:
        assert torch.equal(bias, layer.expert_bias)


def loss_on_rank(tokens: list[int], options: dict, masked: bool) -> tuple[Tensor, Tensor]:
    rank = distributed.get_rank()
    mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    logits, ids, mask = routing(sum(tokens))
    logits = logits[mine].clone().requires_grad_()
    mask = {"token_mask": mask[mine]} if masked else {}
    loss = moe_distributed.balance_loss(logits, ids[mine], **options, **mask)
    loss.backward()
    return loss.detach(), logits.grad


def routing(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(num_tokens, 6, generator=torch.Generator().manual_seed(4))
    return logits, logits.topk(2).indices, torch.arange(num_tokens) % 3 != 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"scale": "megatron", "score": "sigmoid"}, {"num_null_experts": 2}], ids=str)
@pytest.mark.parametrize("tokens", [[4, 4, 4, 4], [1, 9, 0, 2], [0, 0, 0, 0]], ids=str)
def test_balance_loss_of_the_whole_batch(ranks, tokens, options, masked):
    results = ranks.run(loss_on_rank, tokens, options, masked)
    logits, ids, mask = routing(sum(tokens))
    mask = {"token_mask": mask} if masked else {}

    def whole(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.clone().requires_grad_()
        loss = balance_loss(logits, ids, **options, **mask)
        loss.backward()
        return loss.detach(), logits.grad

    actual = torch.stack([loss for loss, _ in results]).mean(), torch.cat([grad for _, grad in results]) / 4
    for name, *values in zip(("loss", "grad"), actual, whole(logits.double()), whole(logits), strict=True):
        assert_close_to_reference(*values, name)


def statistics_on_rank(tokens: list[int]) -> dict[str, Tensor]:
    rank = distributed.get_rank()
    mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    layer = MoEFeedForward(HIDDEN, 8, 8, 2)
    layer.load_state_dict(build(False)[1].mlp.state_dict(), strict=False)
    moe_distributed.shard_experts(layer, mesh_of(4)["expert"])
    return count(layer, mine, tokens, partial(ModuleStatistics.all_reduce))


def count(layer: nn.Module, mine: slice, tokens: list[int], finish) -> dict[str, Tensor]:
    x, labels = batches(torch.float32)[0].flatten(0, 2)[: sum(tokens)], torch.arange(sum(tokens)) // 6
    with ModuleStatistics(layer) as statistics, statistics.label(labels[mine]):
        layer(x[mine])
    finish(statistics)
    return {"counts": statistics.counts[""], "weights": statistics.weights[""], "tokens": statistics.tokens[""]}


def test_statistics_of_the_whole_batch(ranks):
    tokens = [5, 0, 8, 3]
    layer = MoEFeedForward(HIDDEN, 8, 8, 2)
    layer.load_state_dict(build(False)[1].mlp.state_dict(), strict=False)
    expected = count(layer, slice(None), tokens, lambda statistics: None)
    assert expected["tokens"].tolist() == [6, 6, 4]
    for found in ranks.run(statistics_on_rank, tokens):
        for name, value in found.items():
            assert_close_to_reference(value.double(), expected[name].double(), expected[name].double(), name)


def wrap_over(how: str, dimension: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    model = moe_distributed.shard_experts(build(False), mesh["expert"])
    over = {"experts": mesh["expert"], "both": mesh, "all": init_device_mesh("cpu", (4,))}[dimension]
    if how == "ddp":
        moe_distributed.data_parallel(model, over)
    else:
        moe_distributed.fully_shard_experts(model, init_device_mesh("cpu", (4,)), over)


@pytest.mark.parametrize("dimension", ["experts", "both", "all"])
@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.needs_fsdp)])
def test_meshes_that_do_not_fit(ranks, how, dimension):
    op = "data_parallel" if how == "ddp" else "fully_shard_experts"
    for rank, line in enumerate(failure(ranks, wrap_over, how, dimension)):
        assert line.startswith(f"ValueError: {op}: data_mesh must be the other dimension of the 4 ranks, got ranks [")
        assert f"where 1.mlp has its experts on ranks {[[0, 1], [2, 3]][rank // 2]}; cut both out of one mesh" in line


def test_needs_sharded_experts(ranks):
    with pytest.raises(ValueError, match="data_parallel: model must be one with sharded experts, got Linear; call"):
        moe_distributed.data_parallel(nn.Linear(2, 2), None)
