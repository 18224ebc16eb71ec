"""Quantised expert weights: the formats, their bytes, and the kernels that read them."""

import dataclasses
import io

import pytest
import torch

import moe_kernels
from moe_kernels import (
    Activation,
    QuantizedWeights,
    _host,
    expert_ffn,
    grouped_gemm,
    quantize,
    quantized_from_fp8,
    quantized_from_mxfp4,
)
from moe_kernels.ops.grouped_gemm import native
from moe_kernels.ops.quantize import reference
from moe_kernels.testing import assert_close_to_reference, random_routing
from tests.ops.helpers import LOW_DTYPES

#: every format with each of its group sizes
FORMATS = [("int8", None), ("int8", 128), ("int4", 32), ("int4", 128), ("fp8", None), ("mxfp4", None)]
# rows: none, one, up to 4 (decoded in registers), 5 (one tile), several tiles, more than a task's 96; 2 tail rows
COUNTS = [0, 1, 3, 4, 5, 101, 0]


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def weights_of(num_experts: int, out: int, in_features: int) -> torch.Tensor:
    return torch.randn(num_experts, out, in_features) * in_features**-0.5


# --- formats ---


def test_values_are_those_of_torchs_dtypes():
    codes = torch.arange(256).to(torch.uint8)
    fp8 = codes.view(torch.float8_e4m3fn).double()
    assert torch.equal(reference.values("fp8").nan_to_num(1e9), fp8.nan_to_num(1e9))
    assert torch.equal(reference.values("int8"), codes.view(torch.int8).double())
    assert reference.values("int4").tolist() == [*range(8), *range(-8, 0)]
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert reference.values("mxfp4").tolist() == magnitudes + [-value for value in magnitudes]


@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "mxfp4"])
def test_a_code_is_the_nearest(format):
    group_size = 32
    weights = weights_of(1, 9, 96)[0].double() * torch.randn(9, 1).exp()  # rows of very different size
    codes, scales = reference.quantize(weights, format, group_size)
    table = reference.values(format)
    table = table[table.isfinite()]
    if format in ("int8", "int4"):
        table = table[table > table.min()]  # symmetric
    expanded = scales.double().repeat_interleave(group_size, 1)
    best = (weights[..., None] - table * expanded[..., None]).abs().amin(2)
    assert torch.equal((weights - reference.dequantize(codes, scales, format, group_size, torch.float64)).abs(), best)


def test_fp8_rounds_as_torch_does():
    values = torch.cat([torch.randn(4000) * 100, torch.randn(4000) / 100, torch.arange(-30, 30) / 512]).clamp(-448, 448)
    codes = reference._nearest(values.double(), reference.values("fp8")).to(torch.uint8)
    assert torch.equal(codes.view(torch.float8_e4m3fn).float(), values.to(torch.float8_e4m3fn).float())


def test_zeros_stay_zero_and_tiny_weights_finite():
    weights = torch.zeros(1, 2, 64)
    weights[0, 1, :32] = 1e-44
    for format, group_size in (("int8", 32), ("int4", 32), ("fp8", None), ("mxfp4", None)):
        values = quantize(weights, format, group_size=group_size).dequantize()
        assert torch.equal(values[0, 0], torch.zeros(64)) and torch.equal(values[0, 1, 32:], torch.zeros(32))
        assert values.isfinite().all()


# --- bytes ---


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
@pytest.mark.parametrize(("num_splits", "interleaved"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("out", [2, 64, 70])
def test_bytes_hold_codes_and_scales(format, group_size, num_splits, interleaved, out):
    weights = weights_of(3, out, 256)
    quantized = quantize(weights, format, group_size=group_size, num_splits=num_splits, interleaved=interleaved)
    again = QuantizedWeights.from_bytes(quantized.data.clone())
    assert dataclasses.replace(again, data=quantized.data) == quantized
    for expert in range(3):
        codes, scales = reference.quantize(weights[expert], format, quantized.group_size)
        found_codes, found_scales = again.codes_and_scales(expert)
        assert torch.equal(found_codes, codes) and torch.equal(found_scales, scales)


@pytest.mark.parametrize("in_features", [1, 7, 130, 300])
def test_bytes_of_inputs_that_fill_no_group(in_features):
    weights = weights_of(2, 33, in_features)
    for quantized in (quantize(weights, "int8"), quantize(weights, "fp8")):
        for expert in range(2):
            codes, scales = reference.quantize(weights[expert], quantized.format, quantized.group_size)
            found_codes, found_scales = quantized.codes_and_scales(expert)
            assert torch.equal(found_codes, codes) and torch.equal(found_scales, scales)


def test_size():
    weights = torch.randn(2, 64, 2048)
    bits = {
        name: 8 * (quantize(weights, format, group_size=group_size).nbytes - 2 * 64) / weights.numel()
        for name, format, group_size in [
            ("int8", "int8", None), ("int8/128", "int8", 128), ("int4/32", "int4", 32), ("int4/128", "int4", 128)
        ]
    }  # fmt: skip
    assert bits == {"int8": 8 + 32 / 2048, "int8/128": 8.25, "int4/32": 4.5, "int4/128": 4.125}


def test_a_checkpoint_needs_the_bytes_alone():
    quantized = quantize(weights_of(3, 8, 64), "int4", num_splits=2, interleaved=True)
    file = io.BytesIO()
    torch.save({"experts": quantized.data}, file)
    file.seek(0)
    again = QuantizedWeights.from_bytes(torch.load(file)["experts"])
    assert torch.equal(again.data, quantized.data)
    some = QuantizedWeights.from_bytes(again.data[1:])
    assert torch.equal(some.dequantize(), quantized.dequantize()[1:])


def test_taken_over_from_fp8_blocks():
    weights = (torch.randn(2, 200, 300) * 50).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, 3)
    expanded = scales.repeat_interleave(128, 1)[:, :200].repeat_interleave(128, 2)[:, :, :300]
    quantized = quantized_from_fp8(weights, scales, num_splits=2)
    assert torch.equal(quantized.dequantize(torch.float64), weights.double() * expanded.double())
    halves = torch.rand(2, 2, 1)
    whole = quantized_from_fp8(weights, halves, None)
    assert torch.equal(whole.dequantize(torch.float64), weights.double() * halves.double().repeat_interleave(100, 1))


def test_taken_over_from_mxfp4_blocks():
    transformers = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (2, 64, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (2, 64, 3), dtype=torch.uint8)
    expected = transformers.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    quantized = quantized_from_mxfp4(blocks, scales, num_splits=2, interleaved=True)
    assert torch.equal(quantized.dequantize(), expected)
    smallest = quantized_from_mxfp4(blocks, torch.zeros_like(scales)).dequantize(torch.float64)
    assert torch.equal(
        smallest, quantized_from_mxfp4(blocks, torch.full_like(scales, 127)).dequantize(torch.float64) * 2.0**-127
    )


# --- kernels ---

# (in, out): tiny; a row that fills no word; past a panel, a chunk of 256 and a split's last panel
PLAIN_SIZES = [(1, 1), (3, 5), (33, 65), (300, 70), (520, 33)]
GROUPED_SIZES = [(128, 5), (256, 32), (384, 65), (640, 130)]


def close(run, rows: list[torch.Tensor], grads: bool = True) -> None:
    """``run(backend, *rows)`` of the kernels, of the reference in the same dtype and in float64, with gradients."""
    results = []
    for backend, dtype in (("native", None), ("reference", torch.float64), ("reference", None)):
        leaves = [row.to(dtype or row.dtype).clone().requires_grad_(grads) for row in rows]
        out = run(backend, *leaves)
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(rows[0].dtype).to(out.dtype)
        found = torch.autograd.grad(out, leaves, grad_out) if grads else ()
        results.append([out.detach(), *found])
    for actual, reference64, eager in zip(*results, strict=True):
        assert_close_to_reference(actual, reference64, eager)


@pytest.mark.parametrize(
    ("format", "group_size", "sizes"),
    [(format, group_size, sizes) for format, group_size in FORMATS for sizes in GROUPED_SIZES]
    + [(format, None, sizes) for format in ("int8", "fp8") for sizes in PLAIN_SIZES],
)
@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_grouped_gemm(backend, dtype, format, group_size, sizes):
    in_features, out_features = sizes
    quantized = quantize(weights_of(len(COUNTS), out_features, in_features), format, group_size=group_size)
    rows = torch.randn(sum(COUNTS) + 2, in_features).to(dtype)
    bias = torch.randn(len(COUNTS), out_features).to(dtype)
    offsets = offsets_of(COUNTS)
    close(lambda backend, r, b: grouped_gemm(r, quantized, offsets, b, backend=backend), [rows, bias])
    assert grouped_gemm(rows, quantized, offsets)[-2:].count_nonzero() == 0


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
def test_every_code_is_read_exactly(backend, format, group_size):
    """A row of x with a single one picks a column of W: the product is the rounded weight, for both kinds of kernel."""
    in_features, codes = 256, 2 ** reference.code_bits(format)
    weights = weights_of(1, 37, in_features)
    quantized = quantize(weights, format, group_size=group_size)
    if format == "fp8":
        every = torch.arange(codes).to(torch.uint8).view(torch.float8_e4m3fn).repeat(1, 37, 1)
        every = torch.where(every.float().isfinite(), every.float(), 0.0).to(torch.float8_e4m3fn)
        quantized = quantized_from_fp8(every, torch.rand(1, 1, 2))
    elif format == "mxfp4":
        blocks = torch.randint(0, 256, (1, 37, 8, 16), dtype=torch.uint8)
        quantized = quantized_from_mxfp4(blocks, torch.randint(0, 253, (1, 37, 8), dtype=torch.uint8))
    expected = quantized.dequantize(torch.float32)[0].T
    rows = torch.eye(in_features)
    assert torch.equal(grouped_gemm(rows, quantized, offsets_of([in_features])), expected)
    for row in (0, 1, 100, 255):
        assert torch.equal(grouped_gemm(rows[row : row + 1], quantized, offsets_of([1])), expected[row : row + 1])


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_same_bits_for_any_number_of_rows_and_threads(backend, dtype, format, group_size):
    in_features, out_features = 640, 130
    quantized = quantize(weights_of(1, out_features, in_features), format, group_size=group_size)
    rows = torch.randn(101, in_features).to(dtype)
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        results.append(
            [grouped_gemm(rows[:count], quantized, offsets_of([count])) for count in (1, 2, 3, 4, 5, 13, 101)]
        )
    for some in (*results[0], *results[1]):
        assert torch.equal(some, results[0][-1][: len(some)])


@pytest.mark.parametrize("layout", ["packed", "interleaved", "ungated"])
@pytest.mark.parametrize(("format", "group_size"), FORMATS)
@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_expert_ffn(backend, dtype, format, group_size, layout):
    num_experts, hidden_size, intermediate_size, top_k, num_tokens = 5, 128, 128, 2, 23
    gated, interleaved = layout != "ungated", layout == "interleaved"
    activation = Activation() if gated else Activation("relu2", gated=False)
    up_size = (2 if gated else 1) * intermediate_size
    options = {"format": format, "group_size": group_size}
    splits = {"num_splits": 2 if gated else 1, "interleaved": interleaved}
    gate_up = quantize(weights_of(num_experts, up_size, hidden_size), **options, **splits)
    down = quantize(weights_of(num_experts, hidden_size, intermediate_size), **options)
    topk_ids, topk_weights = random_routing(num_tokens, num_experts, top_k, skip=0.2)
    tensors = [
        torch.randn(num_tokens, hidden_size).to(dtype),
        topk_weights.to(dtype),
        torch.randn(num_experts, up_size).to(dtype),
        torch.randn(num_experts, hidden_size).to(dtype),
    ]

    def run(backend, x, weights, gate_up_bias, down_bias):
        biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
        settings = {"activation": activation, "interleaved": interleaved, "backend": backend}
        return expert_ffn(x, topk_ids, weights, gate_up, down, **biases, **settings)

    close(run, tensors)


@pytest.mark.skipif(_host.chosen_isa().startswith("avx512"), reason="AVX-512 sums plain weights in another order")
def test_fp8_gives_the_bits_of_the_dequantised_weights(backend):
    quantized = quantize(weights_of(len(COUNTS), 70, 640), "fp8")
    rows, offsets = torch.randn(sum(COUNTS), 640), offsets_of(COUNTS)
    assert torch.equal(grouped_gemm(rows, quantized, offsets), grouped_gemm(rows, quantized.dequantize(), offsets))


def test_activations_keep_their_precision_beside_large_ones(backend):
    """Fixed point is relative to a block's largest value: what it rounds away is small beside the result's ulp."""
    quantized = quantize(torch.ones(1, 3, 64), "int8", group_size=32)
    rows = torch.zeros(1, 64)
    rows[0, 0], rows[0, 1], rows[0, 32], rows[0, 33] = 2.0**20, 2.0**-5, 1e30, 1e-30
    expected = (rows.double() @ quantized.dequantize(torch.float64)[0].T).float()
    assert torch.equal(grouped_gemm(rows, quantized, offsets_of([1])), expected)
    tiny = torch.full((1, 64), 1e-38)
    tiny[0, 32:] = 3.4e38
    tiny[0, 33::2] = -3.4e38
    assert torch.equal(grouped_gemm(tiny, quantized, offsets_of([1])).sign(), torch.ones(1, 3))


@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "mxfp4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_rows_that_are_not_finite_stay_alone(backend, dtype, format, value):
    quantized = quantize(weights_of(1, 40, 256) + 0.1, format)
    rows = torch.randn(9, 256).to(dtype)
    clean = grouped_gemm(rows, quantized, offsets_of([9]))
    rows[2, 77] = value
    for some in (slice(0, 3), slice(0, 9)):
        out = grouped_gemm(rows[some], quantized, offsets_of([some.stop]))
        assert not out[2].isfinite().any()
        keep = [row for row in range(some.stop) if row != 2]
        assert torch.equal(out[keep], clean[keep])


# intermediate sizes that fill no panel: gate and up are padded each
@pytest.mark.parametrize("intermediate_size", [1, 31, 33, 48])
def test_expert_ffn_of_odd_sizes(backend, intermediate_size):
    gate_up = quantize(weights_of(3, 2 * intermediate_size, 40), num_splits=2)
    down = quantize(weights_of(3, 40, intermediate_size))
    topk_ids, topk_weights = random_routing(9, 3, 2)
    close(
        lambda backend, x, w: expert_ffn(x, topk_ids, w, gate_up, down, backend=backend),
        [torch.randn(9, 40), topk_weights],
    )


def test_no_tokens_and_no_inputs(backend):
    quantized = quantize(torch.randn(2, 5, 64))
    assert grouped_gemm(torch.randn(0, 64), quantized, offsets_of([0, 0])).shape == (0, 5)
    empty = quantize(torch.randn(2, 5, 0))
    assert torch.equal(grouped_gemm(torch.randn(3, 0), empty, offsets_of([1, 2])), torch.zeros(3, 5))


def test_autocast_casts_the_activations(backend):
    quantized = quantize(weights_of(1, 32, 64))
    rows = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_gemm(rows, quantized, offsets_of([3]))
    assert torch.equal(out, grouped_gemm(rows.bfloat16(), quantized, offsets_of([3])))


@pytest.mark.parametrize("grad", [False, True])
def test_compile(backend, grad):
    gate_up = quantize(weights_of(3, 64, 64), "int4", num_splits=2)
    down = quantize(weights_of(3, 64, 32), "int4")
    topk_ids, topk_weights = random_routing(8, 3, 2)
    x = torch.randn(8, 64, requires_grad=grad)

    def layer(x, topk_weights):
        return expert_ffn(x, topk_ids, topk_weights, gate_up, down) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    if not grad:
        assert torch.equal(compiled(x, topk_weights), layer(x, topk_weights))
        return
    (expected,) = torch.autograd.grad(layer(x, topk_weights).square().sum(), x)
    (found,) = torch.autograd.grad(compiled(x, topk_weights).square().sum(), x)
    assert torch.equal(found, expected)


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "int3"}, ValueError, "quantize: format must be one of int8, int4, fp8, mxfp4, got 'int3'"),
        ({"format": "int4", "group_size": 32}, ValueError, "quantize: group_size must be a divisor of in=72, got 32"),
        ({"format": "mxfp4"}, ValueError, "quantize: group_size must be a divisor of in=72, got 32"),
        ({"format": "int8", "group_size": 12}, ValueError, "quantize: group_size must be a positive multiple of 8"),
        ({"format": "fp8", "group_size": 64}, ValueError, "quantize: group_size must be 128 for fp8, got 64"),
        ({"num_splits": 3}, ValueError, "quantize: num_splits must be 1, or 2 where out=8 is even, got 3"),
        ({"interleaved": True}, ValueError, "quantize: interleaved must be False where num_splits is 1"),
    ],
)
def test_quantize_refuses(options, error, message):
    with pytest.raises(error, match=message):
        quantize(torch.randn(2, 8, 72), **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    weights = torch.randn(2, 8, 64)
    weights[1, 3, 5] = value
    with pytest.raises(ValueError, match="quantize: expert_weights must be finite, got infinity or NaN in expert 1"):
        quantize(weights)
    codes = torch.zeros(1, 8, 64).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="quantized_from_fp8: scales must be finite"):
        quantized_from_fp8(codes, torch.full((1, 1, 1), value))
    nan = codes.clone()
    nan.view(torch.uint8)[0, 0, 0] = 255
    with pytest.raises(ValueError, match="quantized_from_fp8: weights must be numbers, got NaN in expert 0"):
        quantized_from_fp8(nan, torch.ones(1, 1, 1))
    with pytest.raises(ValueError, match="quantized_from_mxfp4: scales must be at most 252, got 255"):
        quantized_from_mxfp4(torch.zeros(1, 8, 2, 16, dtype=torch.uint8), torch.full((1, 8, 2), 255, dtype=torch.uint8))
    zero = quantized_from_fp8(torch.ones(1, 8, 64).to(torch.float8_e4m3fn), torch.zeros(1, 1, 1))
    assert torch.equal(grouped_gemm(torch.randn(2, 64), zero, offsets_of([2])), torch.zeros(2, 8))


HEADER = ["magic", "version", "format", "group_size", "num_splits", "interleaved", "out", "in"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("magic", 0), ("version", 2), ("format", 4), ("format", -1), ("format", 1), ("group_size", 0),
        ("group_size", -8), ("group_size", 2**62), ("num_splits", 0), ("num_splits", 3), ("out", 2**40), ("out", 65),
        ("out", -1), ("in", 2**40), ("in", 128), ("in", -1),
    ],
)  # fmt: skip
def test_bytes_that_lie_are_refused_before_they_are_read(backend, field, value):
    quantized = quantize(weights_of(2, 64, 64), "int8", group_size=32)
    data = quantized.data.clone()
    headers = data[:, :64].clone().view(torch.int64)
    headers[:, HEADER.index(field)] = value
    data[:, :64] = headers.view(torch.uint8)
    with pytest.raises(ValueError, match="QuantizedWeights: data must be"):
        QuantizedWeights.from_bytes(data)
    # and by the kernel, whatever its caller says
    with pytest.raises(RuntimeError, match="grouped_gemm: "):
        native.grouped_gemm(torch.randn(3, 64), data, offsets_of([1, 2]), None, 64)


def test_experts_that_differ_and_bytes_that_are_cut_off(backend):
    quantized = quantize(weights_of(2, 64, 64))
    other = quantize(weights_of(2, 64, 64), "fp8")
    mixed = torch.cat([quantized.data[:1, :2112], other.data[:1, :2112]])
    for data in (mixed, quantized.data[:, :-1], quantized.data[:, :60], quantized.data[0]):
        with pytest.raises(ValueError, match="QuantizedWeights: data must be"):
            QuantizedWeights.from_bytes(data)
        with pytest.raises(RuntimeError, match="grouped_gemm: "):
            native.grouped_gemm(torch.randn(3, 64), data, offsets_of([1, 2]), None, 64)


def test_ops_refuse_what_does_not_fit(backend):
    rows, offsets = torch.randn(3, 64), offsets_of([1, 2])
    quantized = quantize(weights_of(2, 8, 64))
    with pytest.raises(TypeError, match="grouped_gemm: rows must be one of .*weights are quantised: cast rows"):
        grouped_gemm(rows.double(), quantized, offsets)
    with pytest.raises(ValueError, match=r"grouped_gemm: expert_weights must be of shape \[num_experts, out, in=32\]"):
        grouped_gemm(rows[:, :32], quantized, offsets)
    with pytest.raises(ValueError, match="grouped_gemm: expert_weights must be quantised with num_splits=1"):
        grouped_gemm(rows, quantize(weights_of(2, 8, 64), num_splits=2), offsets)
    with pytest.raises(RuntimeError, match="grouped_gemm: expert_weights must be of shape"):
        native.grouped_gemm(rows, quantize(weights_of(2, 8, 64), num_splits=2).data, offsets, None, 8)
    topk_ids, topk_weights = random_routing(3, 2, 1)
    down = quantize(weights_of(2, 64, 4))
    with pytest.raises(ValueError, match="expert_ffn: gate_up_proj must be quantised with num_splits=2"):
        expert_ffn(rows, topk_ids, topk_weights, quantized, down)
    with pytest.raises(ValueError, match="expert_ffn: down_proj must be prepacked where gate_up_proj is, quantised"):
        expert_ffn(rows, topk_ids, topk_weights, quantized, torch.randn(2, 64, 4))


def test_public_names():
    assert {"QuantizedWeights", "quantize", "quantized_from_fp8", "quantized_from_mxfp4"} <= set(moe_kernels.__all__)
