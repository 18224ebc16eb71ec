"""What else is done to modules, done to a sharded one."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

from moe_kernels.distributed import fully_shard_experts, shard_experts
from moe_kernels.nn import MoEFeedForward, add_expert_lora
from tests.distributed.test_bad_ranks import Model
from tests.distributed.test_expert_parallel import mesh_of
from tests.distributed.test_tensor_parallel import grid


def step(layer, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    return out.detach(), x.grad


def build(kind: str = "experts") -> tuple[MoEFeedForward, Tensor]:
    torch.manual_seed(0)
    model = Model(shared_intermediate_size=4)
    if kind == "adapters":
        add_expert_lora(model, 2)
        nn.init.normal_(model.mlp.expert_lora.down_b_rows)
    if kind == "slices":
        shard_experts(model, grid(2, 2)["expert", "tensor"], tensor_dim="tensor")
    else:
        shard_experts(model, mesh_of(4)["expert"])
    return model.mlp, torch.randn(2, 5, 8)


def same_after(change: str, kind: str) -> None:
    layer, x = build(kind)
    expected = step(layer, x)
    if change == "inference":
        with torch.inference_mode():
            assert torch.equal(layer(x), expected[0])
        return
    changed = {
        "compiled": lambda: torch.compile(layer, backend="aot_eager"),
        "copied": lambda: copy.deepcopy(layer),
        "reentrant checkpoint": lambda: lambda x: checkpoint(layer, x, use_reentrant=True),
        "checkpoint": lambda: lambda x: checkpoint(layer, x, use_reentrant=False),
        "frozen": lambda: layer.requires_grad_(False),
    }[change]()
    for actual, value in zip(step(changed, x), expected, strict=True):
        assert torch.equal(actual, value)


@pytest.mark.parametrize("kind", ["experts", "slices", "adapters"])
@pytest.mark.parametrize("change", ["inference", "compiled", "copied", "reentrant checkpoint", "checkpoint", "frozen"])
def test_same_bits(ranks, change, kind):
    ranks.run(same_after, change, kind)


def mixed_precision() -> None:
    model = shard_experts(Model(shared_intermediate_size=4), mesh_of(2)["expert"])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard_experts(model, init_device_mesh("cpu", (4,)), mesh_of(2)["data"], mp_policy=policy)
    out = model.mlp(torch.randn(5, 8))
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert model.mlp.gate_up_proj.grad.dtype == model.mlp.router.weight.grad.dtype == torch.float32


@pytest.mark.needs_fsdp
def test_mixed_precision(ranks):
    ranks.run(mixed_precision)


def to_float64() -> None:
    layer, x = build()
    out, grad = step(layer.double(), x.double())
    assert out.dtype == grad.dtype == layer.gate_up_proj.to_local().dtype == torch.float64


def test_moves_with_its_module(ranks):
    ranks.run(to_float64)
