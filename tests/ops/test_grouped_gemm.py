"""grouped_gemm and prepack: forward, backward, edges, registration, compile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import grouped_gemm, prepack
from moe_kernels.ops.grouped_gemm import native
from tests.ops.helpers import DTYPES, LOW_DTYPES, SLOW, check, check_exact, seeded, small_integers, strided

GPU_KERNELS = ["triton-cpu", "triton-ptx", "triton-cuda"]
OP = "grouped_gemm"


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def transposed(weights: torch.Tensor) -> torch.Tensor:
    """The same values in memory [num_experts, in, out]."""
    return weights.transpose(1, 2).contiguous().transpose(1, 2)


# rows: an empty expert first, in the middle and last; one row; one below, at and above the 6-row tile; 2 tail rows
COUNTS = [0, 1, 5, 6, 0, 7, 60, 0]
NUM_ROWS = sum(COUNTS) + 2
# (in, out): tiny and odd; one below, at, above a 32-element bf16 step and the 64-column panel; past the 256-step chunk;
# several blocks of columns
SIZES = [(1, 1), (3, 5), (31, 63), (32, 64), (33, 65), (300, 70), (520, 9), (40, 1301), (2401, 30)]


@pytest.mark.on_gpus
@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(backend, kernel_id, dtype, sizes, layout):
    double_on_ptx = dtype == torch.float64 and kernel_id == "triton-ptx"
    if kernel_id in SLOW and (sizes not in [(3, 5), (33, 65)] or double_on_ptx):
        pytest.skip("seconds each; the cases that stay run the same kernels")
    in_features, out_features = sizes
    rows = torch.randn(NUM_ROWS, in_features).to(dtype)
    weights = (torch.randn(len(COUNTS), out_features, in_features) * in_features**-0.5).to(dtype)
    bias = torch.randn(len(COUNTS), out_features).to(dtype)
    if layout == "transposed":
        weights = transposed(weights)
    offsets = offsets_of(COUNTS)
    check(lambda r, w, b, backend: grouped_gemm(r, w, offsets, b, backend=backend), [rows, weights, bias], backend)


@given(
    counts=st.lists(st.integers(0, 20), max_size=5),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 70),
    tail=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    is_transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_any_shape(counts, in_features, out_features, tail, dtype, is_transposed, seed):
    generator = seeded(seed)
    rows = small_integers(torch.empty(sum(counts) + tail, in_features, dtype=dtype), generator)
    weights = small_integers(torch.empty(len(counts), out_features, in_features, dtype=dtype), generator)
    bias = small_integers(torch.empty(len(counts), out_features, dtype=dtype), generator)
    if is_transposed:
        weights = transposed(weights)
    offsets = offsets_of(counts)
    check_exact(
        lambda r, w, b, backend: grouped_gemm(r, w, offsets, b, backend=backend), [rows, weights, bias], "native"
    )


def test_gradcheck(backend):
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    offsets = offsets_of([2, 0, 2])
    assert torch.autograd.gradcheck(
        lambda r, w, b: grouped_gemm(r, w, offsets, b, backend=backend), (rows, weights, bias)
    )


@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_a_row_has_the_same_bits_alone_and_among_others(backend, dtype, threads):
    rows, weights = torch.randn(60, 130).to(dtype), torch.randn(2, 70, 130).to(dtype)
    for w in (weights, transposed(weights), prepack(weights)):
        together = grouped_gemm(rows, w, offsets_of([0, 60]), backend=backend)
        for row in (0, 5, 59):
            alone = grouped_gemm(rows[row : row + 1], w, offsets_of([0, 1]), backend=backend)
            assert torch.equal(alone, together[row : row + 1])


# in: one below, at and above a 256-step chunk, three chunks and an odd rest, more than a 4 KiB chunk of dot.h;
# out: below, at and past a panel, several blocks
@pytest.mark.parametrize("sizes", [(255, 16), (256, 15), (257, 33), (801, 130), (257, 1301), (2401, 70)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_follow_one_order_for_any_number_of_rows(dtype, sizes):
    in_features, out_features = sizes
    rows, weights = torch.randn(101, in_features).to(dtype), torch.randn(1, out_features, in_features).to(dtype)
    layouts = [weights, transposed(weights)] + ([prepack(weights)] if dtype in LOW_DTYPES else [])
    for w in layouts:
        all_rows = grouped_gemm(rows, w, offsets_of([101]))
        # 1 to 4 rows are multiplied without packing, 5 in one tile, 13 in several
        for count in (1, 2, 3, 4, 5, 13):
            assert torch.equal(grouped_gemm(rows[:count], w, offsets_of([count])), all_rows[:count])


# 300 rows: a second chunk; 4608: whole cache lines, stored past the caches; 4601: not aligned
@pytest.mark.parametrize("counts", [[3, 0], [300, 1]])
@pytest.mark.parametrize("in_features", [4601, 4608])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_larger_than_the_caches(backend, dtype, in_features, counts):
    out_features = 4100 if dtype == torch.float32 else 8200
    generator = seeded(0)
    rows = small_integers(torch.empty(sum(counts), in_features, dtype=dtype), generator)
    grad_out = small_integers(torch.empty(sum(counts), out_features, dtype=dtype), generator)
    weights = torch.zeros(2, out_features, in_features, dtype=dtype, requires_grad=True)
    out = grouped_gemm(rows, weights, offsets_of(counts), backend=backend)
    (grad,) = torch.autograd.grad(out, weights, grad_out)
    for expert, (g, r) in enumerate(zip(grad_out.split(counts), rows.split(counts), strict=True)):
        assert torch.equal(grad[expert], (g.float().T @ r.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_one_and_two_threads(backend, dtype):
    rows, weights = torch.randn(90, 300).to(dtype), torch.randn(3, 70, 300).to(dtype).requires_grad_()
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        rows_leaf = rows.clone().requires_grad_()
        out = grouped_gemm(rows_leaf, weights, offsets_of([50, 0, 40]), backend=backend)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), (rows_leaf, weights))])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_prepacked_gives_the_same_bits(dtype, sizes):
    in_features, out_features = sizes
    rows = torch.randn(NUM_ROWS, in_features).to(dtype)
    weights = torch.randn(len(COUNTS), out_features, in_features).to(dtype)
    bias = torch.randn(len(COUNTS), out_features).to(dtype)
    before = weights.clone()
    for source in (weights, transposed(weights), strided(weights)):
        packed = prepack(source)
        assert torch.equal(
            grouped_gemm(rows, packed, offsets_of(COUNTS), bias), grouped_gemm(rows, weights, offsets_of(COUNTS), bias)
        )
    assert torch.equal(weights, before)
    assert packed.nbytes == packed.data.numel() * weights.element_size() >= weights.numel() * weights.element_size()


@pytest.mark.parametrize(
    ("counts", "tail", "in_features", "out_features"),
    [([], 0, 3, 2), ([], 3, 3, 2), ([0], 0, 3, 2), ([2], 0, 0, 2), ([2], 1, 3, 0)],
)
def test_empty(backend, counts, tail, in_features, out_features):
    rows = torch.randn(sum(counts) + tail, in_features, requires_grad=True)
    weights = torch.randn(len(counts), out_features, in_features, requires_grad=True)
    out = grouped_gemm(rows, weights, offsets_of(counts), backend=backend)
    assert torch.equal(out, torch.zeros(sum(counts) + tail, out_features)) or in_features > 0
    out.sum().backward()
    assert rows.grad.shape == rows.shape and weights.grad.shape == weights.shape
    assert rows.grad.isfinite().all() and weights.grad.isfinite().all()


def test_tail_rows_are_zero_even_beside_nan(backend):
    rows = torch.full((3, 2), torch.nan)
    rows[0] = 1
    rows.requires_grad_()
    weights = torch.ones(1, 2, 2, requires_grad=True)
    out = grouped_gemm(rows, weights, offsets_of([1]), backend=backend)
    assert out.tolist() == [[2, 2], [0, 0], [0, 0]]
    out.sum().backward()
    assert rows.grad.tolist() == [[2, 2], [0, 0], [0, 0]] and weights.grad.tolist() == [[[1, 1], [1, 1]]]


def test_any_strides(backend):
    rows, weights = torch.randn(7, 6), torch.randn(2, 5, 6)
    expected = grouped_gemm(rows, weights, offsets_of([3, 4]), backend=backend)
    wide = torch.randn(2, 5, 12)[:, :, :6].copy_(weights)
    sliced = torch.randn(4, 9, 6)[::2, 2:7].copy_(weights)
    for w in (wide, sliced, strided(weights)):
        assert torch.equal(grouped_gemm(strided(rows), w, offsets_of([3, 4]), backend=backend), expected)
    shared = torch.randn(1, 5, 6).expand(2, 5, 6)
    assert torch.equal(
        grouped_gemm(rows, shared, offsets_of([3, 4]), backend=backend),
        grouped_gemm(rows, shared.contiguous(), offsets_of([3, 4]), backend=backend),
    )


@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_weight_gradient_lies_as_the_weights_do(backend, layout):
    weights = torch.randn(2, 5, 6)
    if layout == "transposed":
        weights = transposed(weights)
    weights.requires_grad_()
    grouped_gemm(torch.randn(4, 6), weights, offsets_of([3, 1]), backend=backend).sum().backward()
    assert weights.grad.stride() == weights.stride()


def test_frozen_arguments_cost_nothing(backend):
    saved = []
    rows, weights = torch.randn(4, 6, requires_grad=True), torch.randn(2, 5, 6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grouped_gemm(rows, weights, offsets_of([3, 1]), backend=backend)
    assert not any(t.shape == rows.shape for t in saved)


@pytest.mark.parametrize("offsets", [[1, 2, 4], [0, 3, 2], [0, 2, 5]])
@pytest.mark.parametrize("which", ["reference", "native"])
def test_bad_offsets(which, offsets):
    with pytest.raises(RuntimeError, match="grouped_gemm: expert_offsets must"):
        grouped_gemm(torch.randn(4, 3), torch.randn(2, 5, 3), torch.tensor(offsets).int(), backend=which)


def test_bad_input():
    rows, weights, offsets = torch.randn(4, 3), torch.randn(2, 5, 3), offsets_of([3, 1])
    for arguments, error, message in [
        ((rows[0], weights, offsets), ValueError, "rows must be of shape"),
        ((rows, weights[:, :, :2], offsets), ValueError, r"expert_weights must be of shape \[num_experts, out, in=3\]"),
        ((rows, weights.bfloat16(), offsets), TypeError, "expert_weights must be torch.float32, got torch.bfloat16"),
        ((rows, weights, offsets[:2]), ValueError, r"expert_offsets must be of shape \[num_experts \+ 1=3\]"),
        ((rows, weights, offsets.long()), TypeError, "expert_offsets must be torch.int32"),
        ((rows, weights, offsets, torch.zeros(2, 4)), ValueError, r"bias must be of shape \[2, 5\]"),
        ((rows, weights, offsets, torch.zeros(2, 5).half()), TypeError, "bias must be torch.float32"),
        ((rows, weights.to("meta"), offsets), ValueError, "expert_weights must be on cpu like rows, got meta"),
        ((rows.long(), weights, offsets), TypeError, "rows must be one of"),
        (([1], weights, offsets), TypeError, "rows must be a torch.Tensor, got list"),
    ]:
        with pytest.raises(error, match="grouped_gemm: " + message):
            grouped_gemm(*arguments)
    with pytest.raises(ValueError, match="prepack: num_splits must be 1, or 2 where out=5 is even, got 2"):
        prepack(weights, num_splits=2)
    with pytest.raises(ValueError, match="prepack: interleaved must be False where num_splits is 1"):
        prepack(weights, interleaved=True)
    with pytest.raises(ValueError, match="expert_weights must be a plain tensor where a gradient is needed"):
        grouped_gemm(rows.requires_grad_(), prepack(weights), offsets)
    with pytest.raises(ValueError, match="expert_weights must be prepacked with num_splits=1"):
        grouped_gemm(rows.detach(), prepack(torch.randn(2, 4, 3), num_splits=2), offsets)


def test_weights_packed_elsewhere_are_refused():
    packed = prepack(torch.randn(2, 5, 3))
    foreign = packed.data.new_zeros(*packed.data.shape[:4], packed.data.shape[4] + 1, packed.data.shape[5])
    with pytest.raises(RuntimeError, match="prepacked for another instruction set"):
        native.grouped_gemm(torch.randn(4, 3), foreign, offsets_of([3, 1]), None, 5)
    with pytest.raises(RuntimeError, match=r"prepacked weights must hold \[out=50, in=3\]"):
        native.grouped_gemm(torch.randn(4, 3), packed.data, offsets_of([3, 1]), None, 50)


def test_autocast(backend):
    rows, weights, bias = torch.randn(4, 3), torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = grouped_gemm(rows, weights, offsets_of([3, 1]), bias, backend=backend)
    low = grouped_gemm(rows.bfloat16(), weights.bfloat16(), offsets_of([3, 1]), bias.bfloat16(), backend=backend)
    assert torch.equal(out, low) and out.dtype == torch.bfloat16
    out.sum().backward()
    assert weights.grad.dtype == torch.float32


def test_double_backward_says_so(backend):
    rows = torch.randn(4, 3, requires_grad=True)
    out = grouped_gemm(rows, torch.randn(2, 5, 3), offsets_of([3, 1]), backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_registration(backend, layout):
    rows, weights, offsets = torch.randn(4, 3), torch.randn(2, 5, 3), offsets_of([3, 1])
    is_transposed = layout == "transposed"
    if is_transposed:
        weights = transposed(weights)
    torch.library.opcheck(native.grouped_gemm, (rows, weights, offsets, torch.randn(2, 5), 5))
    torch.library.opcheck(native.grouped_gemm_weight_grad, (torch.randn(4, 5), rows, offsets, is_transposed))
    torch.library.opcheck(native.grouped_gemm_bias_grad, (torch.randn(4, 5), offsets))


@pytest.mark.on_gpus
@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_compile(backend, kernel_id, layout):
    if kernel_id == "triton-ptx":
        pytest.skip("minutes; what it runs is not compiled anew")
    weights = torch.randn(2, 5, 3)
    if layout == "transposed":
        weights = transposed(weights)
    weights.requires_grad_()
    compiled = torch.compile(lambda r, w, o: grouped_gemm(r, w, o, backend=backend), fullgraph=True, dynamic=True)
    for num_rows in (4, 9):
        rows, offsets = torch.randn(num_rows, 3, requires_grad=True), offsets_of([3, num_rows - 3])
        results = [
            (out := op(rows, weights, offsets), *torch.autograd.grad(out.square().sum(), (rows, weights)))
            for op in (compiled, lambda r, w, o: grouped_gemm(r, w, o, backend=backend))
        ]
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)
