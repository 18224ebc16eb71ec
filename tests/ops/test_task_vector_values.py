"""Task vectors that keep values: compress(values=…), apply_, unapply_, bytes of any kind. All equal to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import PackedDelta, _dispatch, apply_, compress, decompress, merge, unapply_
from moe_kernels.ops.task_vector import native, reference
from moe_kernels.ops.task_vector.packed import HEADER_BYTES
from moe_kernels.ops.task_vector.reference import bits
from tests.ops.helpers import DTYPES, LOW_DTYPES
from tests.ops.test_task_vector_compress import random, reseal

OP = "compress"


@pytest.mark.parametrize("values", LOW_DTYPES)
@pytest.mark.parametrize("size", [0, 1, 63, 65, 4097, 9001])
def test_the_bytes_of_the_reference(backend, values, size):
    for dtype in DTYPES:
        delta = random(size, dtype) * 1e-3
        for density in (0, 0.01, 0.3, 0.8, 1):
            packed = compress(delta, density, values=values, backend=backend)
            expected = compress(delta, density, values=values, backend="reference")
            assert torch.equal(packed.data[64:], expected.data[64:]) and packed.scale == expected.scale
            assert packed.values == values and packed.nnz == round(density * size)
            again = PackedDelta.from_bytes(packed.data.clone())
            assert again.values == values and again.scale == packed.scale and torch.equal(again.data, packed.data)


@pytest.mark.parametrize("size", [1, 65, 9001])
def test_float32_values_are_what_was_given(backend, size):
    delta = random(size) * 1e-5
    packed = compress(delta, 0.4, values=torch.float32, backend=backend)
    kept = decompress(compress(delta, 0.4)).signs() != 0
    assert torch.equal(packed.dense(), torch.where(kept, delta, 0))
    assert torch.equal(compress(delta, 1, values=torch.float32, backend=backend).dense(), delta)


def test_float16_has_exponents_to_spare():
    """Differences of 1e-8 would be zeros and denormals in float16: the scale takes their size."""
    delta = random(5000) * 1e-8
    packed = compress(delta, 1.0, values=torch.float16)
    assert float((packed.dense() - delta).abs().max()) <= 2.0**-11 * float(delta.abs().max())
    assert delta.abs().max() < packed.scale <= 2 * delta.abs().max()
    huge = torch.tensor([1e38, -3e-38])
    assert torch.equal(compress(huge, 0.5, values=torch.float32).dense(), torch.tensor([1e38, 0.0]))
    with pytest.raises(ValueError, match=r"compress: delta must be below 2\^127"):
        compress(torch.tensor([3e38]), 1.0, values=torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_and_undo(backend, threads, dtype):
    """Values in each dtype beside a ternary vector, in one pass with one rounding."""
    before = (random(50_001) * 0.02).to(dtype)
    deltas = [
        compress(random(50_001, seed=1) * 1e-3, 0.05, values=torch.bfloat16),
        compress(random(50_001, seed=2) * 1e-3, 0.3),
        compress(random(50_001, seed=3) * 1e-4, 1.0, values=torch.float16),
        decompress(compress(random(50_001, seed=4), 0.2)),
        compress(random(50_001, seed=5) * 1e-3, 0.6, values=torch.float32),
    ]
    coefficients = [1.0, -0.7, 2.0, 1e-3, -1.5]
    expected, plain, undoable = before.clone(), before.clone(), before.clone()
    apply_(expected, deltas, coefficients, backend="reference")
    apply_(plain, deltas, coefficients, backend=backend)
    undo = apply_(undoable, deltas, coefficients, undo=True, backend=backend)
    assert torch.equal(bits(plain), bits(expected)) and torch.equal(bits(undoable), bits(expected))
    unapply_(undoable, undo, backend=backend)
    assert torch.equal(bits(undoable), bits(before))


def test_one_vector_of_values_is_added_with_one_rounding(backend):
    """Against arithmetic that knows nothing of blocks: sparse fine-tunes of bfloat16 weights."""
    base, tuned = (random(9000, seed=i).bfloat16() * 0.02 for i in (0, 1))
    packed = compress(tuned, 0.1, base=base, values=torch.float32, backend=backend)
    expected = torch.where(packed.dense() != 0, (base.float() + packed.dense()).bfloat16(), base)
    actual = base.clone()
    apply_(actual, packed, backend=backend)
    assert torch.equal(actual, expected)


def test_what_is_no_number_stays(backend):
    before = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 3.0]).repeat(700)
    packed = compress(random(4900), 0.5, values=torch.float16, backend=backend)
    expected, actual = before.clone(), before.clone()
    apply_(expected, packed, backend="reference")
    undo = apply_(actual, packed, undo=True, backend=backend)
    assert torch.equal(bits(actual), bits(expected))
    unapply_(actual, undo, backend=backend)
    assert torch.equal(bits(actual), bits(before))


def test_state_dicts_have_one_threshold_and_a_scale_each(backend):
    delta = {"large": random(5000), "small": random(5000, seed=1) * 1e-3, "none": torch.zeros(100)}
    packed = compress(delta, 0.25, values=torch.float16, backend=backend)
    assert packed["large"].nnz > 2400 and packed["small"].nnz < 100 and packed["none"].nnz == 0
    assert packed["large"].scale > 500 * packed["small"].scale


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([100, 4096, 5000]), st.sampled_from([0.02, 0.5, 1.0]), st.sampled_from(LOW_DTYPES), st.data())
def test_no_bytes_make_a_reader_fail(size, density, values, data):
    """Damage under a right checksum: the kernel and the reference find the same vector or both refuse."""
    packed = compress(random(size), density, values=values).data.clone()
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(8, packed.numel() - 1), st.integers(HEADER_BYTES, HEADER_BYTES + 15)))
        packed[at] = data.draw(st.integers(0, 255))
    reseal(packed)
    try:
        delta = PackedDelta.from_header(packed)
    except ValueError:
        return
    if delta.values is None:
        return
    outcomes = []
    for kernels in (native, reference):
        try:
            planes, t = kernels.unpack_values(packed)
            outcomes.append((planes.tolist(), bits(t).tolist()))
        except (RuntimeError, ValueError) as error:
            assert "damaged" in str(error)
            outcomes.append(None)
    if outcomes[1] is not None and outcomes[0] is None:  # the header's count, which the reference does not compare
        assert delta.nnz != sum((word & 2**64 - 1).bit_count() for word, _ in outcomes[1][0])
    else:
        assert outcomes[0] == outcomes[1]
    weight = torch.zeros(delta.shape)
    try:
        apply_(weight, delta, backend="native")
    except (RuntimeError, ValueError) as error:
        assert "damaged" in str(error) or "finite" in str(error)


def test_bad_input():
    delta = random(100)
    with pytest.raises(ValueError, match="compress: values must be None, float32, bfloat16 or float16, got torch.int8"):
        compress(delta, 0.1, values=torch.int8)
    with pytest.raises(ValueError, match="compress: scale must be left out where values are kept, got 'mean'"):
        compress(delta, 0.1, values=torch.float16, scale="mean")
    packed = compress(delta, 0.1, values=torch.float16)
    with pytest.raises(
        ValueError, match=r"decompress: packed must be ternary, got values in torch.float16; call packed"
    ):
        decompress(packed)
    with pytest.raises(ValueError, match="the sum of"):
        apply_(delta, packed, float("inf"))


def test_registration():
    delta = random(5000)
    planes = native.select_ternary(delta, None, 0x3F800000, 3)
    arguments = (planes, delta, delta * 2, [5000], 8.0, 1.0, 0, 2)
    torch.library.opcheck(native.pack_values, arguments)
    torch.library.opcheck(native.unpack_values, (native.pack_values(*arguments),))


def test_other_kernels_say_that_they_have_none(monkeypatch):
    """On a GPU ``auto`` is then the reference."""
    monkeypatch.setattr(_dispatch, "_TRITON_INTERPRETS", True)
    delta, weight = compress(torch.randn(70), 0.3, values=torch.float32), torch.randn(70)
    with pytest.raises(RuntimeError, match="apply_ of values has no Triton kernels yet; use backend='reference'"):
        apply_(weight, delta, backend="triton")
    with pytest.raises(RuntimeError, match="merge of values has no Triton kernels yet; use backend='reference'"):
        merge(weight, [delta], method="task_arithmetic", backend="triton")
    assert _dispatch.resolve("apply_ of values", "auto", "cuda") == "reference"
