"""The training part of the demo, small and in one process."""

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", reason="the demo trains a model of transformers")

from moe_kernels.demo import finetune
from moe_kernels.demo.settings import FinetuneSettings
from moe_kernels.testing import assert_close_to_reference

TINY = FinetuneSettings(
    hidden_size=32,
    intermediate_size=16,
    num_layers=1,
    num_experts=4,
    top_k=2,
    window_size=16,
    batch_size=2,
    num_steps=3,
)
TEXT = "How many experts does a token need? " * 8


def test_both_implementations_start_from_the_same_weights_and_loss():
    ours = finetune.build_model(TINY, 0, "moe_kernels")
    theirs = finetune.build_model(TINY, 0, "grouped_mm")
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    batch = finetune.batches(TEXT, TINY, 0)[0]
    exact = copy.deepcopy(theirs).double()
    exact.set_experts_implementation("eager")
    expected = exact(batch, labels=batch).logits
    assert_close_to_reference(ours(batch).logits, expected, theirs(batch).logits)


@pytest.mark.parametrize("implementation", TINY.implementations)
def test_training_lowers_the_loss(implementation):
    result = finetune.train(replace(TINY, num_steps=12), 0, implementation, TEXT)
    assert len(result["losses"]) == 12
    assert result["losses"][-1] < result["losses"][0]
    assert result["step_ms"] > 0
    assert result["saved_bytes"] > 0


def test_batches_depend_on_the_seed_alone():
    first, again, other = (finetune.batches(TEXT, TINY, seed) for seed in (0, 0, 1))
    assert len(first) == TINY.num_steps
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    class Squares(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(10))

        def forward(self, batch, labels):
            product = self.weight * batch  # saves batch; the parameter does not count
            return type("Output", (), {"loss": (product * product).sum()})  # saves the product twice

    batch = torch.ones(10)
    assert finetune.saved_bytes(Squares(), batch) == 2 * 10 * batch.element_size()


def test_resident_bytes():
    assert finetune.resident_bytes("VmRSS") <= finetune.resident_bytes("VmHWM")
    assert finetune.resident_bytes("NoSuchField") is None


def test_a_failing_training_is_named():
    broken = replace(TINY, implementations=("no_such_implementation",))
    with pytest.raises(RuntimeError, match="training with no_such_implementation must succeed, got exit code 1"):
        finetune.run(broken, 0, lambda iterable, description: iterable)
