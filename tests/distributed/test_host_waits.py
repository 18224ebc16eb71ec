"""Where the host would wait for a device in a layer: once, for the sizes. Counted by what Python asks of tensors.

What is seen is every question of Python for a value, and every op whose shape hangs on values; a CUDA tensor answers
them after a wait. What kernels do inside is not seen here; waits for the rows themselves are the stream's.
"""

import contextlib
import traceback
from unittest import mock

import pytest
import torch
from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels.distributed import expert_parallel_lora, shard_experts
from moe_kernels.nn import add_expert_lora
from tests.distributed.test_bad_ranks import Model
from tests.distributed.test_expert_parallel import mesh_of
from tests.distributed.test_sharded_ops import lora_arguments
from tests.distributed.test_tensor_parallel import grid

#: methods that bring values to the host without an op; ``to`` where it is told so
METHODS = ("tolist", "cpu", "numpy", "to")
#: ops whose result has a shape that only the values say, and the one that single values come from
ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "repeat_interleave"}


class Waits(TorchDispatchMode):
    """Collects the places in the package that ask for values, forward and backward."""

    def __enter__(self):
        self.places: list[str] = []
        self.patches = contextlib.ExitStack()
        for name in METHODS:
            self.patches.enter_context(mock.patch.object(torch.Tensor, name, self.noted(name)))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()

    def noted(self, name: str):
        method = getattr(torch.Tensor, name)

        def call(*arguments, **options):
            if name != "to" or "cpu" in map(str, (*arguments[1:], *options.values())):
                self.note(name)
            return method(*arguments, **options)

        return call

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.__name__.partition(".")[0]
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in arguments[1])
        if name in ASKING or by_mask:
            self.note(name)
        return function(*arguments, **(options or {}))

    def note(self, what: str) -> None:
        ours = [frame for frame in traceback.extract_stack() if "/moe_kernels/" in frame.filename]
        place = f"{ours[-1].filename.rpartition('/moe_kernels/')[2]}:{ours[-1].name}" if ours else "test"
        self.places.append(f"{what} in {place}")


def waits_of_a_layer(kind: str, chunk_tokens: int | None) -> tuple[list[str], list[str]]:
    """Of a forward and of a backward."""
    model = Model(shared_intermediate_size=4)
    if kind == "adapters":
        add_expert_lora(model, 2)
    if kind == "slices":
        shard_experts(model, grid(2, 2)["expert", "tensor"], tensor_dim="tensor", chunk_tokens=chunk_tokens)
    else:
        shard_experts(model, mesh_of(4)["expert"], chunk_tokens=chunk_tokens)
    x = torch.randn(5 if distributed.get_rank() else 3, 8, requires_grad=True)
    with Waits() as forward:
        out = model.mlp(x)
    with Waits() as backward:
        out.sum().backward()
    assert x.grad.any()
    return forward.places, backward.places


SIZES = "tolist in distributed/sizes.py:exchange_sizes"


@pytest.mark.parametrize("kind", ["plain", "slices", "adapters"])
def test_one_wait_forward_and_none_backward(ranks, kind):
    for forward, backward in ranks.run(waits_of_a_layer, kind, None):
        assert forward == [SIZES]
        assert backward == []


@pytest.mark.parametrize("kind", ["plain", "slices"])
def test_one_wait_for_each_chunk(ranks, kind):
    for forward, backward in ranks.run(waits_of_a_layer, kind, 2):
        assert forward == backward == [SIZES] * 3  # of the rank that has most, five tokens


def waits_of_lora() -> tuple[list[str], list[str]]:
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = mesh_of(4)["expert"]
    x, lora_a, lora_b, ids, weights, *_ = lora_arguments(4, torch.float32)
    factors = [distribute_tensor(factor, mesh, [Shard(0)]).requires_grad_() for factor in (lora_a, lora_b)]
    with Waits() as forward:
        out = expert_parallel_lora(x.requires_grad_(), *factors, ids, weights)
    with Waits() as backward:
        out.sum().backward()
    return forward.places, backward.places


def test_adapters_over_ranks(ranks):
    for forward, backward in ranks.run(waits_of_lora):
        assert forward == [SIZES] and backward == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: [0] * int(x.sum()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x.to(torch.device("cpu")),
        lambda x: x.to(device="cpu"),
        lambda x: x.numpy(),
        lambda x: torch.unique(x),
        lambda x: torch.repeat_interleave(x.long()),
    ],
)
def test_the_count_sees(ask):
    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            ask(grad)
            return grad

    with Waits() as forward:
        ask(torch.ones(2))
    out = Asks.apply(torch.ones(2, requires_grad=True))
    with Waits() as backward:
        out.sum().backward()
    assert forward.places and forward.places == backward.places
