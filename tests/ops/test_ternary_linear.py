"""ternary_linear: forward, backward, edges, registration, compile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import TernaryDelta, ternary_linear
from moe_kernels.ops.ternary_linear import native
from tests.ops.helpers import DTYPES, LOW_DTYPES, SLOW, check, check_exact, leaf, small_integers, strided

OP = "ternary_linear"
GPU_KERNELS = ["native-simt", "native-ptx", "native-cuda", "triton-cpu", "triton-ptx", "triton-cuda"]
#: those that take 16 bits alone
OF_16_BITS = ("native-simt", "native-ptx", "native-cuda")


def make_deltas(count: int, out_features: int, in_features: int, density: float = 0.3, generator=None):
    """Signs of either kind, each delta with a scale of its own."""
    deltas = []
    for i in range(count):
        signs = torch.randint(0, 2, (out_features, in_features), generator=generator) * 2 - 1
        kept = torch.rand(out_features, in_features, generator=generator) < density
        deltas.append(TernaryDelta.from_signs(signs * kept, 0.5 + i))
    return deltas


def pairs(num_tokens: int, num_deltas: int, top_k: int, generator=None):
    """Ids from -1 to one past the last delta, and weights of either sign."""
    ids = torch.randint(-1, num_deltas + 1, (num_tokens, top_k), generator=generator, dtype=torch.int32)
    return ids, torch.randn(num_tokens, top_k, generator=generator)


# (tokens, in, out): decode and a few more; rows that begin at a group and at any bit; past a chunk; past a task's rows
SIZES = [(3, 5, 7), (1, 64, 33), (5, 63, 65), (4, 65, 17), (7, 200, 130), (2, 2113, 9), (130, 96, 40)]


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_and_weights(backend, dtype, sizes, top_k):
    num_tokens, in_features, out_features = sizes
    deltas = make_deltas(3, out_features, in_features)
    ids, weights = pairs(num_tokens, 3, top_k)
    tensors = [
        torch.randn(num_tokens, in_features).to(dtype),
        (torch.randn(out_features, in_features) * in_features**-0.5).to(dtype),
        weights,
        torch.randn(out_features).to(dtype),
    ]

    def op(x, w, a, bias, backend):
        return ternary_linear(x, w, deltas, ids, a, bias=bias, coefficients=[1.0, -0.5, 2.0], backend=backend)

    check(op, tensors, backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number(backend, dtype):
    """Exactly: of a single result there is no larger one whose rounding error it may have."""
    delta = TernaryDelta.from_signs(torch.ones(1, 1), 0.5)
    x, weight, bias = (torch.tensor([[value]], dtype=dtype) for value in (3.0, 2.0, 1.0))
    out = ternary_linear(x, weight, [delta, -delta], torch.tensor([[0, 1, 0]]), torch.tensor([[1.0, 2.0, 4.0]]),
                         bias=bias[0], backend=backend)  # fmt: skip
    assert out.tolist() == [[3 * (2 + 0.5 - 1 + 2) + 1]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_token_uses_every_delta(backend, dtype):
    deltas = make_deltas(2, 20, 70)
    tensors = [torch.randn(2, 3, 70).to(dtype), torch.randn(20, 70).to(dtype)]
    check(lambda x, w, backend: ternary_linear(x, w, deltas, coefficients=0.1, backend=backend), tensors, backend)
    check(
        lambda x, w, a, backend: ternary_linear(x, w, deltas, None, a, backend=backend),
        [*tensors, torch.randn(6, 2)],
        backend,
    )


def test_is_the_product_with_the_merged_weight(backend):
    deltas = make_deltas(2, 20, 70)
    x, weight = torch.randn(5, 70).double(), torch.randn(20, 70).double()
    merged = weight + 0.5 * deltas[0].dense(torch.float64) - 2 * deltas[1].dense(torch.float64)
    out = ternary_linear(x, weight, deltas, coefficients=[0.5, -2], backend=backend)
    torch.testing.assert_close(out, x @ merged.T)


@given(
    num_tokens=st.integers(0, 20),
    num_deltas=st.integers(0, 3),
    top_k=st.integers(0, 3),
    in_features=st.integers(1, 150),
    out_features=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_any_shape(num_tokens, num_deltas, top_k, in_features, out_features, dtype, density, seed):
    generator = torch.Generator().manual_seed(seed)
    deltas = make_deltas(num_deltas, out_features, in_features, density, generator)
    deltas = [TernaryDelta(delta.planes, delta.shape, 1.0) for delta in deltas]
    ids, _ = pairs(num_tokens, num_deltas, top_k, generator)

    def integers(*shape):
        return small_integers(torch.empty(*shape, dtype=dtype), generator)

    tensors = [integers(num_tokens, in_features), integers(out_features, in_features)]
    check_exact(lambda x, w, backend: ternary_linear(x, w, deltas, ids, backend=backend), tensors, "native")


def test_gradcheck(backend):
    deltas = make_deltas(3, 5, 7)
    ids = torch.tensor([[0, -1], [2, 0], [1, 1], [-1, 3]])
    x, weight, bias = torch.randn(4, 7).double(), torch.randn(5, 7).double(), torch.randn(5).double()
    inputs = [tensor.requires_grad_() for tensor in (x, weight, torch.randn(4, 2).double(), bias)]
    assert torch.autograd.gradcheck(
        lambda x, w, a, b: ternary_linear(x, w, deltas, ids, a, bias=b, coefficients=0.5, backend=backend), inputs
    )


@pytest.mark.parametrize("in_features", [128, 2100])
@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_a_token_has_the_same_bits_alone_and_among_others(backend, dtype, in_features, threads):
    deltas = make_deltas(3, 90, in_features)
    ids, weights = pairs(70, 3, 2)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((70, in_features), (90, in_features), (90,)))
    together = ternary_linear(x, weight, deltas, ids, weights, bias=bias, backend=backend)
    for t in (0, 1, 33, 69):
        one = slice(t, t + 1)
        alone = ternary_linear(x[one], weight, deltas, ids[one], weights[one], bias=bias, backend=backend)
        assert torch.equal(together[one], alone)
    order = torch.randperm(70)
    shuffled = ternary_linear(x[order], weight, deltas, ids[order], weights[order], bias=bias, backend=backend)
    assert torch.equal(together[order], shuffled)


def test_results_do_not_depend_on_the_number_of_threads(backend):
    deltas = make_deltas(3, 300, 130)
    ids, weights = pairs(90, 3, 2)
    tensors = [torch.randn(90, 130), torch.randn(300, 130), weights]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaves = [leaf(tensor) for tensor in tensors]
        out = ternary_linear(*leaves[:2], deltas, ids, leaves[2], backend=backend)
        out.square().sum().backward()
        results.append([out, *(tensor.grad for tensor in leaves)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_token(backend, dtype):
    deltas = make_deltas(2, 9, 70)
    ids, weights = torch.tensor([[0, 1], [0, -1], [1, 0]]), torch.randn(3, 2)
    x, weight = torch.randn(3, 70).to(dtype), torch.randn(9, 70).to(dtype)
    clean = ternary_linear(x, weight, deltas, ids, weights, backend=backend)
    x[1] = float("nan")
    out = ternary_linear(x, weight, deltas, ids, weights, backend=backend)
    assert torch.equal(out[[0, 2]], clean[[0, 2]]) and out[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_deltas_it_is_a_linear_layer(backend, dtype):
    deltas = make_deltas(2, 9, 70)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((4, 70), (9, 70), (9,)))
    none = ternary_linear(x, weight, [], bias=bias, backend=backend)
    torch.testing.assert_close(none, torch.nn.functional.linear(x, weight, bias))
    for ids in (torch.full((4, 2), -1), torch.full((4,), 2), torch.zeros(4, 0, dtype=torch.int32)):
        assert torch.equal(ternary_linear(x, weight, deltas, ids, bias=bias, backend=backend), none)
    empty = ternary_linear(x[:0], weight, deltas, bias=bias, backend=backend)
    assert empty.shape == (0, 9)


def test_strides(backend):
    deltas = make_deltas(2, 9, 70)
    ids, weights = pairs(4, 2, 2)
    x, weight, bias = torch.randn(4, 70), torch.randn(9, 70), torch.randn(9)
    plain = ternary_linear(x, weight, deltas, ids, weights, bias=bias, backend=backend)
    views = [strided(tensor) for tensor in (x, weight, ids, weights, bias)]
    assert torch.equal(ternary_linear(*views[:2], deltas, *views[2:4], bias=views[4], backend=backend), plain)
    turned = weight.T.contiguous().T
    torch.testing.assert_close(ternary_linear(x, turned, deltas, ids, weights, bias=bias, backend=backend), plain)


def test_bad_input():
    deltas = make_deltas(2, 9, 70)
    x, weight, ids = torch.randn(4, 70), torch.randn(9, 70), torch.zeros(4, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"ternary_linear: x must be of shape \[..., in_features=70\], got \[4, 71\]"):
        ternary_linear(torch.randn(4, 71), weight, deltas)
    with pytest.raises(TypeError, match="weight must be torch.bfloat16, got torch.float32; it must equal that of x"):
        ternary_linear(x.bfloat16(), weight, deltas)
    with pytest.raises(
        ValueError, match=r"weight must be of shape \[9, 70\], got \[8, 70\]; the task vector is of ano"
    ):
        ternary_linear(x, weight[:8], deltas)
    with pytest.raises(TypeError, match=r"deltas\[0\] must be a TernaryDelta, got Tensor; call decompress"):
        ternary_linear(x, weight, [torch.zeros(9, 70)])
    with pytest.raises(ValueError, match="coefficients must be one number or 2, one a delta, got 3"):
        ternary_linear(x, weight, deltas, coefficients=[1, 2, 3])
    with pytest.raises(ValueError, match="coefficients must be finite"):
        ternary_linear(x, weight, deltas, coefficients=float("inf"))
    with pytest.raises(TypeError, match="delta_ids must be one of torch.int32, torch.int64"):
        ternary_linear(x, weight, deltas, ids.float())
    with pytest.raises(ValueError, match=r"delta_ids must be of shape \[num_tokens=4\]"):
        ternary_linear(x, weight, deltas, ids[:3])
    with pytest.raises(ValueError, match=r"delta_weights must be of shape \[num_tokens=4, 1\]"):
        ternary_linear(x, weight, deltas, ids, torch.rand(4, 2))
    with pytest.raises(ValueError, match=r"bias must be of shape \[out_features=9\]"):
        ternary_linear(x, weight, deltas, bias=torch.rand(8))


def test_autocast(backend):
    deltas = make_deltas(2, 9, 70)
    with torch.autocast("cpu", torch.bfloat16):
        out = ternary_linear(torch.randn(4, 70), torch.randn(9, 70), deltas, bias=torch.randn(9), backend=backend)
    assert out.dtype == torch.bfloat16


def test_registration(backend):
    planes = [delta.planes for delta in make_deltas(2, 9, 70)]
    x, weight, bias, values = torch.randn(4, 70), torch.randn(9, 70), torch.randn(9), [0.5, 2.0]
    for ids, weights in (pairs(4, 2, 3), (None, None)):
        torch.library.opcheck(native.ternary_linear, (x, weight, planes, values, ids, weights, bias))
        grad_out = torch.randn(4, 9)
        torch.library.opcheck(native.ternary_linear_input_grad, (grad_out, weight, planes, values, ids, weights))
        torch.library.opcheck(native.ternary_linear_weights_grad, (grad_out, x, planes, values, ids))


def test_compile(backend):
    deltas = make_deltas(3, 9, 70)
    weight, bias = torch.randn(9, 70, requires_grad=True), torch.randn(9, requires_grad=True)

    def op(x, ids, weights):
        return ternary_linear(x, weight, deltas, ids, weights, bias=bias, backend=backend)

    compiled = torch.compile(op, fullgraph=True, dynamic=True)
    for num_tokens in (3, 7):
        ids, weights = pairs(num_tokens, 3, 2)
        inputs = torch.randn(num_tokens, 70, requires_grad=True), ids, weights.requires_grad_()
        out, expected = compiled(*inputs), op(*inputs)
        assert torch.equal(out, expected)
        leaves = (inputs[0], inputs[2])
        grads, others = (torch.autograd.grad(one.sum(), leaves) for one in (out, expected))
        assert all(torch.equal(*pair) for pair in zip(grads, others, strict=True))


@pytest.mark.on_gpus
@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("sizes", [(3, 5, 7), (1, 64, 33), (17, 130, 65), (2, 200, 130)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_on_gpus(backend, kernel_id, dtype, sizes, top_k):
    """More deltas than one launch takes; ids of none; rows of planes that begin at any bit."""
    if kernel_id == "triton-ptx" and dtype == torch.float64:
        pytest.skip("the interpreter has no products of float64 matrices")
    if kernel_id in OF_16_BITS and dtype.itemsize != 2:
        pytest.skip("the CUDA kernel is for 16 bits")
    num_tokens, in_features, out_features = sizes
    count = 10 if kernel_id not in ("triton-ptx", "native-ptx") else 9 if sizes == (3, 5, 7) else 2
    deltas = make_deltas(count, out_features, in_features)
    ids, weights = pairs(num_tokens, count, top_k or count)
    tensors = [
        torch.randn(num_tokens, in_features).to(dtype),
        strided((torch.randn(out_features, in_features) * in_features**-0.5).to(dtype)),
        weights,
        torch.randn(out_features).to(dtype),
    ]

    def op(x, w, a, bias, backend):
        with torch.no_grad():
            return ternary_linear(x, w, deltas, ids if top_k else None, a, bias=bias, backend=backend)

    check(op, tensors, backend, backward=False)


@pytest.mark.on_gpus
def test_many_tokens_and_steps_on_gpus(backend):
    """Several blocks of tokens and rows, several steps of a warp; rows that are aligned, planes too, neither."""
    deltas = make_deltas(1, 40, 330)
    for in_features in (320, 328, 330):
        x, weight = torch.randn(37, in_features).bfloat16(), torch.randn(40, in_features).bfloat16()
        some = [TernaryDelta.from_signs(deltas[0].signs()[:, :in_features], 0.5)]

        def op(x, w, backend, some=some):
            with torch.no_grad():
                return ternary_linear(x, w, some, backend=backend)

        check(op, [x, weight], backend, backward=False)


@pytest.mark.on_gpus
def test_cuda_says_what_it_takes(backend, kernel_id):
    if kernel_id not in OF_16_BITS:
        pytest.skip("others take it")
    deltas = make_deltas(1, 4, 8)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="the CUDA kernel takes bfloat16 and float16; use backend='triton'"):
            ternary_linear(torch.randn(2, 8), torch.randn(4, 8), deltas, backend=backend)
        x, weight = torch.randn(2, 8).half(), torch.randn(4, 8).half()
        with pytest.raises(RuntimeError, match="deltas must be at most 64 on a GPU, got 65; use backend='triton'"):
            ternary_linear(x, weight, deltas * 65, backend=backend)


@pytest.mark.on_gpus
def test_a_token_has_the_same_bits_in_any_batch_on_gpus(backend, kernel_id):
    deltas = make_deltas(2, 33, 70)
    dtype = torch.bfloat16 if kernel_id in OF_16_BITS else torch.float32
    x, weight = torch.randn(19, 70).to(dtype), torch.randn(33, 70).to(dtype)
    x[4, 3], x[5] = float("nan"), 0
    ids = torch.randint(-1, 2, (19, 1))
    together = ternary_linear(x, weight, deltas, ids, backend=backend)
    for token in (0, 5, 18) if kernel_id in SLOW else range(19):
        alone = ternary_linear(x[token : token + 1], weight, deltas, ids[token : token + 1], backend=backend)
        if kernel_id != "native-cpu":
            assert torch.equal(alone[0].nan_to_num(7), together[token].nan_to_num(7))
        assert bool(alone.isnan().all()) == (token == 4)
