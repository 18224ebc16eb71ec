"""The CUDA expert FFN on a GPU of compute capability 9.0: forward alone. The op tests run Triton's kernels, which have
gradients; the PTX interpreter runs this kernel where there is no GPU (test_ptx_rows_gemm.py)."""

import pytest
import torch

from moe_kernels import Activation, _dispatch, expert_ffn
from moe_kernels.testing import assert_close_to_reference, random_routing

REASON = _dispatch.missing_reason("expert_ffn", "native", "cuda")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

ACTIVATIONS = [Activation(), Activation.gpt_oss(), Activation("gelu", gated=False), Activation("gelu_tanh", limit=0.5)]


def layer(num_tokens, hidden_size, intermediate_size, num_experts, top_k, dtype, activation=ACTIVATIONS[0], bias=False):
    with torch.device("cuda"):
        ids, weights = random_routing(num_tokens, num_experts, top_k, skip=0.1)
        gate_up_size = intermediate_size * (2 if activation.gated else 1)
        tensors = [
            torch.randn(num_tokens, hidden_size),
            weights,
            torch.randn(num_experts, gate_up_size, hidden_size) * hidden_size**-0.5,
            torch.randn(num_experts, hidden_size, intermediate_size) * intermediate_size**-0.5,
        ]
        biases = (
            [torch.randn(num_experts, gate_up_size), torch.randn(num_experts, hidden_size)] if bias else [None, None]
        )
    return ids, [None if tensor is None else tensor.to(dtype) for tensor in [*tensors, *biases]]


def call(ids, tensors, backend="native", **options):
    x, weights, gate_up, down, gate_up_bias, down_bias = tensors
    biases = dict(gate_up_bias=gate_up_bias, down_bias=down_bias)
    return expert_ffn(x, ids, weights, gate_up, down, **biases, backend=backend, **options)


# every tile of tokens; sizes below, at and past a tile and a step
@pytest.mark.parametrize(
    "sizes",
    [(1, 64, 64, 8, 8), (37, 40, 24, 5, 2), (129, 72, 288, 4, 2), (300, 256, 128, 8, 2), (2048, 512, 320, 16, 4)],
)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["silu", "gpt_oss", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward(dtype, activation, sizes):
    ids, tensors = layer(*sizes, dtype, activation, bias=True)
    for interleaved in [False, True][: 1 + activation.gated]:
        options = dict(activation=activation, interleaved=interleaved)
        doubles = [None if tensor is None else tensor.double() for tensor in tensors]
        reference64, eager = (call(ids, t, "reference", **options) for t in (doubles, tensors))
        assert_close_to_reference(call(ids, tensors, **options), reference64, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_bits_in_any_batch_and_as_triton(dtype):
    ids, tensors = layer(3000, 1024, 512, 16, 4, dtype)
    out = call(ids, tensors)
    assert torch.equal(out, call(ids, tensors))
    assert torch.equal(out, call(ids, tensors, "triton"))
    for size in (1, 7, 60, 300, 1500):
        few = [tensors[0][:size], tensors[1][:size], *tensors[2:]]
        assert torch.equal(call(ids[:size], few), out[:size])


def test_graph_and_compile():
    ids, tensors = layer(70, 256, 128, 8, 2, torch.bfloat16)
    expected = call(ids, tensors, "auto")
    compiled = torch.compile(lambda x, i: call(i, [x, *tensors[1:]], "auto"), fullgraph=True)
    assert torch.equal(compiled(tensors[0], ids), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(ids, tensors, "auto")
    ids.copy_(ids.flip(0)), tensors[0].copy_(tensors[0].flip(0)), tensors[1].copy_(tensors[1].flip(0))
    graph.replay()
    assert torch.equal(out, expected.flip(0))


def test_what_does_not_fit_goes_to_triton():
    for dtype, hidden_size, transposed, message in [
        (torch.float32, 64, False, "hidden_states must be bfloat16 or float16"),
        (torch.bfloat16, 60, False, "multiples of 8"),
        (torch.bfloat16, 64, True, r"gate_up_proj.stride\(\)"),
    ]:
        ids, tensors = layer(9, hidden_size, 32, 4, 2, dtype)
        if transposed:
            tensors[2] = tensors[2].transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(call(ids, tensors, "auto"), call(ids, tensors, "triton"))
        with pytest.raises(ValueError, match=message):
            call(ids, tensors)
    ids, tensors = layer(9, 64, 32, 4, 2, torch.bfloat16)
    tensors[0].requires_grad_()
    with pytest.raises(RuntimeError, match="expert_ffn with gradients has no CUDA kernels yet"):
        call(ids, tensors)
    assert torch.autograd.grad(call(ids, tensors, "auto").sum(), tensors[0])[0].isfinite().all()


def test_ids_outside_and_nothing_to_do():
    ids, tensors = layer(5, 64, 32, 4, 2, torch.bfloat16)
    assert torch.equal(call(torch.full_like(ids, 99), tensors), torch.zeros_like(tensors[0]))
    none = [tensors[0][:0], tensors[1][:0], *tensors[2:]]
    assert call(ids[:0], none).shape == (0, 64)
