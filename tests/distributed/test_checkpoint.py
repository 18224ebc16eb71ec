"""torch.distributed.checkpoint: what one world saves another loads; a save that is cut short leaves the last one."""

import os
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from moe_kernels.distributed import data_parallel, fully_shard_experts, shard_experts
from moe_kernels.nn import MoEFeedForward
from tests.distributed.ranks import Ranks
from tests.distributed.test_expert_parallel import mesh_of

#: how the model lies on the ranks: experts over 4, 2 or 1 of them, alone, beside DDP or beside FSDP2
LAYOUTS = [("experts", 4), ("experts", 2), ("experts", 1), ("ddp", 2)]
WITH_FSDP = [*LAYOUTS, ("fsdp", 2), ("fsdp", 4)]


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), MoEFeedForward(8, 4, 8, 2, shared_intermediate_size=4, balanced=True))


def lay_out(model: nn.Module, how: str, world_size: int) -> nn.Module:
    mesh = mesh_of(world_size)
    shard_experts(model, mesh["expert"])
    if how == "ddp":
        return data_parallel(model, mesh["data"])
    if how == "fsdp":
        world = init_device_mesh("cpu", (4,))
        fully_shard_experts(model, world, mesh["data"])
        fully_shard(model, mesh=world)
    return model


def state_of(model: nn.Module) -> dict:
    """Model and optimizer, after a step with gradients that every layout has the same."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight) / 2
    optimizer.step()
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), optimizer


def full(state: dict) -> dict[str, Tensor]:
    """Every tensor by its path, whole."""
    found = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found |= {f"{name}/{inner}": tensor for inner, tensor in full(value).items()}
        elif isinstance(value, Tensor):
            found[name] = (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
    return found


def save(folder: str, how: str, world_size: int) -> None:
    dcp.save(state_of(lay_out(build(1), how, world_size))[0], checkpoint_id=folder)


def load(folder: str, how: str, world_size: int) -> dict[str, Tensor]:
    model = lay_out(build(2), how, world_size)
    state, optimizer = state_of(model)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert any(weight.placements == (Shard(0),) for weight in model.parameters() if isinstance(weight, DTensor))
    return full(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)))


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert "model/1.gate_up_proj" in actual and any(name.endswith("gate_up_proj/momentum_buffer") for name in actual)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_every_world_loads_what_another_saved(ranks, tmp_path, source):
    check(ranks, str(tmp_path), source, LAYOUTS)


@pytest.mark.needs_fsdp
@pytest.mark.parametrize("source", WITH_FSDP, ids=str)
def test_fsdp_loads_what_another_saved_and_the_other_way(ranks, tmp_path, source):
    check(ranks, str(tmp_path), source, WITH_FSDP if source[0] == "fsdp" else WITH_FSDP[-2:])


def check(ranks, folder: str, source: tuple[str, int], targets: list[tuple[str, int]]) -> None:
    expected = full(state_of(build(1))[0])
    ranks.run(save, folder, *source)
    for target in targets:
        for loaded in ranks.run(load, folder, *target):
            same(loaded, expected)
    state, _ = state_of(build(2))  # and one process, without ranks
    assert not torch.equal(state["model"]["1.gate_up_proj"], expected["model/1.gate_up_proj"])
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    same(full(state), expected)


def test_ranks_load_what_one_process_saved(ranks, tmp_path):
    state, _ = state_of(build(1))
    dcp.save(state, checkpoint_id=str(tmp_path), no_dist=True)
    for target in LAYOUTS:
        for loaded in ranks.run(load, str(tmp_path), *target):
            same(loaded, full(state))


def save_twice(first: str, second: str) -> str:
    model = shard_experts(build(1), init_device_mesh("cpu", (2,)))
    dcp.save(state_of(model)[0], checkpoint_id=first)
    end = mock.patch.object(dcp.FileSystemWriter, "write_data", lambda *_: os._exit(1))
    try:
        if distributed.get_rank() == 1:
            end.start()
        dcp.save(state_of(model)[0], checkpoint_id=second)
    except (Exception, CheckpointException) as error:
        return str(error)
    raise AssertionError("no error")


def train_with_a_fault(folder: str, fault: str) -> dict[str, Tensor]:
    """Two steps, a checkpoint after each; in the second one the last rank strikes in the middle of the layer."""
    distributed.barrier()  # ranks start at their own time, and the group is impatient
    group = distributed.new_group(timeout=timedelta(seconds=3))
    model = shard_experts(build(1), DeviceMesh.from_group(group, "cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    saved: dict[str, Tensor] = {}

    def strike(*_) -> None:
        if saved and distributed.get_rank() == 1:
            if fault == "ends":
                os._exit(1)
            if fault == "hangs":
                time.sleep(6)
            raise ArithmeticError("struck")

    model[1].register_routing_hook(strike)
    try:
        for step in range(2):
            model(torch.ones(3, 8)).square().sum().backward()
            for weight in model.parameters():
                if not isinstance(weight, DTensor):
                    distributed.all_reduce(weight.grad, group=group)
            optimizer.step()
            state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.save(state, checkpoint_id=f"{folder}/{step}", process_group=group)
            saved = full(state)
    except RuntimeError as error:
        assert "ExpertParallel: 1: all ranks of the expert group must reach" in str(error) and "[1]" in str(error)
        return saved
    raise AssertionError("no error")


@pytest.mark.parametrize("fault", ["ends", "hangs", "raises"])
def test_a_rank_that_strikes_in_the_middle_leaves_the_last_checkpoint(tmp_path, fault):
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    ranks = Ranks(2)
    try:
        (saved, failed), (_, other) = ranks.outcomes(train_with_a_fault, str(tmp_path), fault)
    finally:
        ranks.close()
    assert failed is None, failed
    assert "died" in other if fault == "ends" else "struck" in other
    assert not (tmp_path / "1").exists()
    state, _ = state_of(build(2))
    dcp.load(state, checkpoint_id=str(tmp_path / "0"), no_dist=True)
    same(full(state), saved)


def test_a_rank_that_ends_while_saving_leaves_the_last_checkpoint(tmp_path):
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    ranks = Ranks(2)
    try:
        (error, failed), (_, other) = ranks.outcomes(save_twice, str(tmp_path / "first"), str(tmp_path / "second"))
    finally:
        ranks.close()
    assert failed is None and other == "died" and error
    state, _ = state_of(build(2))
    with pytest.raises(CheckpointException, match="metadata"):
        dcp.load(state, checkpoint_id=str(tmp_path / "second"), no_dist=True)
    dcp.load(state, checkpoint_id=str(tmp_path / "first"), no_dist=True)
    same(full(state), full(state_of(build(1))[0]))
