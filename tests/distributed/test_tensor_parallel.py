"""Tensor parallelism inside an expert: outputs, gradients, bytes and checkpoints against one process.

The four ranks form a mesh of (data, expert, tensor); each has tokens of its own.
"""

import copy
from functools import cache, partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from moe_kernels import Activation, expert_ffn
from moe_kernels.distributed import (
    ExpertParallel,
    checkpointable,
    data_parallel,
    expert_parallel_ffn,
    fully_shard_experts,
    shard_experts,
)
from moe_kernels.distributed.checkpoint import Blocks
from moe_kernels.nn import MoEFeedForward
from moe_kernels.testing import assert_close_to_reference
from tests.distributed.ranks import WORLD_SIZE, Ranks, full, region
from tests.distributed.test_bad_ranks import Model, failure
from tests.distributed.test_data import TOKENS as TOKENS_OF_RANKS
from tests.distributed.test_data import build as build_model
from tests.distributed.test_data import check_training, train
from tests.distributed.test_exchange import Sent, arguments_of
from tests.distributed.test_expert_parallel import (
    EXPERTS,
    FORCED,
    HIDDEN,
    INTERMEDIATE,
    OF_EXPERTS,
    OF_TOKENS,
    TOKENS,
    batch,
    build,
    ffn_arguments,
    ffn_step,
    in_double,
    one_process,
    share,
    step,
)

#: (ranks that share experts, ranks that share an expert); the rest of the four is data
GRIDS = [(1, 1), (1, 2), (1, 4), (2, 2), (2, 1)]


@cache
def grid(expert_ranks: int, tensor_ranks: int) -> DeviceMesh:
    shape = (WORLD_SIZE // (expert_ranks * tensor_ranks), expert_ranks, tensor_ranks)
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "expert", "tensor"))


def of_experts(expert_ranks: int, tensor_ranks: int) -> tuple[DeviceMesh, int]:
    """The two dimensions of a grid, and this rank among those that share the experts."""
    mesh = grid(expert_ranks, tensor_ranks)["expert", "tensor"]
    return mesh, mesh.get_local_rank("expert") * tensor_ranks + mesh.get_local_rank("tensor")


def sharded_step(grid: tuple[int, int], tokens: list[int], forced, dtype: torch.dtype, options: dict) -> dict:
    mesh, rank = of_experts(*grid)
    layer = parallelize_module(build(dtype, **options), mesh, ExpertParallel(tensor_dim="tensor"))
    rows = 2 if layer.activation.gated else 1
    assert layer.gate_up_proj.shape == (EXPERTS, rows * INTERMEDIATE, HIDDEN)
    mine = (EXPERTS // grid[0], rows * INTERMEDIATE // grid[1], HIDDEN)
    assert layer.gate_up_proj.to_local().shape == mine
    assert layer.down_proj.to_local().shape == (mine[0], HIDDEN, INTERMEDIATE // grid[1])
    tokens_of_rank = share(grid[0] * grid[1], tokens, rank)
    arguments = [
        None if argument is None else argument[tokens_of_rank] for argument in batch(sum(tokens), forced, dtype)
    ]
    found = step(layer, *arguments)
    return {name: full(value) for name, value in found.items()}


def check(ranks, grid, tokens, forced, dtype, options):
    world_size = grid[0] * grid[1]
    actual = one_process(ranks.run(sharded_step, grid, tokens, forced, dtype, options), world_size, world_size)
    arguments = batch(sum(tokens), forced, dtype)
    layer = build(dtype, **options)
    eager = step(layer, *arguments)
    expected = step(copy.deepcopy(layer).double(), *in_double(arguments))
    for name, value in actual.items():
        assert_close_to_reference(value, expected[name], eager[name], name)
        if grid == (1, 1):
            assert torch.equal(value, eager[name]), f"{name}: not equal to the bit"


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("forced", FORCED.values(), ids=FORCED)
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_equals_one_process(ranks, grid, tokens, forced):
    check(ranks, grid, tokens, forced, torch.float32, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype(ranks, dtype):
    check(ranks, (2, 2), TOKENS["uneven"], None, dtype, {})


@pytest.mark.parametrize(
    "options",
    [
        {"activation": Activation("relu2", gated=False)},
        {"activation": Activation.gpt_oss()},
        {"shared_intermediate_size": 8, "shared_gate": True},
        {"num_identity_experts": 2, "num_null_experts": 2},
    ],
    ids=lambda options: str(next(iter(options.values()))),
)
def test_every_kind_of_layer(ranks, options):
    check(ranks, (2, 2), TOKENS["uneven"], None, torch.float32, options)


def slices(stack: Tensor, dim: int, parts: int, grid: tuple[int, int], rank: int) -> Tensor:
    """By hand: this rank's experts, and of each part of ``dim`` its slice."""
    mine = stack.chunk(grid[0])[rank // grid[1]]
    return torch.cat([part.chunk(grid[1], dim)[rank % grid[1]] for part in mine.chunk(parts, dim)], dim)


def ffn_on_grid(grid: tuple[int, int], tokens: list[int], dtype: torch.dtype, chunk_tokens: int | None) -> dict:
    mesh, rank = of_experts(*grid)
    mine = share(grid[0] * grid[1], tokens, rank)
    x, ids, weights, gate_up, down, grad = ffn_arguments(sum(tokens), dtype)
    cut = slices(gate_up, 1, 2, grid, rank), slices(down, 2, 1, grid, rank)
    how = {"group": mesh._flatten().get_group(), "tensor_ranks": grid[1], "chunk_tokens": chunk_tokens}
    return ffn_step(partial(expert_parallel_ffn, **how), x[mine], ids[mine], weights[mine], *cut, grad[mine])


@pytest.mark.parametrize("chunk_tokens", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (1, 4)], ids=str)
def test_the_function_and_its_chunks(ranks, grid, dtype, chunk_tokens):
    tokens, world_size = TOKENS["uneven"], grid[0] * grid[1]
    results = ranks.run(ffn_on_grid, grid, tokens, dtype, chunk_tokens)[:world_size]
    arguments = ffn_arguments(sum(tokens), dtype)
    kernel = ffn_step(expert_ffn, *arguments)
    eager = ffn_step(partial(expert_ffn, backend="reference"), *arguments)
    expected = ffn_step(partial(expert_ffn, backend="reference"), *in_double(arguments))
    for name in OF_TOKENS:
        value = torch.cat([found[name] for found in results])
        assert_close_to_reference(value, expected[name], eager[name], name)
    for rank, found in enumerate(results):
        for name, dim, parts in (("grad of gate_up_proj", 1, 2), ("grad of down_proj", 2, 1)):
            mine = [slices(whole[name], dim, parts, grid, rank) for whole in (expected, eager, kernel)]
            assert_close_to_reference(found[name], *mine[:2], name)
            if chunk_tokens is None:  # no sum crosses the intermediate dimension
                assert torch.equal(found[name], mine[2]), f"{name}: not equal to the bit"


def test_a_token_has_the_same_bits_wherever_it_starts(ranks):
    results = []
    for tokens in ([4, 4, 4, 4], [1, 9, 2, 4], [0, 16, 0, 0]):
        found = ranks.run(ffn_on_grid, (2, 2), tokens, torch.float32, None)
        results.append({name: torch.cat([rank[name] for rank in found]) for name in OF_TOKENS})
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


def test_parts_are_added_in_rising_order_of_ranks(ranks):
    tokens, grid = TOKENS["uneven"], (1, 4)
    found = ranks.run(ffn_on_grid, grid, tokens, torch.float32, None)
    x, ids, weights, gate_up, down, _ = ffn_arguments(sum(tokens), torch.float32)
    cuts = [(slices(gate_up, 1, 2, grid, rank), slices(down, 2, 1, grid, rank)) for rank in range(4)]
    first, second, third, last = (expert_ffn(x, ids, weights, *cut) for cut in cuts)
    out = torch.cat([rank["out"] for rank in found])
    assert torch.equal(out, ((first + second) + third) + last)
    assert not torch.equal(out, ((last + third) + second) + first)


def layer_on_three() -> dict:
    mesh = init_device_mesh("cpu", (1, 3), mesh_dim_names=("expert", "tensor"))
    layer = parallelize_module(build(), mesh, ExpertParallel(tensor_dim="tensor"))
    rank = distributed.get_rank()
    mine = slice(*((0, 2), (2, 2), (2, 9))[rank])
    found = step(layer, *(None if tensor is None else tensor[mine] for tensor in batch(9, None, torch.float32)))
    return {name: full(value) for name, value in found.items()}


def test_three_ranks_share_an_expert():
    """A number that divides nothing but the intermediate size: means over three ranks, one of them without tokens."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    three = Ranks(3)
    try:
        results = three.run(layer_on_three)
    finally:
        three.close()
    arguments, layer = batch(9, None, torch.float32), build()
    eager, expected = step(layer, *arguments), step(copy.deepcopy(layer).double(), *in_double(arguments))
    for name, value in one_process(results, 3).items():
        value = value * 3 if name in OF_EXPERTS else value
        assert_close_to_reference(value, expected[name], eager[name], name)


def counted_step(tokens: list[int], forced: list[int] | None) -> tuple[int, int]:
    """Bytes that leave this rank of a grid of 2 x 2, forward and backward."""
    _, rank = of_experts(2, 2)
    mine = share(4, tokens, rank)
    x, ids, weights, gate_up, down, grad = arguments_of(tokens, forced, torch.float32)
    cut, forward = (slices(gate_up, 1, 2, (2, 2), rank), slices(down, 2, 1, (2, 2), rank)), Sent()

    def ffn(*arguments):
        with forward:
            return expert_parallel_ffn(*arguments, group=distributed.group.WORLD, tensor_ranks=2)

    with Sent() as both:
        ffn_step(ffn, x[mine], ids[mine], weights[mine], *cut, grad[mine])
    return forward.bytes, both.bytes - forward.bytes


@pytest.mark.parametrize("forced", FORCED.values(), ids=FORCED)
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_each_token_goes_to_each_rank_once(ranks, tokens, forced):
    ids, row = arguments_of(tokens, forced, torch.float32)[1].tolist(), HIDDEN * 4
    routes, pairs = set(), []
    for source in range(4):
        for token in range(*share(4, tokens, source).indices(len(ids))):
            for expert in ids[token]:
                block = expert // (EXPERTS // 2)
                for target in {2 * block, 2 * block + 1} - {source} if 0 <= expert < EXPERTS else ():
                    routes.add((token, source, target))
                    pairs.append((source, target))
    for rank, (forward, backward) in enumerate(ranks.run(counted_step, tokens, forced)):
        rows = sum(rank in route[1:] for route in routes)
        pairs_out, pairs_in = (sum(pair[at] == rank for pair in pairs) for at in (0, 1))
        assert forward == rows * row + pairs_out * 8 + 3 * 88
        assert backward == rows * row + pairs_in * 4


# ---- training beside data, and checkpoints

LAYOUTS = [("experts", 1, 2), ("experts", 2, 2), ("experts", 1, 4), ("experts", 4, 1), ("ddp", 1, 2), ("ddp", 2, 1)]
WITH_FSDP = [("fsdp", 1, 2), ("fsdp", 2, 1)]


def lay_out(model: nn.Module, how: str, expert_ranks: int, tensor_ranks: int) -> nn.Module:
    mesh = grid(expert_ranks, tensor_ranks)
    shard_experts(model, mesh["expert", "tensor"], tensor_dim="tensor")
    if how == "ddp":
        return data_parallel(model, mesh["data"])
    if how == "fsdp":
        world = init_device_mesh("cpu", (WORLD_SIZE,))
        fully_shard_experts(model, world, mesh["data"])
        fully_shard(model, mesh=world)
    return model


def train_on_ranks(*layout) -> tuple[dict, Tensor, Tensor]:
    rank = distributed.get_rank()
    model = lay_out(build_model(False), *layout)
    layer = (model.module if layout[0] == "ddp" else model)[2].mlp
    before_last = lambda last: None if last or layout[0] != "ddp" else model.no_sync()  # noqa: E731
    mine = slice(sum(TOKENS_OF_RANKS[:rank]), sum(TOKENS_OF_RANKS[: rank + 1]))
    found = train(model, mine, WORLD_SIZE, torch.float32, before_last)
    counts = layer.expert_counts.clone()
    layer.update_expert_bias(group=distributed.group.WORLD)
    return found, counts, layer.expert_bias


@pytest.mark.parametrize(
    "layout",
    [("ddp", 1, 2), ("ddp", 2, 2), ("ddp", 1, 4), pytest.param(("fsdp", 1, 2), marks=pytest.mark.needs_fsdp)],
    ids=str,
)
def test_training_equals_one_process(ranks, layout):
    check_training(ranks.run(train_on_ranks, *layout))


def state_of(model: nn.Module) -> tuple[dict, torch.optim.Optimizer]:
    """Model and optimizer after a step whose gradients tell all entries apart, the same in every layout."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    for weight in model.parameters():
        grad = torch.arange(weight.numel(), dtype=weight.dtype).view(weight.shape).sin()
        if isinstance(weight, DTensor):
            grad = distribute_tensor(grad, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.grad = grad
    optimizer.step()
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), optimizer


def build_to_save(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), MoEFeedForward(8, 4, 8, 2, shared_intermediate_size=4))


def flat(state: dict) -> dict[str, Tensor]:
    """Every tensor by its path."""
    found = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found |= {f"{name}/{inner}": tensor for inner, tensor in flat(value).items()}
        elif isinstance(value, Tensor):
            found[name] = value.detach()
    return found


def save(folder: str, *layout, asynchronous: bool = False) -> None:
    state, _ = state_of(lay_out(build_to_save(1), *layout))
    seen = checkpointable(state)
    if layout[0] != "fsdp":  # which cuts experts once more, in its own way
        assert isinstance(seen["model"]["1.gate_up_proj"], Blocks) == (layout[2] > 1)
    assert seen["model"]["0.weight"] is state["model"]["0.weight"]
    if asynchronous:
        saved = dcp.async_save(seen, checkpoint_id=folder)
        with torch.no_grad():
            for weight in state["model"].values():  # what is saved is a copy
                weight.zero_()
        saved.result()
    else:
        dcp.save(seen, checkpoint_id=folder)


def load(folder: str, expected: dict[str, Tensor], *layout) -> None:
    model = lay_out(build_to_save(2), *layout)
    state, optimizer = state_of(model)
    dcp.load(checkpointable(state), checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loaded = flat(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)))
    assert loaded.keys() == expected.keys()
    for name, value in loaded.items():
        if isinstance(value, DTensor):
            for offsets, block in Blocks(value).blocks.items():
                assert torch.equal(block, expected[name][region(offsets, block)]), name
        else:
            assert torch.equal(value, expected[name]), name


def check_checkpoints(ranks, folder: str, source: tuple, targets: list[tuple]) -> None:
    expected = flat(state_of(build_to_save(1))[0])
    assert any(name.endswith("gate_up_proj/exp_avg") for name in expected)
    ranks.run(save, folder, *source)
    for target in targets:
        ranks.run(load, folder, expected, *target)
    state, _ = state_of(build_to_save(2))  # and one process, without ranks
    assert not torch.equal(state["model"]["1.gate_up_proj"], expected["model/1.gate_up_proj"])
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    for name, value in flat(state).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_every_world_loads_what_another_saved(ranks, tmp_path, source):
    check_checkpoints(ranks, str(tmp_path), source, LAYOUTS)


def save_while_it_goes_on(folder: str) -> None:
    save(folder, "experts", 2, 2, asynchronous=True)


def test_saved_while_training_goes_on(ranks, tmp_path):
    ranks.run(save_while_it_goes_on, str(tmp_path))
    expected, (state, _) = flat(state_of(build_to_save(1))[0]), state_of(build_to_save(2))
    dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    for name, value in flat(state).items():
        assert torch.equal(value, expected[name]), name


def ask_of_blocks() -> None:
    state, _ = state_of(lay_out(build_to_save(1), "experts", 2, 2))
    checkpointable(state)["model"]["1.gate_up_proj"] + 1


def test_what_is_seen_is_no_tensor_to_compute_with(ranks):
    for line in failure(ranks, ask_of_blocks):
        assert line.startswith("NotImplementedError: checkpointable: what it gives is for torch.distributed.checkpoint")


@pytest.mark.needs_fsdp
@pytest.mark.parametrize("source", WITH_FSDP, ids=str)
def test_fsdp_loads_what_another_saved_and_the_other_way(ranks, tmp_path, source):
    check_checkpoints(ranks, str(tmp_path), source, [*WITH_FSDP, ("experts", 1, 4), ("ddp", 1, 2)])


def test_ranks_load_what_one_process_saved(ranks, tmp_path):
    state, _ = state_of(build_to_save(1))
    dcp.save(state, checkpoint_id=str(tmp_path), no_dist=True)
    for target in LAYOUTS:
        ranks.run(load, str(tmp_path), flat(state), *target)


def without(folder: str, saves: bool) -> str:
    state, _ = state_of(lay_out(build_to_save(2), "experts", 2, 2))
    before = flat(state)["model/1.down_proj"].to_local().clone()
    try:
        dcp.save(state, checkpoint_id=folder) if saves else dcp.load(state, checkpoint_id=folder)
    except CheckpointException as error:
        assert torch.equal(flat(state)["model/1.down_proj"].to_local(), before)
        return str(error)
    raise AssertionError("no error")


@pytest.mark.parametrize("saves", [True, False])
def test_a_state_that_is_not_checkpointable_is_refused(ranks, tmp_path, saves):
    """PyTorch would load the first rows that follow each other for a slice of gate and a slice of up."""
    dcp.save(state_of(build_to_save(1))[0], checkpoint_id=str(tmp_path), no_dist=True)
    for message in ranks.run(without, str(tmp_path), saves):
        assert "torch.distributed.checkpoint must be given checkpointable(state), got 1.* as it is" in message


def blocks_of(shape: tuple[int, ...], placements: tuple) -> tuple[Tensor, list]:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    cut = distribute_tensor(whole, grid(2, 2)["expert", "tensor"], placements, src_data_rank=None)
    return whole, list(Blocks(cut).blocks.items())


@pytest.mark.parametrize(
    "placements",
    [
        (Shard(0), _StridedShard(1, split_factor=2)),
        (_StridedShard(0, split_factor=2), Shard(0)),
        (Replicate(), _StridedShard(1, split_factor=3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(4, 12), (8, 6), (1, 6), (3, 7)], ids=str)  # some uneven, some ranks without any
def test_blocks_make_up_the_whole(ranks, shape, placements):
    found = ranks.run(blocks_of, shape, placements)
    whole, copies = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for _, blocks in found:
        for offsets, block in blocks:
            whole[region(offsets, block)] = block
            copies[region(offsets, block)] += 1
    assert torch.equal(whole, found[0][0])
    assert (copies == (2 if placements[0] == Replicate() else 1)).all()


# ---- the experts of transformers models


def zoo_step(name: str, tensor_ranks: int, chunk_tokens: int | None) -> dict[str, Tensor]:
    from tests.distributed.test_experts_modules import TOKENS, build, step

    module, (mesh, rank) = build(name), of_experts(WORLD_SIZE // tensor_ranks, tensor_ranks)
    shard_experts(module, mesh, chunk_tokens=chunk_tokens, tensor_dim="tensor")
    return step(module, slice(*((0, 3), (3, 3), (3, 8), (8, TOKENS))[rank]), WORLD_SIZE)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("tensor_ranks", [2, 4])
@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "NemotronHExperts", "AriaExperts"])
def test_experts_of_transformers(ranks, name, tensor_ranks, chunk_tokens):
    modules = pytest.importorskip("tests.distributed.test_experts_modules")
    assert name in modules.CLASSES
    results = ranks.run(zoo_step, name, tensor_ranks, chunk_tokens)
    for entry, value in modules.step(modules.build(name), slice(None), 1).items():
        parts = [found[entry] for found in results]
        actual = torch.cat(parts) if entry in ("out", "x", "weights") else parts[0]
        assert_close_to_reference(actual, value, value, entry)


# ---- refusals


def refused(kind: str) -> None:
    mesh, module = grid(2, 2), None
    if kind in ("norm", "parameter", "gate"):
        from tests.distributed.test_experts_modules import build

        module = build("MixtralExperts")
    if kind == "uneven":
        shard_experts(nn.ModuleDict({"mlp": MoEFeedForward(8, 5, 4, 2)}), mesh["expert", "tensor"], tensor_dim="tensor")
    elif kind == "other order":
        shard_experts(Model(), mesh["expert", "tensor"], tensor_dim="expert")
    elif kind == "one dimension":
        shard_experts(Model(), mesh["expert"], tensor_dim="tensor")
    elif kind == "not named":
        shard_experts(Model(), mesh["expert", "tensor"])
    elif kind == "norm":
        module.has_post_expert_norm = True
    elif kind == "parameter":
        module.scale = nn.Parameter(torch.ones(module.num_experts, 3))
    elif kind == "gate":
        module._apply_gate = lambda h: h.softmax(1).chunk(2, 1)[0]
    if module is not None:
        ExpertParallel("layer 3", tensor_dim="tensor")._apply(module, mesh["expert", "tensor"])


@pytest.mark.parametrize(
    "kind, message",
    [
        ("uneven", "mlp: intermediate size of gate_up_proj must be a multiple of the 2 ranks that share an expert"),
        ("other order", "mlp: device_mesh must be of two dimensions, the second 'expert', got ('expert', 'tensor')"),
        ("one dimension", "mlp: device_mesh must be of two dimensions, the second 'tensor', got ('expert',); give"),
        ("not named", "mlp: device_mesh must be of one dimension, got 2; give the dimension of the experts, mesh['exp"),
        ("norm", "layer 3: tensor_dim must be None where a norm follows each expert, got tensor; a norm needs"),
        ("parameter", "layer 3: tensor_dim must be None for this class, got a parameter scale; it is not known how to"),
        ("gate", "layer 3: tensor_dim must be None for this class, got a gate that sees more than its element; spread"),
    ],
)  # fmt: skip
def test_refusals(ranks, kind, message):
    if message.startswith("layer 3"):
        pytest.importorskip("tests.distributed.test_experts_modules")
    for line in failure(ranks, refused, kind):
        assert line.startswith(f"ValueError: ExpertParallel: {message}"), line


def other_split() -> None:
    x, ids, weights, gate_up, down, _ = ffn_arguments(3, torch.float32)
    split = 4 if distributed.get_rank() == 3 else 2
    expert_parallel_ffn(x, ids, weights, gate_up[: 2 * split], down, group=distributed.group.WORLD, tensor_ranks=split)


def test_ranks_that_split_experts_otherwise(ranks):
    for line in failure(ranks, other_split):
        assert "ranks of each expert must be the same on all ranks" in line and "4 on rank 3" in line


def split_of_one(split: int) -> None:
    x, ids, weights, gate_up, down, _ = ffn_arguments(3, torch.float32)
    split = split if distributed.get_rank() == 3 else 2
    expert_parallel_ffn(x, ids, weights, gate_up[:4], down[:4], group=distributed.group.WORLD, tensor_ranks=split)


@pytest.mark.parametrize("split", [0, 3, 8])
def test_a_split_that_does_not_divide_the_ranks(ranks, split):
    lines = failure(ranks, split_of_one, split)
    own = f"ValueError: ExpertParallel: expert_parallel_ffn: tensor_ranks must be a divisor of the 4 ranks, got {split}"
    assert lines[3] == own
    assert all(f"ranks [3] met an error before it; rank 3: {own}" in line for line in lines[:3])


def test_what_is_seen_is_for_checkpoints_alone():
    state = {"a": torch.ones(2), "b": [1, {"c": torch.zeros(1)}]}
    seen = checkpointable(state)
    assert seen["a"] is state["a"] and seen["b"][1]["c"] is state["b"][1]["c"]
