"""Results in memory that earlier results have freed."""

import threading

import pytest
import torch

import moe_kernels
from moe_kernels import grouped_gemm, memory

pytestmark = pytest.mark.skipif(memory.cpu_missing_reason() is not None, reason="the CPU kernels were not built")

#: of the gradient below: well above the 8 MiB from which memory is kept
_SHAPE = (3, 1024, 1024)


def _weight_grad(scale: float) -> torch.Tensor:
    weights = torch.zeros(_SHAPE, requires_grad=True)
    rows = torch.full((4, _SHAPE[2]), scale)
    offsets = torch.tensor([0, 1, 1, 4], dtype=torch.int32)
    return torch.autograd.grad(grouped_gemm(rows, weights, offsets).sum(), weights)[0]


@pytest.fixture(autouse=True)
def empty():
    moe_kernels.empty_cache()
    yield
    moe_kernels.empty_cache()


def test_freed_results_are_used_again():
    first = _weight_grad(1.0)
    address = first.data_ptr()
    del first
    second = _weight_grad(2.0)
    assert second.data_ptr() == address
    # expert 1 has no rows: its gradient is zero, not what the memory held
    assert second[1].count_nonzero() == 0
    assert torch.equal(second[0], torch.full(_SHAPE[1:], 2.0)) and torch.equal(second[2], torch.full(_SHAPE[1:], 6.0))


def test_results_in_use_are_not_touched():
    first = _weight_grad(1.0)
    view = first[2, 5:7]
    del first
    other = _weight_grad(3.0)
    assert torch.equal(view, torch.full((2, _SHAPE[2]), 3.0))
    assert other.data_ptr() != view.untyped_storage().data_ptr()


def test_empty_cache_says_what_it_gave_back():
    assert moe_kernels.empty_cache() == 0
    gradient = _weight_grad(1.0)
    assert moe_kernels.empty_cache() == 0  # in use
    size = gradient.untyped_storage().nbytes()
    del gradient
    assert moe_kernels.empty_cache() >= size
    assert moe_kernels.empty_cache() == 0


def test_what_is_kept_is_bounded_by_what_was_in_use():
    size = _weight_grad(1.0).untyped_storage().nbytes()
    # growing results: none fits the one before it, so all but the last are given back
    for rows in range(4000, 8000, 1500):
        grouped_gemm(torch.ones(rows, 64), torch.ones(1, 1024, 64), torch.tensor([0, rows], dtype=torch.int32))
    assert moe_kernels.empty_cache() <= max(size, 7000 * 1024 * 4) + (2 << 20)


def test_threads_share_it():
    wrong = []

    def work(scale: float) -> None:
        for _ in range(5):
            gradient = _weight_grad(scale)
            if not torch.equal(gradient[2], torch.full(_SHAPE[1:], 3 * scale)):
                wrong.append(scale)

    threads = [threading.Thread(target=work, args=(float(i + 1),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
