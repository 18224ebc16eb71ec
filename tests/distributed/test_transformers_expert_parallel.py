"""transformers' expert parallelism, through its loader, with our experts and our dispatch; logits and gradients."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from moe_kernels.distributed import data_parallel, shard_experts
from moe_kernels.testing import assert_close_to_reference
from tests.distributed.test_expert_parallel import mesh_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers without EPImplementation")
pytest.importorskip("moe_kernels.integrations.transformers")
sys.path.insert(0, str(Path(__file__).parent.parent / "integrations"))
from tiny_models import build_model  # noqa: E402

#: packed gates; biases, interleaved and transposed; a shared expert, groups and a bias of the router
MODELS = ["Qwen3MoeForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM"]
#: each rank its batch; pairs of ranks share one
LAYOUTS = {"fsdp": {"fsdp_size": 4, "ep_size": 4}, "fsdp and tp": {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}}
#: ids outside the experts of a rank reach our kernels from all_reduce and moe_kernels
SHARED = {"tp_size": 2, "fsdp_size": 2, "ep_size": 2}


def tokens_of(replica: int) -> Tensor:
    return torch.randint(5, 90, (2, 7), generator=torch.Generator().manual_seed(replica))


def load_and_step(folder: str, layout: dict, ep_implementation: str, train: bool) -> tuple[Tensor, dict[str, Tensor]]:
    transformers.utils.logging.disable_progress_bar()
    config = transformers.distributed.DistributedConfig(**layout, ep_implementation=ep_implementation)
    options = {"distributed_config": config, "experts_implementation": "moe_kernels", "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    experts = [module for module in model.modules() if hasattr(module, "is_transposed")]
    assert experts and all(module.num_experts == 4 // layout["ep_size"] for module in experts)
    replica = distributed.get_rank() // layout.get("tp_size", 1)
    if not train:
        with torch.no_grad():
            return full(model(tokens_of(replica)).logits), {}
    logits, loss = step(model, tokens_of(replica))
    loss.backward()
    return full(logits).detach(), {
        name: full(weight.grad) for name, weight in model.named_parameters() if weight.grad is not None
    }


def step(model, ids: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(ids).logits
    return logits, full(logits).square().mean()


def full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_and_step(folder: str, chunk_tokens: int | None, experts: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Four ranks with a batch each; experts over two of them, data over the rest by DDP."""
    mesh = mesh_of(2)
    options = {"experts_implementation": experts, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    shard_experts(model, mesh["expert"], chunk_tokens=chunk_tokens)
    spread = [module for module in model.modules() if hasattr(module, "expert_parallel")]
    assert spread and all(type(module).__name__.startswith("Sharded") for module in spread)
    wrapped = data_parallel(model, mesh["data"], find_unused_parameters=True)
    logits, loss = step(wrapped, tokens_of(distributed.get_rank()))
    loss.backward()
    grads = {name: full(weight.grad) for name, weight in model.named_parameters() if weight.grad is not None}
    return logits.detach(), grads


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("name", [*MODELS, "NemotronHForCausalLM"])  # the last has no gate
def test_our_style_on_their_experts(ranks, folder, name, chunk_tokens):
    results = ranks.run(shard_and_step, folder(name), chunk_tokens, "moe_kernels")
    check(folder(name), LAYOUTS["fsdp"], results, train=True)


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_our_style_with_their_implementations(ranks, folder, experts):
    path = folder("Qwen3MoeForCausalLM")
    check(path, LAYOUTS["fsdp"], ranks.run(shard_and_step, path, None, experts), train=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(name: str) -> str:
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp(name))
            build_model(name).save_pretrained(made[name])
        return made[name]

    return make


@pytest.mark.parametrize("ep_implementation", ["all_to_all", "moe_kernels"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_training_step(ranks, folder, name, layout, ep_implementation):
    results = ranks.run(load_and_step, folder(name), layout, ep_implementation, True)
    check(folder(name), layout, results, train=True)


@pytest.mark.parametrize("name", MODELS)
def test_inference_with_sentinels(ranks, folder, name):
    results = ranks.run(load_and_step, folder(name), SHARED, "all_reduce", False)
    check(folder(name), SHARED, results, train=False)


def check(path: str, layout: dict, results: list, *, train: bool) -> None:
    replicas = layout["fsdp_size"]
    each = len(results) // replicas

    def one_process(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
        options = {"experts_implementation": "eager", "dtype": torch.float32}
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **options).to(dtype)
        steps = [step(model, tokens_of(replica)) for replica in range(replicas)]
        (sum(loss for _, loss in steps) / replicas).backward()
        grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        return [logits.detach() for logits, _ in steps], grads

    (eager, eager_grads), (expected, expected_grads) = one_process(torch.float32), one_process(torch.float64)
    for rank, (logits, grads) in enumerate(results):
        assert_close_to_reference(logits, expected[rank // each], eager[rank // each], f"logits of rank {rank}")
        assert not train or grads.keys() == expected_grads.keys()
        for name, grad in grads.items():
            assert_close_to_reference(grad, expected_grads[name], eager_grads[name], f"grad of {name}")
