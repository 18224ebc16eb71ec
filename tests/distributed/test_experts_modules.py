"""ExpertParallel over the experts modules of transformers: one class of each kind that there is."""

import sys
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

pytest.importorskip("transformers")
pytest.importorskip("moe_kernels.integrations.transformers")
sys.path.insert(0, str(Path(__file__).parent.parent / "integrations"))
import experts_zoo

from moe_kernels.distributed import ExpertParallel, shard_experts
from moe_kernels.distributed.experts_module import is_experts_module
from moe_kernels.testing import assert_close_to_reference, random_routing
from tests.distributed.ranks import Ranks, full
from tests.distributed.test_bad_ranks import failure
from tests.distributed.test_expert_parallel import mesh_of

#: that four ranks can share; the zoo's own numbers are primes
NUM_EXPERTS, INTERMEDIATE_SIZE = 4, 8
#: as tests/integrations tells them apart
NAMES = (
    "MixtralExperts", "AriaExperts", "GptOssExperts", "OpenAIPrivacyFilterExperts", "NemotronHExperts",
    "Gemma4TextExperts", "DeepseekV4Experts", "Lfm2MoeExperts", "MuseSparkExperts",
)  # fmt: skip
CLASSES = {str(found): found for found in experts_zoo.decorated_classes() if str(found) in NAMES}
TOKENS = 10


def build(name: str) -> nn.Module:
    sizes = {NUM_EXPERTS: experts_zoo.NUM_EXPERTS, INTERMEDIATE_SIZE: experts_zoo.INTERMEDIATE_SIZE}
    ours = {size: experts_zoo._SIZES[of_zoo] for size, of_zoo in sizes.items()}
    with mock.patch.dict(experts_zoo._SIZES, ours):  # the last size of a name is the one it gets
        with mock.patch.object(experts_zoo, "INTERMEDIATE_SIZE", INTERMEDIATE_SIZE):
            module = experts_zoo.build(CLASSES[name], torch.float64)
    module.config._experts_implementation = "moe_kernels"
    return module


def step(module: nn.Module, rows: slice, ranks: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The gradient of what is spread is a mean over ranks; times their number, a power of two, it is the sum."""
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(TOKENS, experts_zoo.HIDDEN_SIZE, generator=generator).to(dtype) for _ in range(2))
    ids, weights = random_routing(TOKENS, NUM_EXPERTS, 3)
    x, weights = x[rows].requires_grad_(), weights[rows].requires_grad_()
    out = module(x, ids.long()[rows], weights)
    out.backward(grad[rows])
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    whole = {name: full(grad) * (ranks if isinstance(grad, DTensor) else 1) for name, grad in grads.items()}
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad} | whole


def on_two_ranks(name: str, chunk_tokens: int | None) -> dict[str, Tensor]:
    module, mesh = build(name), mesh_of(2)["expert"]
    cls = type(module)
    shard_experts(module, mesh, chunk_tokens=chunk_tokens)
    assert isinstance(module, cls) and module.num_experts == NUM_EXPERTS
    return step(module, slice(0, 3) if mesh.get_local_rank() == 0 else slice(3, TOKENS), 2)


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_equals_one_process(ranks, name, chunk_tokens):
    first, second, *again = ranks.run(on_two_ranks, name, chunk_tokens)
    expected = step(build(name), slice(None), 1)
    for entry, value in expected.items():
        if entry in ("out", "x", "weights"):
            actual = torch.cat([first[entry], second[entry]])
        elif "proj" in entry:  # spread: all ranks have it whole
            actual = first[entry]
        else:  # replicated: each rank has its part
            actual = first[entry] + second[entry]
        assert_close_to_reference(actual, value, value, entry)
    for one, other in zip((first, second), again, strict=True):
        assert all(torch.equal(one[entry], other[entry]) for entry in one)


def step_with_an_error() -> str:
    distributed.barrier()  # ranks start at their own time, and the group is impatient
    group = distributed.new_group(timeout=timedelta(seconds=3))
    module = build("AriaExperts")
    if distributed.get_rank() == 1:
        module.config._experts_implementation = "of nobody"
    shard_experts(nn.ModuleDict({"experts": module}), DeviceMesh.from_group(group, "cpu"))
    try:
        step(module, slice(None), 2)
    except (KeyError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def test_an_error_of_one_rank_reaches_the_other():
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    ranks = Ranks(2)
    try:
        other, own = ranks.run(step_with_an_error)
    finally:
        ranks.close()
    assert own.startswith("KeyError") and "of nobody" in own
    assert other.startswith("RuntimeError: ExpertParallel: experts: all ranks of the expert group must reach this")
    assert "; rank 1 met KeyError: " in other and "in experts; see its own error" in other


def with_a_parameter_of_its_own() -> None:
    module = build("MixtralExperts")
    module.temperature = nn.Parameter(torch.ones(()))
    assert is_experts_module(module)
    ExpertParallel("layer 3")._apply(module, mesh_of(2)["expert"])


def test_a_parameter_that_is_not_by_expert_is_refused(ranks):
    for line in failure(ranks, with_a_parameter_of_its_own):
        assert line.startswith("ValueError: ExpertParallel: layer 3: temperature must be of shape [num_experts=4, ...]")
    assert not distributed.is_initialized()
