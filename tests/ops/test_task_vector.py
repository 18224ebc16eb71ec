"""Ternary task vectors: planes, apply_ and unapply_. Everything here is equal to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import TernaryDelta, apply_, unapply_
from moe_kernels.ops.task_vector import native, reference
from moe_kernels.ops.task_vector.reference import bits
from tests.ops.helpers import DTYPES, SLOW, seeded, strided

OP = "apply_"
GPU_KERNELS = ["native-simt", "native-ptx", "native-cuda", "triton-cpu", "triton-ptx", "triton-cuda"]
#: around a group of 64 and a block of 4096; one element; several tasks of 16 blocks and a tail
SIZES = [1, 63, 64, 65, 4095, 4096, 4097, 200_003]


def ternary(shape, density: float = 0.3, scale: float = 1e-3, seed: int = 0) -> TernaryDelta:
    generator = seeded(seed)
    signs = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
    return TernaryDelta.from_signs(signs, scale)


def weights(shape, dtype: torch.dtype, scale: float = 0.02) -> torch.Tensor:
    return (torch.randn(shape, generator=seeded(9), dtype=torch.float64) * scale).to(dtype)


def special(dtype: torch.dtype) -> torch.Tensor:
    """Every kind of number, in the groups of a block and a half."""
    info = torch.finfo(dtype)
    kinds = [
        0.0,
        -0.0,
        float("inf"),
        -float("inf"),
        float("nan"),
        info.tiny,
        -info.tiny,
        info.tiny / 4,
        info.max,
        1.0,
        -1.0,
    ]
    kinds += [info.smallest_normal * 1.5, -info.smallest_normal / 8, info.eps]
    return torch.tensor(kinds, dtype=torch.float64).to(dtype).repeat(440)


def random_bits(size: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    pattern = torch.randint(-(2**63), 2**63 - 1, (size,), generator=generator)
    return (pattern >> (64 - 8 * dtype.itemsize)).to(bits(torch.empty(0, dtype=dtype)).dtype).view(dtype)


def triton_kernels():
    from moe_kernels.ops.task_vector import triton

    return triton


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(bits(x) if x.is_floating_point() else x for x in (a, b)))


@pytest.mark.parametrize("shape", [(), (0,), (5, 0), (1,), (63,), (64,), (65,), (3, 7, 11), (4097,)], ids=str)
def test_planes_hold_the_signs(shape):
    signs = torch.randint(-1, 2, shape, generator=seeded(0))
    delta = TernaryDelta.from_signs(signs, 0.5)
    assert torch.equal(delta.signs(), signs.to(torch.int8)) and delta.signs().shape == signs.shape
    assert delta.planes.shape == (-(-signs.numel() // 64), 2)
    assert delta.nnz == int((signs != 0).sum())
    assert torch.equal(delta.dense(), signs * 0.5) and torch.equal((-delta).signs(), -signs.to(torch.int8))


def test_planes_of_one_group_by_hand():
    signs = torch.zeros(64)
    signs[[0, 3, 63]] = torch.tensor([1.0, -2.0, -0.5])
    delta = TernaryDelta.from_signs(signs)
    assert delta.planes.tolist() == [[1 + 8 - 2**63, 8 - 2**63]]


def test_signs_of_any_strides_and_dtype():
    signs = torch.randint(-1, 2, (6, 10), generator=seeded(0))
    for given_signs in (strided(signs), signs.t().contiguous().t(), signs.bfloat16(), signs.int()):
        assert torch.equal(TernaryDelta.from_signs(given_signs).signs(), signs.to(torch.int8))


@pytest.mark.on_gpus
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_and_undo(backend, kernel_id, dtype, size, count):
    if kernel_id in SLOW:
        if (count, size) not in ((3, 65), (8, 1), (2, 4097), (1, 200_003)):
            pytest.skip("an interpreter gets some of them")
        size = min(size, 9001)
    deltas = [ternary(size, scale=1e-3 * (i + 1), seed=i) for i in range(count)]
    coefficients = [1.0, -1.5, 0.7, 2.0, -0.1, 3.0, 1.0, -1.0][:count]
    before = weights(size, dtype)
    expected, plain, undoable = before.clone(), before.clone(), before.clone()
    assert apply_(expected, deltas, coefficients, backend="reference") is None
    apply_(plain, deltas, coefficients, backend=backend)
    undo = apply_(undoable, deltas, coefficients, undo=True, backend=backend)
    assert same_bits(plain, expected) and same_bits(undoable, expected)
    unapply_(undoable, undo, backend=backend)
    assert same_bits(undoable, before)


@pytest.mark.on_gpus
@pytest.mark.parametrize("scale", [0.0, 1e-41, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_numbers(backend, dtype, scale):
    before = special(dtype)
    deltas = [ternary(before.shape, scale=scale), ternary(before.shape, 1.0, scale=-scale, seed=1)]
    expected, actual = before.clone(), before.clone()
    apply_(expected, deltas, backend="reference")
    undo = apply_(actual, deltas, undo=True, backend=backend)
    assert same_bits(actual, expected)
    assert torch.equal(actual.isnan(), before.isnan()) and same_bits(actual[before.isnan()], before[before.isnan()])
    unapply_(actual, undo, backend=backend)
    assert same_bits(actual, before)


# the rows of the exactness table: how often W + d - d is not W grows with d
@pytest.mark.on_gpus
@pytest.mark.parametrize("scale", [5e-3, 1e-3, 3e-4, 1e-4, 3e-5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_undo_is_exact_where_subtraction_is_not(backend, kernel_id, dtype, scale):
    size = 5_000 if kernel_id in SLOW else 50_000
    before, delta = weights(size, dtype), ternary(size, 1.0, scale)
    weight = before.clone()
    undo = apply_(weight, delta, undo=True, backend=backend)
    subtracted = weight.clone()
    apply_(subtracted, delta, -1.0, backend=backend)
    assert not same_bits(subtracted, before)
    unapply_(weight, undo, backend=backend)
    assert same_bits(weight, before)


@pytest.mark.on_gpus
def test_undo_is_small(backend, kernel_id):
    weight = weights(1 << (14 if kernel_id in SLOW else 20), torch.bfloat16)
    undo = apply_(weight, ternary(weight.shape, 0.05), undo=True, backend=backend)
    assert undo.nbytes * 8 < 0.2 * weight.numel()  # bits; a copy of what changes would be 0.8


@pytest.mark.parametrize("densities", [(0.0,), (0.05,), (1.0, 0.3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.on_gpus
def test_the_undo_is_that_of_the_cpu(backend, dtype, densities):
    """Tensor by tensor: what one device keeps, another takes back. Weights of random bits among ordinary ones."""
    before = weights(9001, dtype)
    before[::3] = random_bits(3001, dtype, seeded(1))
    deltas = [ternary(9001, density, 10.0 ** (-3 * i), i) for i, density in enumerate(densities)]
    on_cpu = [TernaryDelta(delta.planes.cpu(), delta.shape, delta.scale) for delta in deltas]
    here, there = before.clone(), before.cpu()
    undo = apply_(here, deltas, undo=True, backend=backend)
    values = torch.tensor(undo.values, dtype=torch.float64).tolist()
    parts = torch.ops.moe_kernels.apply_ternary_undoable(there, [delta.planes for delta in on_cpu], values)
    assert same_bits(here.cpu(), there)
    for part, expected in zip(undo.parts, parts, strict=True):
        assert part.dtype == expected.dtype and part.shape == expected.shape and same_bits(part.cpu(), expected)


@pytest.mark.on_gpus
def test_odd_addresses(backend):
    """Weights and planes that begin in the middle of 16 bytes; their neighbours stay."""
    for dtype in DTYPES:
        memory = torch.zeros(4200, dtype=dtype)
        weight, words = memory[1:4199], torch.zeros(2 * 66 + 1, dtype=torch.int64)
        before = weight.copy_(weights(4198, dtype)).clone()
        delta = ternary(4198)
        odd = TernaryDelta(words[1:].view(66, 2).copy_(delta.planes), delta.shape, delta.scale)
        expected = before.clone()
        apply_(expected, delta, backend="reference")
        undo = apply_(weight, odd, undo=True, backend=backend)
        assert same_bits(weight, expected)
        unapply_(weight, undo, backend=backend)
        assert same_bits(weight, before) and memory[0] == 0 and memory[-1] == 0
        apply_(weight, odd, backend=backend)
        assert same_bits(weight, expected) and memory[0] == 0 and memory[-1] == 0


@pytest.mark.on_gpus
def test_many_vectors(backend, kernel_id):
    before = weights(300, torch.bfloat16)
    deltas = [ternary(300, 0.1, seed=i) for i in range(65)]
    on_cuda = backend == "native" and kernel_id != "native-cpu"
    for few in (deltas[:64], deltas):
        expected, weight = before.clone(), before.clone()
        if on_cuda and len(few) > 64:
            with pytest.raises(RuntimeError, match="apply_: deltas must be at most 64 on a GPU, got 65"):
                apply_(weight, few, backend=backend)
            continue
        apply_(expected, few, backend="reference")
        undo = apply_(weight, few, undo=True, backend=backend)
        assert same_bits(weight, expected)
        unapply_(weight, undo, backend=backend)
        assert same_bits(weight, before)


@pytest.mark.on_gpus
def test_one_rounding(backend):
    """Many small steps arrive although each alone is lost."""
    one = TernaryDelta.from_signs(torch.ones(100), 2.0**-9)
    together, apart = torch.ones(100, dtype=torch.bfloat16), torch.ones(100, dtype=torch.bfloat16)
    apply_(together, [one] * 8, backend=backend)
    for _ in range(8):
        apply_(apart, one, backend=backend)
    assert torch.equal(apart, torch.ones_like(apart)) and together.tolist() == [1 + 2.0**-6] * 100


@pytest.mark.on_gpus
def test_sums_in_float32_in_order(backend):
    """A large vector first swallows the next; in any other order it would not."""
    deltas = [TernaryDelta.from_signs(torch.ones(70), scale) for scale in (1e8, 1.0, -1e8)]
    weight = torch.zeros(70)
    apply_(weight, deltas, backend=backend)
    assert torch.equal(weight, torch.zeros(70))
    apply_(weight, [deltas[0], deltas[2], deltas[1]], backend=backend)
    assert torch.equal(weight, torch.ones(70))


@pytest.mark.on_gpus
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_gradients(backend, dtype):
    before = weights((33, 65), dtype)
    delta = ternary((33, 65))
    expected = before.clone()
    apply_(expected, delta, backend=backend)
    view = strided(before)
    undo = apply_(view, delta, undo=True, backend=backend)
    assert same_bits(view.contiguous(), expected)
    unapply_(view, undo, backend=backend)
    assert same_bits(view.contiguous(), before)
    parameter = torch.nn.Parameter(before.clone())
    apply_(parameter, delta, backend=backend)
    assert same_bits(parameter.detach(), expected) and parameter.grad_fn is None


def test_threads_do_not_matter(backend, threads):
    before = weights(300_000, torch.bfloat16)
    deltas = [ternary(before.shape, 0.1, seed=i) for i in range(3)]
    expected, weight = before.clone(), before.clone()
    apply_(expected, deltas, backend="reference")
    undo = apply_(weight, deltas, undo=True, backend=backend)
    assert same_bits(weight, expected)
    unapply_(weight, undo, backend=backend)
    assert same_bits(weight, before)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9000), st.lists(st.sampled_from([0.0, 0.01, 0.5, 1.0]), min_size=1, max_size=4),
    st.sampled_from(DTYPES), st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_any_size_density_and_bits(size, densities, dtype, seed):
    """Weights of random bits: every exponent, NaN of every payload."""
    before = random_bits(size, dtype, seeded(seed))
    deltas = [ternary(size, density, 10.0 ** (i - 3), seed + i) for i, density in enumerate(densities)]
    expected, actual = before.clone(), before.clone()
    apply_(expected, deltas, backend="reference")
    undo = apply_(actual, deltas, undo=True, backend="native")
    assert same_bits(actual, expected)
    unapply_(actual, undo, backend="native")
    assert same_bits(actual, before)


@pytest.mark.on_gpus
def test_the_undo_belongs_to_one_state_of_the_weight(backend):
    weight, delta = weights(100, torch.bfloat16), ternary(100)
    undo = apply_(weight, delta, undo=True, backend=backend)
    weight.mul_(1)  # changes nothing, but could have
    state = weight.clone()
    with pytest.raises(RuntimeError, match="unapply_: the weight was changed since apply_"):
        unapply_(weight, undo, backend=backend)
    assert same_bits(weight, state)
    undo = apply_(weight, delta, undo=True, backend=backend)
    unapply_(weight, undo, backend=backend)
    with pytest.raises(RuntimeError, match="nothing was taken back"):
        unapply_(weight, undo, backend=backend)


def test_autograd_sees_the_change(backend):
    weight = weights(10, torch.float32).requires_grad_()
    loss = (weight * weight).sum()
    apply_(weight, ternary(10), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.on_gpus
def test_inference_mode(backend):
    with torch.inference_mode():
        before = weights(100, torch.bfloat16)
        weight = before.clone()
        undo = apply_(weight, ternary(100), undo=True, backend=backend)
        assert not same_bits(weight, before)
        unapply_(weight, undo, backend=backend)
        assert same_bits(weight, before)


@pytest.mark.on_gpus
def test_no_vectors_and_no_elements(backend):
    weight = weights(10, torch.float32)
    state = weight.clone()
    unapply_(weight, apply_(weight, [], undo=True, backend=backend), backend=backend)
    assert same_bits(weight, state)
    empty = torch.empty(0, 4)
    unapply_(empty, apply_(empty, ternary((0, 4)), undo=True, backend=backend), backend=backend)


def test_bad_input():
    weight, delta = torch.randn(4, 5), ternary((4, 5))
    with pytest.raises(ValueError, match=r"apply_: weight must be of shape \[4, 5\], got \[5, 4\]; the task vector is"):
        apply_(torch.randn(5, 4), delta)
    with pytest.raises(TypeError, match="apply_: weight must be one of"):
        apply_(torch.zeros(4, 5, dtype=torch.int32), delta)
    with pytest.raises(TypeError, match="apply_: deltas must be TernaryDelta or PackedDelta, got Tensor"):
        apply_(weight, [torch.zeros(4, 5)])
    with pytest.raises(ValueError, match="apply_: coefficients must be one number or 1"):
        apply_(weight, delta, [1.0, 2.0])
    for coefficient in (float("nan"), float("inf"), 1e42):
        with pytest.raises(ValueError, match="apply_: coefficients must be such that"):
            apply_(weight, delta, coefficient)
    with pytest.raises(ValueError, match="coefficients must be such that"):
        apply_(weight, [delta, delta], [3e41, -3e41])
    with pytest.raises(TypeError, match="unapply_: undo must be what apply_ returned"):
        unapply_(weight, None)
    with pytest.raises(ValueError, match="signs must be numbers, got NaN"):
        TernaryDelta.from_signs(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match=r"planes must be of shape \[1, 2\]"):
        TernaryDelta(torch.zeros(2, 2, dtype=torch.int64), (3,))
    with pytest.raises(TypeError, match="planes must be torch.int64"):
        TernaryDelta(torch.zeros(1, 2), (3,))


@pytest.mark.on_gpus
def test_an_undo_of_other_vectors(backend, raises_in_kernel):
    """On the CPU an error; a GPU has nobody to tell, and reads nothing that is not there."""
    weight, delta = weights(5000, torch.bfloat16), ternary(5000, 0.01)
    parts = apply_(weight, delta, undo=True, backend=backend).parts
    denser = ternary(5000, 0.9)
    if not raises_in_kernel:
        unapply_ternary = native.unapply_ternary if backend == "native" else triton_kernels().unapply_ternary
        unapply_ternary(weight, [denser.planes], [1.0], *parts)
        return
    with pytest.raises(RuntimeError, match="the undo must be that of these deltas"):
        native.unapply_ternary(weight, [denser.planes], [1.0], *parts)


def test_registration():
    weight, planes = weights(5000, torch.bfloat16), ternary(5000).planes
    torch.library.opcheck(native.apply_ternary, (weight, [planes], [0.5]))
    torch.library.opcheck(native.apply_ternary_undoable, (weight, [planes], [0.5]))
    parts = native.apply_ternary_undoable(weight, [planes], [0.5])
    torch.library.opcheck(native.unapply_ternary, (weight, [planes], [0.5], *parts))


def test_the_reference_by_hand():
    weight = torch.tensor([1.0, 2.0, float("nan"), -0.0])
    deltas = [
        TernaryDelta.from_signs(torch.tensor([1.0, -1.0, 1.0, 0.0]), 0.5),
        TernaryDelta.from_signs(torch.ones(4), 2.0),
    ]
    reference.apply_(weight, deltas, [0.5, 2.0])
    assert weight[:2].tolist() == [3.5, 3.5] and weight[2].isnan() and weight[3] == 2.0
