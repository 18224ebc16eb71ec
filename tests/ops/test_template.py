"""The template room. Five blocks, as in every room: forward, backward, edges, registration, compile."""

import pytest
import torch

from moe_kernels.ops._template import native, scale_rows
from tests.ops.helpers import DTYPES, check, strided


# hidden sizes: one below, at and above an AVX-512 vector of float32; 300 takes several vectors and a tail
@pytest.mark.parametrize("hidden_size", [15, 16, 17, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(backend, dtype, hidden_size):
    rows, weights = torch.randn(70, hidden_size, dtype=dtype), torch.rand(70)
    check(lambda rows, backend: scale_rows(rows, weights, backend=backend), [rows], backend, backward=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(backend, dtype):
    weights = torch.rand(9)
    check(lambda rows, backend: scale_rows(rows, weights, backend=backend), [torch.randn(9, 33, dtype=dtype)], backend)


def test_gradcheck(backend):
    rows = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scale_rows(x, torch.rand(3).double() * 0 + 2, backend=backend), rows)


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (4, 0)])
def test_edges(backend, shape):
    assert scale_rows(torch.randn(shape), torch.rand(shape[0]), backend=backend).shape == shape


def test_strides(backend):
    rows, weights = torch.randn(5, 12), torch.rand(5)
    assert torch.equal(scale_rows(strided(rows), weights, backend=backend), rows * weights[:, None])


def test_bad_input():
    with pytest.raises(ValueError, match=r"scale_rows: weights must be of shape \[num_rows=3\], got \[4\]"):
        scale_rows(torch.randn(3, 2), torch.rand(4))
    with pytest.raises(TypeError, match="scale_rows: rows must be one of"):
        scale_rows(torch.ones(3, 2, dtype=torch.int32), torch.rand(3))


def test_registration(backend):
    torch.library.opcheck(native.scale_rows, (torch.randn(3, 4), torch.rand(3)))


def test_compile(backend):
    compiled = torch.compile(lambda x, w: scale_rows(x, w, backend=backend), fullgraph=True, dynamic=True)
    for num_rows in (3, 7):
        rows, weights = torch.randn(num_rows, 4), torch.rand(num_rows)
        assert torch.equal(compiled(rows, weights), rows * weights[:, None])
