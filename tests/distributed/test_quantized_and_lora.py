"""Quantised experts and adapters of experts over ranks: outputs, gradients and checkpoints against one process."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from moe_kernels.distributed import checkpointable, data_parallel, fully_shard_experts, shard_experts
from moe_kernels.distributed import quantize_experts as quantize_sharded
from moe_kernels.nn import MoEFeedForward, QuantizedExperts, add_expert_lora, quantize_experts
from moe_kernels.testing import assert_close_to_reference
from tests.distributed.ranks import full as all_blocks
from tests.distributed.test_bad_ranks import failure
from tests.distributed.test_expert_parallel import TOKENS, in_double, mesh_of, one_process, share
from tests.distributed.test_tensor_parallel import grid

HIDDEN, EXPERTS = 32, 8
#: what is done to a layer, in this order
KINDS = {
    "int8": ("quantise",),
    "adapters": ("adapt",),
    "adapters of int8": ("adapt", "quantise"),
}


def build(kind: str, seed: int = 1, quantise=quantize_experts) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), MoEFeedForward(HIDDEN, 16, EXPERTS, 2))
    if "adapt" in KINDS[kind]:
        add_expert_lora(model, 3, scaling=0.5)
        for factor in model[1].expert_lora.parameters():
            nn.init.normal_(factor, std=0.3)
    if "quantise" in KINDS[kind]:
        quantise(model)
    return model


def batch(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(num_tokens, HIDDEN, generator=generator) for _ in range(2))
    return x, torch.randint(EXPERTS, (num_tokens, 2), generator=generator), grad


def step(layer: nn.Module, x: Tensor, forced: Tensor, grad: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    out = layer(leaf, forced)
    out.backward(grad)
    found = {"out": out.detach(), "grad of x": leaf.grad}
    return found | {f"grad of {name}": w.grad for name, w in layer.named_parameters() if w.grad is not None}


def plain_of(kind: str) -> MoEFeedForward:
    """The layer whose experts are what the quantised ones stand for."""
    layer, plain = build(kind)[1], build(kind, quantise=nothing)[1]
    if "quantise" in KINDS[kind]:
        for name in ("gate_up_proj", "down_proj"):
            getattr(plain, name).data = getattr(layer, name)().dequantize()
    return plain


def nothing(model: nn.Module) -> None:
    pass


def sharded_step(kind: str, world_size: int, tokens: list[int], chunk_tokens: int | None, after: bool) -> dict:
    mesh = mesh_of(world_size)["expert"]
    model = shard_experts(build(kind, quantise=nothing if after else quantize_experts), mesh, chunk_tokens=chunk_tokens)
    if after:
        assert quantize_sharded(model) == ["1"] and quantize_sharded(model) == []
    held = model[1].gate_up_proj.data if "quantise" in KINDS[kind] else model[1].gate_up_proj
    assert isinstance(held, DTensor) and held.to_local().shape[0] == EXPERTS // world_size
    mine = share(world_size, tokens, mesh.get_local_rank())
    return whole(step(model[1], *(tensor[mine] for tensor in batch(sum(tokens)))))


def whole(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in found.items()}


def check(results: list[dict], kind: str, world_size: int, tokens: list[int], scale: int) -> None:
    """scale: an adapter's gradient is a mean, times this the sum over the tokens."""
    of_adapters = {name for name in results[0] if "expert_lora" in name}
    assert ("adapt" in KINDS[kind]) == bool(of_adapters)
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in of_adapters)
    others = [{name: value for name, value in found.items() if name not in of_adapters} for found in results]
    actual = one_process(others, world_size) | {name: results[0][name] * scale for name in of_adapters}
    plain, arguments = plain_of(kind), batch(sum(tokens))
    eager = step(copy.deepcopy(plain), *arguments)
    expected = step(plain.double(), *in_double(arguments))
    assert "grad of router.weight" in actual
    for name, value in actual.items():
        assert_close_to_reference(value, expected[name], eager[name], name)


@pytest.mark.parametrize("chunk_tokens", [None, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("tokens", [TOKENS["uneven"], TOKENS["an empty rank"]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_process(ranks, kind, tokens, world_size, chunk_tokens):
    results = ranks.run(sharded_step, kind, world_size, tokens, chunk_tokens, False)
    check(results, kind, world_size, tokens, world_size)


def split_step(expert_ranks: int, tensor_ranks: int, tokens: list[int], chunk_tokens: int | None) -> dict:
    mesh = grid(expert_ranks, tensor_ranks)["expert", "tensor"]
    model = shard_experts(build("adapters"), mesh, chunk_tokens=chunk_tokens, tensor_dim="tensor")
    lora, parts = model[1].expert_lora, (EXPERTS // expert_ranks, 3)
    assert lora.gate_up_b_rows.to_local().shape == (*parts, 32 // tensor_ranks)
    assert lora.down_a.to_local().shape == (*parts, 16 // tensor_ranks)
    rank = mesh.get_local_rank("expert") * tensor_ranks + mesh.get_local_rank("tensor")
    mine = share(expert_ranks * tensor_ranks, tokens, rank)
    found = step(model[1], *(tensor[mine] for tensor in batch(sum(tokens))))
    return {name: all_blocks(value) for name, value in found.items()}


@pytest.mark.parametrize("chunk_tokens", [None, 2])
@pytest.mark.parametrize("layout", [(1, 2), (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("tokens", [TOKENS["uneven"], TOKENS["an empty rank"], TOKENS["no tokens"]], ids=str)
def test_adapters_of_split_experts(ranks, tokens, layout, chunk_tokens):
    world_size = layout[0] * layout[1]
    results = ranks.run(split_step, *layout, tokens, chunk_tokens)
    check(results, "adapters", world_size, tokens, world_size)


def factors_everywhere() -> dict[str, Tensor]:
    """After a step of an optimizer: what ranks that share an expert all have stays the same on all of them."""
    model = shard_experts(build("adapters"), grid(2, 2)["expert", "tensor"], tensor_dim="tensor")
    optimizer = torch.optim.AdamW([*model[1].expert_lora.parameters()], foreach=False)
    mine = share(4, TOKENS["uneven"], distributed.get_rank())
    x, forced, grad = (tensor[mine] for tensor in batch(sum(TOKENS["uneven"])))
    (model[1](x, forced) * grad).sum().backward()
    optimizer.step()
    lora = model[1].expert_lora
    return {name: getattr(lora, name).to_local().detach() for name in ("gate_up_a", "down_b_rows")}


def test_replicated_factors_stay_the_same(ranks):
    found, before = ranks.run(factors_everywhere), build("adapters")[1].expert_lora
    for name in ("gate_up_a", "down_b_rows"):
        for first, second in ((0, 1), (2, 3)):
            assert torch.equal(found[first][name], found[second][name])
        assert not torch.equal(torch.cat([found[0][name], found[2][name]]), getattr(before, name))


@pytest.mark.parametrize("kind", ["int8", "adapters of int8"])
def test_quantised_after_it_was_spread(ranks, kind):
    first, second = (ranks.run(sharded_step, kind, 4, TOKENS["even"], None, after) for after in (False, True))
    for before, after in zip(first, second, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def beside_data(kind: str, how: str) -> dict[str, Tensor]:
    """Two ranks of experts, two of data; each rank has tokens of its own."""
    model, mesh = build(kind), mesh_of(2)
    shard_experts(model, mesh["expert"])
    if how == "ddp":
        wrapped = data_parallel(model, mesh["data"])
    else:
        world = init_device_mesh("cpu", (4,))
        fully_shard_experts(model, world, mesh["data"])
        wrapped = fully_shard(model, mesh=world)
    mine = share(4, TOKENS["uneven"], distributed.get_rank())
    x, forced, grad = (tensor[mine] for tensor in batch(sum(TOKENS["uneven"])))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(HIDDEN) if how == "ddp" else distribute_like(model[0].weight))
        model[0].bias.zero_()
    (wrapped(x) * grad).sum().backward()
    found = {f"grad of {name}": w.grad for name, w in model[1].named_parameters() if w.grad is not None}
    return whole(found)


def distribute_like(weight: DTensor) -> DTensor:
    return distribute_tensor(torch.eye(HIDDEN), weight.device_mesh, weight.placements, src_data_rank=None)


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=pytest.mark.needs_fsdp)])
@pytest.mark.parametrize("kind", KINDS)
def test_beside_data_parallelism(ranks, kind, how):
    results = ranks.run(beside_data, kind, how)
    plain = plain_of(kind)
    x, _, grad = batch(sum(TOKENS["uneven"]))
    eager, expected = (
        step(copy.deepcopy(plain).to(dtype), x.to(dtype), None, grad.to(dtype))
        for dtype in (torch.float32, torch.float64)
    )
    for found in results:
        assert "grad of router.weight" in found
        for name, value in found.items():
            assert_close_to_reference(value * 4, expected[name], eager[name], name)


def spread(model: nn.Module, world_size: int, tensor_ranks: int) -> nn.Module:
    if tensor_ranks == 1:
        return shard_experts(model, mesh_of(world_size)["expert"])
    return shard_experts(model, grid(world_size, tensor_ranks)["expert", "tensor"], tensor_dim="tensor")


def save(folder: str, kind: str, *layout) -> None:
    dcp.save(checkpointable(get_model_state_dict(spread(build(kind), *layout))), checkpoint_id=folder)


def load(folder: str, kind: str, *layout) -> dict[str, Tensor]:
    model = spread(build(kind, seed=2), *layout)
    state = get_model_state_dict(model)
    dcp.load(checkpointable(state), checkpoint_id=folder)
    set_model_state_dict(model, state)
    found = {name: all_blocks(value) for name, value in get_model_state_dict(model).items()}
    return found | {"out": model(torch.ones(1, HIDDEN)).detach()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_world_loads_what_another_saved(ranks, tmp_path, kind):
    model = build(kind)
    expected, layouts = model.state_dict(), [(1, 1), (2, 1), (4, 1)]
    if kind == "adapters":
        layouts = [(2, 1), (2, 2), (1, 4)]
    for source in layouts:
        folder = str(tmp_path / str(source))
        ranks.run(save, folder, kind, *source)
        for target in layouts:
            for loaded in ranks.run(load, folder, kind, *target):
                out = loaded.pop("out")
                assert_close_to_reference(out, model(torch.ones(1, HIDDEN)), out)
                assert loaded.keys() == expected.keys()
                assert all(torch.equal(loaded[name], expected[name]) for name in expected)
        state = build(kind, seed=2).state_dict()
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def other_format() -> None:
    model = build("adapters")
    quantize_experts(model, "fp8" if distributed.get_rank() == 2 else "int8")
    shard_experts(model, mesh_of(4)["expert"])


def adapters_on_one_rank() -> None:
    shard_experts(build("adapters" if distributed.get_rank() == 2 else "int8", quantise=nothing), mesh_of(4)["expert"])


def test_ranks_without_adapters(ranks):
    for line in failure(ranks, adapters_on_one_rank):
        assert "ExpertParallel: 1: expert_lora.gate_up_a must be the same on all ranks" in line
        assert "got nothing on rank 0 and [8, 3, 32] torch.float32 on rank 2" in line


def test_ranks_of_other_formats(ranks):
    for line in failure(ranks, other_format):
        assert "ExpertParallel: 1: gate_up_proj must be the same on all ranks" in line
        assert "got [8, 32, 32] int8 on rank 0 and [8, 32, 32] fp8 on rank 2" in line


def refused(kind: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("expert", "tensor"))
    if kind == "adapted late":
        add_expert_lora(shard_experts(build("int8"), mesh["expert"]), 2)
    elif kind == "quantised by one process":
        quantize_experts(shard_experts(build("adapters"), mesh["expert"]))
    elif kind == "quantised slices":
        model = nn.Sequential(MoEFeedForward(HIDDEN, 16, EXPERTS, 2))
        quantize_sharded(shard_experts(model, mesh, tensor_dim="tensor"))
    else:
        shard_experts(build(kind), mesh, tensor_dim="tensor")


@pytest.mark.parametrize(
    "kind, message",
    [
        ("adapted late", "add_expert_lora: experts of '1' must be on one device, got experts over ranks; call it"),
        ("quantised by one process", "quantize_experts: experts of '1' must be on one device, got experts over ranks; "
            "call moe_kernels.distributed.quantize_experts"),
        ("quantised slices", "quantize_experts: experts of '0' must be whole, got (Shard(dim=0), _StridedShard(dim=1, "
            "sf=2)); quantise before FSDP, and without tensor_dim"),
        ("int8", "ExpertParallel: 1: gate_up_proj must be a plain parameter, got QuantizedExperts; quantised"),
    ],
    ids=lambda value: value if len(value) < 30 else "",
)  # fmt: skip
def test_refusals(ranks, kind, message):
    for line in failure(ranks, refused, kind):
        assert line.startswith(f"ValueError: {message}"), line


# ---- the experts of transformers models


def quantised(name: str) -> nn.Module:
    from moe_kernels.integrations.transformers import quantize_experts
    from tests.distributed.test_experts_modules import build

    module = build(name).float()
    assert quantize_experts(module, "fp8") == [""]
    return module


def dequantised(name: str) -> nn.Module:
    from tests.distributed.test_experts_modules import build

    module, weights = build(name), quantised(name)
    for held, child in weights.named_children():
        if isinstance(child, QuantizedExperts):
            value = child().dequantize(torch.float64)
            getattr(module, held).data = value.transpose(1, 2) if module.is_transposed else value
    return module


def zoo_step(name: str, chunk_tokens: int | None) -> dict[str, Tensor]:
    from tests.distributed.test_experts_modules import TOKENS, step

    module, mesh = quantised(name), mesh_of(4)["expert"]
    shard_experts(module, mesh, chunk_tokens=chunk_tokens)
    assert isinstance(module.down_proj.data, DTensor)
    return step(module, slice(*((0, 3), (3, 3), (3, 8), (8, TOKENS))[mesh.get_local_rank()]), 4, torch.float32)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "NemotronHExperts"])
def test_experts_of_transformers(ranks, name, chunk_tokens):
    modules = pytest.importorskip("tests.distributed.test_experts_modules")
    results = ranks.run(zoo_step, name, chunk_tokens)
    eager = modules.step(dequantised(name).float(), slice(None), 1, torch.float32)
    expected = modules.step(dequantised(name), slice(None), 1)
    assert {"out", "x", "weights"} <= results[0].keys() and "down_proj" not in results[0]
    for entry in results[0]:
        parts = [found[entry] for found in results]
        actual = torch.cat(parts) if entry in ("out", "x", "weights") else parts[0]
        assert_close_to_reference(actual, expected[entry], eager[entry], entry)
