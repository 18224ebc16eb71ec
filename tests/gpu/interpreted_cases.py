"""Cases for the mended Triton interpreter; ``test_triton_interpreter.py`` runs them in a process of their own."""

import pytest
import torch
import triton
import triton.language as tl

from moe_kernels.testing import assert_close_to_reference

from . import triton_interpreter
from . import triton_kernels as kernels

triton_interpreter.install()


@triton.jit
def elementwise(a, b, out, n, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(a + i, mask=i < n), tl.load(b + i, mask=i < n)
    if OPERATION == "add":
        z = x + y
    elif OPERATION == "mul":
        z = x * y
    elif OPERATION == "sub":
        z = x - y
    elif OPERATION == "max":
        z = tl.maximum(x, y)
    elif OPERATION == "where":
        z = tl.where(x > y, x, y)
    elif OPERATION == "abs":
        z = tl.abs(x)
    elif OPERATION == "neg":
        z = -x
    else:
        z = tl.fma(x, y, x)
    tl.store(out + i, z, mask=i < n)


@triton.jit
def cast(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def reduce(x, total, largest, place, running, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    value = tl.load(x + i)
    row = tl.arange(0, ROWS)
    tl.store(total + row, tl.sum(value, 1))
    tl.store(largest + row, tl.max(value, 1))
    tl.store(place + row, tl.argmax(value, 1))
    tl.store(running + i, tl.cumsum(value, 1))


@triton.jit
def shifted_store(out, shift, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + shift + i, i.to(tl.float32))


def bf16_pair(n):
    # every exponent that bfloat16 shares with small numbers, subnormals, zeros of both signs, ties of rounding
    a = torch.randn(n).mul(torch.randint(-20, 20, (n,)).float().exp2()).bfloat16()
    b = torch.randn(n).bfloat16()
    a[:6] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3.0e38, 1.0]).bfloat16()
    return a, b


@pytest.mark.parametrize("operation", ["add", "mul", "sub", "max", "where", "abs", "neg", "fma"])
def test_bfloat16_elementwise(operation):
    n = 1000
    a, b = bf16_pair(n)
    out = torch.full((n,), torch.nan).bfloat16()
    elementwise[(8,)](a, b, out, n, OPERATION=operation, BLOCK=128)
    expected = {
        "add": lambda: a + b, "mul": lambda: a * b, "sub": lambda: a - b, "max": lambda: torch.maximum(a, b),
        "where": lambda: torch.where(a > b, a, b), "abs": lambda: a.abs(), "neg": lambda: -a,
        "fma": lambda: (a.double() * b.double() + a.double()).float().bfloat16(),
    }[operation]()  # fmt: skip
    if operation == "fma":  # the reference above rounds twice
        assert_close_to_reference(out, a.double() * b.double() + a.double(), expected)
    else:
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "source, target",
    [(other, torch.bfloat16) for other in (torch.float32, torch.float16, torch.int32, torch.float64, torch.bfloat16)]
    + [(torch.bfloat16, other) for other in (torch.float32, torch.float16, torch.int32)],
)
def test_casts_of_bfloat16(source, target):
    x = (torch.randn(256) * 100).to(source)
    if source == torch.float32:  # halfway between two bfloat16 numbers: to even, up and down; the largest overflows
        x[:4] = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF], dtype=torch.int32).view(torch.float32)
    out = torch.zeros(256, dtype=target)
    cast[(1,)](x, out, BLOCK=256)
    assert torch.equal(out, x.to(target))


def test_bfloat16_reductions():
    x = torch.randint(-4, 5, (16, 32)).bfloat16()
    total, largest = torch.zeros(16).bfloat16(), torch.zeros(16).bfloat16()
    place, running = torch.zeros(16, dtype=torch.int32), torch.zeros(16, 32).bfloat16()
    reduce[(1,)](x, total, largest, place, running, ROWS=16, COLUMNS=32)
    assert torch.equal(total, x.double().sum(1).bfloat16())
    assert torch.equal(largest, x.max(1).values)
    assert torch.equal(place.long(), x.double().argmax(1))
    assert torch.equal(running, x.double().cumsum(1).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_grouped_gemm(dtype):
    sizes = [37, 0, 32, 5]
    offsets = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows, weights = torch.randn(sum(sizes), 64).to(dtype), torch.randn(4, 32, 64).to(dtype)
    out = torch.full((sum(sizes), 32), torch.nan).to(dtype)
    kernels.grouped_gemm[(2, 1, 4)](rows, weights, out, offsets, 32, 64, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32)

    def groups(x, w):
        return torch.cat([x[offsets[e] : offsets[e + 1]] @ w[e].T for e in range(4)])

    assert_close_to_reference(out, groups(rows.double(), weights.double()), groups(rows, weights))


def test_fma_of_float32_rounds_once():
    a, b, out = torch.randn(1024), torch.randn(1024), torch.zeros(1024)
    elementwise[(1,)](a, b, out, 1024, OPERATION="fma", BLOCK=1024)
    assert torch.equal(out, (a.double() * b.double() + a.double()).float())


@triton.jit
def where_positive(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, i, mask=(i >= 0) & (tl.load(x) > 0))


def test_a_comparison_of_numbers_masks_a_tensor():
    for number, expected in ((2.5, [0, 1, 2, 3]), (-2.5, [-1] * 4)):
        out = torch.full((4,), -1)
        where_positive[(1,)](torch.tensor([number]), out, BLOCK=4)
        assert out.tolist() == expected


def test_activation():
    gate, up = torch.randn(2, 300).bfloat16()
    out = torch.zeros(300).bfloat16()
    kernels.activation[(2,)](gate, up, out, 300, BLOCK=256)
    silu = torch.nn.functional.silu
    assert_close_to_reference(out, silu(gate.double()) * up.double(), silu(gate) * up)


@pytest.mark.parametrize("shift, where", [(-1, "first [(0,)]"), (1, "1 lanes, first [(63,)]"), (2**40, "64 lanes")])
def test_addresses_outside_are_errors(shift, where):
    whole = torch.zeros(192)
    shifted_store[(1,)](whole[64:128], 0, BLOCK=64)
    assert torch.equal(whole[64:128], torch.arange(64.0)) and whole.sum() == whole[64:128].sum()
    with pytest.raises(Exception, match="outside the launch's tensors") as caught:
        shifted_store[(1,)](whole[64:128], shift, BLOCK=64)
    assert where in str(caught.value)


def test_misaligned_address():
    raw = torch.zeros(257, dtype=torch.uint8)
    base = raw.untyped_storage()
    tensor = torch.empty(0).set_(base, 0, (64,), (1,))
    shifted_store[(1,)](tensor, 0, BLOCK=64)
    with pytest.raises(Exception, match="not aligned"):
        misaligned_store[(1,)](raw, BLOCK=64)


@triton.jit
def misaligned_store(raw, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store((raw + 1).to(tl.pointer_type(tl.float32)) + i, i.to(tl.float32))


@pytest.mark.parametrize("n", [299, 301])
def test_a_mask_that_is_off_by_one(n):
    """One lane too many is an error; one too few leaves the NaN that the output was filled with."""
    gate, up, out = torch.randn(300), torch.randn(300), torch.full((300,), torch.nan)
    if n > 300:
        with pytest.raises(Exception, match="outside the launch's tensors"):
            kernels.activation[(2,)](gate, up, out, n, BLOCK=256)
    else:
        kernels.activation[(2,)](gate, up, out, n, BLOCK=256)
        assert out.isnan().sum() == 1
