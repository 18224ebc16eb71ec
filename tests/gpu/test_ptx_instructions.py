"""Single instructions against what Python's integers and PyTorch make of the same bits."""

import math
import random
import struct

import numpy as np
import pytest
import torch

from .ptx import Fault, PtxError, report, run_ptx
from .ptx.formats import FP8_TABLES, to_fp8

N = 256
SIZES = {"b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, 
         "f64": 8, "f16x2": 4, "bf16x2": 4, "bf16": 2}  # fmt: skip


def run_instruction(text: str, types: list[str], inputs: list[np.ndarray], prelude: str = "") -> np.ndarray:
    """``text`` computes %d from %a, %b, %c; ``types`` are those of d, a, b, c."""
    names = "dabc"[: len(types)]
    lines = [".version 8.0", ".target sm_90", ".address_size 64", ".visible .entry kernel("]
    lines.append(",\n".join(f".param .u64 p{name}" for name in names) + ") {")
    lines += [".reg .b64 %base, %offset, %at;", ".reg .b32 %tid;", ".reg .pred %p, %q;", "mov.u32 %tid, %tid.x;"]
    lines += [f".reg .b{8 * SIZES[type_]} %{name};" for name, type_ in zip(names, types, strict=True)]
    for name, type_ in list(zip(names, types, strict=True))[1:]:
        bits = 8 * SIZES[type_]
        lines += [f"ld.param.u64 %base, [p{name}];", f"mul.wide.u32 %offset, %tid, {bits // 8};",
                  "add.s64 %at, %base, %offset;", f"ld.global.b{bits} %{name}, [%at];"]  # fmt: skip
    bits = 8 * SIZES[types[0]]
    lines += [prelude, text, "ld.param.u64 %base, [pd];", f"mul.wide.u32 %offset, %tid, {bits // 8};"]
    lines += ["add.s64 %at, %base, %offset;", f"st.global.b{bits} [%at], %d;", "ret; }"]
    out = torch.zeros(N * bits // 8, dtype=torch.uint8)
    tensors = [torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).reshape(-1).copy()) for values in inputs]
    run_ptx("\n".join(lines), "kernel", 1, N, [out, *tensors])
    return out.numpy().view({2: np.uint16, 4: np.uint32, 8: np.uint64}[bits // 8])


def integers(bits: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    edges = [0, 1, 2, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, 31, 32, 33, 63, 64, 255, 256]
    values = [edge % (1 << bits) for edge in edges]
    return values + [generator.getrandbits(generator.randint(1, bits)) for _ in range(N - len(values))]


def to_signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def div(a, b, bits):
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


def bfe(a, start, length, bits, is_signed):
    start, length = start & 255, length & 255
    if not length:
        return 0
    value = a >> start & ((1 << length) - 1) if start < bits else 0
    if is_signed:
        top = min(start + length - 1, bits - 1)
        sign = a >> top & 1
        have = max(0, min(length, bits - start))
        value |= (-sign) << have
    return value


def bfi(a, b, start, length):
    start, length = start & 255, length & 255
    mask = (((1 << length) - 1) << start) & 0xFFFFFFFF if start < 32 else 0
    return (a << start) & mask | b & ~mask


def prmt(a, b, selector):
    raw = (b << 32 | a).to_bytes(8, "little")
    out = []
    for nibble in range(4):
        code = selector >> 4 * nibble & 15
        byte = raw[code & 7]
        out.append((0xFF if byte & 0x80 else 0) if code & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def shift(a, by, bits, left, is_signed=False):
    if left:
        return a << by if by < bits else 0
    value = to_signed(a, bits) if is_signed else a
    return value >> min(by, bits)


def lop3(a, b, c, table):
    return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))


S = to_signed
INTEGER = {
    "add.s32": lambda a, b: a + b, "sub.s32": lambda a, b: a - b, "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.s32": lambda a, b: S(a, 32) * S(b, 32) >> 32, "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s64": lambda a, b: S(a, 64) * S(b, 64) >> 64, "mul.hi.u64": lambda a, b: a * b >> 64,
    "mul.lo.s64": lambda a, b: a * b, "mul.lo.s16": lambda a, b: a * b, "add.s16": lambda a, b: a + b,
    "add.sat.s32": lambda a, b: max(-(2**31), min(2**31 - 1, S(a, 32) + S(b, 32))),
    "div.u32": lambda a, b: a // b if b else -1, "div.s32": lambda a, b: div(S(a, 32), S(b, 32), 32) if b else -1,
    "rem.u32": lambda a, b: a % b if b else a,
    "rem.s32": lambda a, b: S(a, 32) - div(S(a, 32), S(b, 32), 32) * S(b, 32) if b else a,
    "div.u64": lambda a, b: a // b if b else -1, "div.s64": lambda a, b: div(S(a, 64), S(b, 64), 64) if b else -1,
    "min.s32": lambda a, b: min(S(a, 32), S(b, 32)), "max.u32": lambda a, b: max(a, b),
    "max.s64": lambda a, b: max(S(a, 64), S(b, 64)), "min.u16": lambda a, b: min(a, b),
    "and.b32": lambda a, b: a & b, "or.b64": lambda a, b: a | b, "xor.b32": lambda a, b: a ^ b,
    "mul24.lo.u32": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "mul24.lo.s32": lambda a, b: S(a & 0xFFFFFF, 24) * S(b & 0xFFFFFF, 24),
    "bmsk.clamp.b32": None,
}  # fmt: skip
INTEGER.pop("bmsk.clamp.b32")


@pytest.mark.parametrize("opcode", INTEGER)
def test_integer_instruction(opcode):
    type_ = opcode.split(".")[-1]
    bits = 8 * SIZES[type_]
    a, b = integers(bits, 1), integers(bits, 2)[::-1]
    dtype = {16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
    got = run_instruction(f"{opcode} %d, %a, %b;", [type_] * 3, [np.array(a, dtype), np.array(b, dtype)])
    assert got.tolist() == [INTEGER[opcode](x, y) % (1 << bits) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize(
    "opcode", ["shl.b32", "shr.u32", "shr.s32", "shl.b64", "shr.u64", "shr.s64", "shl.b16", "shr.s16"]
)
def test_shift(opcode):
    type_ = opcode.split(".")[-1]
    bits = 8 * SIZES[type_]
    a, by = integers(bits, 1), [k % 80 for k in range(N)]
    dtype = {16: np.uint16, 32: np.uint32, 64: np.uint64}[bits]
    got = run_instruction(f"{opcode} %d, %a, %b;", [type_, type_, "u32"], [np.array(a, dtype), np.array(by, np.uint32)])
    left, is_signed = opcode.startswith("shl"), type_.startswith("s")
    assert got.tolist() == [shift(x, k, bits, left, is_signed) % (1 << bits) for x, k in zip(a, by, strict=True)]


THREE = {
    "mad.lo.s32 %d, %a, %b, %c": lambda a, b, c: a * b + c,
    "mad.hi.s32 %d, %a, %b, %c": lambda a, b, c: (S(a, 32) * S(b, 32) >> 32) + c,
    "mad.hi.u32 %d, %a, %b, %c": lambda a, b, c: (a * b >> 32) + c,
    "bfe.u32 %d, %a, %b, %c": lambda a, b, c: bfe(a, b, c, 32, False),
    "bfe.s32 %d, %a, %b, %c": lambda a, b, c: bfe(a, b, c, 32, True),
    "bfi.b32 %d, %a, %b, 5, 9": lambda a, b, c: bfi(a, b, 5, 9),
    "bfi.b32 %d, %a, %b, 28, 9": lambda a, b, c: bfi(a, b, 28, 9),
    "prmt.b32 %d, %a, %b, %c": prmt,
    "prmt.b32 %d, %a, %b, 0x7531": lambda a, b, c: prmt(a, b, 0x7531),
    "lop3.b32 %d, %a, %b, %c, 0x96": lambda a, b, c: lop3(a, b, c, 0x96),
    "lop3.b32 %d, %a, %b, %c, 0xE8": lambda a, b, c: lop3(a, b, c, 0xE8),
    "shf.l.wrap.b32 %d, %a, %b, %c": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.clamp.b32 %d, %a, %b, %c": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "sad.u32 %d, %a, %b, %c": lambda a, b, c: abs(a - b) + c,
    "dp4a.u32.u32 %d, %a, %b, %c": lambda a, b, c: sum(
        x * y for x, y in zip(a.to_bytes(4, "little"), b.to_bytes(4, "little"), strict=True)
    ) + c,
    "slct.b32.s32 %d, %a, %b, %c": lambda a, b, c: a if S(c, 32) >= 0 else b,
    "setp.lt.s32 %p, %a, %b; selp.b32 %d, %a, %c, %p": lambda a, b, c: a if S(a, 32) < S(b, 32) else c,
    "setp.hi.u32 %p|%q, %a, %b; selp.b32 %d, %a, %c, %q": lambda a, b, c: c if a > b else a,
    "setp.ne.and.b32 %p, %a, %b, %q; selp.b32 %d, %a, %c, %p": lambda a, b, c: c,
    "add.cc.u32 %d, %a, %b; addc.u32 %d, %c, 0": lambda a, b, c: c + (a + b >> 32),
    "sub.cc.u32 %d, %a, %b; subc.u32 %d, %c, 0": lambda a, b, c: c - (a < b),
    "set.lt.u32.u32 %d, %a, %b": lambda a, b, c: 0xFFFFFFFF if a < b else 0,
}  # fmt: skip


@pytest.mark.parametrize("text", THREE)
def test_instruction_of_three(text):
    a, b, c = integers(32, 1), integers(32, 2)[::-1], integers(32, 3)[17:] + integers(32, 3)[:17]
    arrays = [np.array(values, np.uint32) for values in (a, b, c)]
    got = run_instruction(text + ";", ["u32"] * 4, arrays, prelude="setp.ne.u32 %q, %a, %a;")
    assert got.tolist() == [THREE[text](*values) % (1 << 32) for values in zip(a, b, c, strict=True)]


ONE = {
    "popc.b32": lambda a: bin(a).count("1"), "clz.b32": lambda a: 32 - a.bit_length(),
    "brev.b32": lambda a: int(f"{a:032b}"[::-1], 2), "bfind.u32": lambda a: a.bit_length() - 1,
    "bfind.s32": lambda a: (a if a >> 31 == 0 else ~a & 0xFFFFFFFF).bit_length() - 1,
    "not.b32": lambda a: ~a, "neg.s32": lambda a: -a, "abs.s32": lambda a: abs(S(a, 32)), "cnot.b32": lambda a: a == 0,
    "cvt.s32.s8": lambda a: S(a & 255, 8), "cvt.u32.u16": lambda a: a & 0xFFFF,
    "cvt.sat.s8.s32": lambda a: max(-128, min(127, S(a, 32))),
}  # fmt: skip


@pytest.mark.parametrize("opcode", ONE)
def test_instruction_of_one(opcode):
    a = integers(32, 1)
    got = run_instruction(f"{opcode} %d, %a;", ["u32", "u32"], [np.array(a, np.uint32)])
    assert got.tolist() == [ONE[opcode](value) % (1 << 32) for value in a]


def floats(dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-20, 20, (N,), generator=generator).float().exp2()
    values = torch.randn(N, generator=generator) * exponents
    values[:8] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 1e-40, -3.0])
    return values.to(dtype)


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    size = tensor.element_size()
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).numpy()


def same(got: np.ndarray, expected: torch.Tensor) -> bool:
    bits = torch.from_numpy(got.view({2: np.int16, 4: np.int32, 8: np.int64}[got.itemsize]).copy()).view(expected.dtype)
    return torch.equal(bits.isnan(), expected.isnan()) and bool(
        ((bits == expected) & (bits.signbit() == expected.signbit()) | expected.isnan()).all()
    )


TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}


@pytest.mark.parametrize("type_", ["f32", "f16", "bf16", "f64"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "min", "max", "neg", "abs"])
def test_float_instruction(name, type_):
    a, b = floats(TORCH[type_], 1), floats(TORCH[type_], 2).flip(0)
    unary = name in ("neg", "abs")
    rounding = "" if unary or name in ("min", "max") else ".rn"
    text = f"{name}{rounding}.{type_} %d, %a{'' if unary else ', %b'};"
    got = run_instruction(text, [type_] * 3, [bits_of(a), bits_of(b)])
    expected = {
        "add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "neg": lambda: -a, "abs": lambda: a.abs(),
        "min": lambda: torch.fmin(a, b), "max": lambda: torch.fmax(a, b),
    }[name]()  # fmt: skip
    assert same(got, expected)


def nearest_f32(exact) -> np.float32:
    """The float32 nearest to a fraction, ties to even, from its neighbours."""
    from fractions import Fraction

    guess = np.float32(float(exact))
    candidates = {guess, np.nextafter(guess, np.float32(np.inf)), np.nextafter(guess, np.float32(-np.inf))}
    return min(candidates, key=lambda x: (abs(Fraction(float(x)) - exact), np.float32(x).view(np.uint32) & 1))


def test_fma_rounds_once():
    from fractions import Fraction

    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(N).astype(np.float32) for _ in range(2))
    c = (-(a.astype(np.float64) * b) * (1 + generator.choice([0, 2.0**-24, 2.0**-30, 1.0], N))).astype(np.float32)
    got = run_instruction("fma.rn.f32 %d, %a, %b, %c;", ["f32"] * 4, [a, b, c]).view(np.float32)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert got.tolist() == [float(nearest_f32(value)) for value in exact]


@pytest.mark.parametrize("mode, check", [("rz", "toward"), ("rm", "below"), ("rp", "above")])
def test_directed_rounding(mode, check):
    from fractions import Fraction

    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(N).astype(np.float32) * np.float32(2) ** k for k in (0, 3))
    got = run_instruction(f"add.{mode}.f32 %d, %a, %b;", ["f32"] * 3, [a, b]).view(np.float32)
    for x, y, z in zip(a, b, got, strict=True):
        exact, value = Fraction(float(x)) + Fraction(float(y)), Fraction(float(z))
        up, down = (Fraction(float(np.nextafter(z, np.float32(s)))) for s in (np.inf, -np.inf))
        below = value <= exact < up
        above = down < exact <= value
        assert {"toward": below if exact >= 0 else above, "below": below, "above": above}[check]


@pytest.mark.parametrize(
    "text, to, source",
    [("cvt.rn.f16.f32", "f16", "f32"), ("cvt.rn.bf16.f32", "bf16", "f32"), ("cvt.f32.f16", "f32", "f16"),
     ("cvt.f32.bf16", "f32", "bf16"), ("cvt.f64.f32", "f64", "f32"), ("cvt.rn.f32.f64", "f32", "f64")],
)  # fmt: skip
def test_float_conversion(text, to, source):
    a = floats(TORCH[source], 1)
    got = run_instruction(f"{text} %d, %a;", [to, source], [bits_of(a)])
    assert same(got, a.to(TORCH[to]))


def test_packed_conversion_puts_the_first_operand_above():
    a, b = floats(torch.float32, 1), floats(torch.float32, 2)
    got = run_instruction("cvt.rn.bf16x2.f32 %d, %a, %b;", ["b32", "f32", "f32"], [bits_of(a), bits_of(b)])
    halves = got.view(np.uint16).reshape(N, 2)
    assert same(halves[:, 1].copy(), a.bfloat16()) and same(halves[:, 0].copy(), b.bfloat16())


def test_packed_fma():
    a, b, c = (floats(torch.bfloat16, seed)[8:136].repeat(4) for seed in (1, 2, 3))
    got = run_instruction(
        "fma.rn.bf16x2 %d, %a, %b, %c;", ["bf16x2"] * 4, [bits_of(x).view(np.uint32) for x in (a, b, c)]
    )
    # a product of two bfloat16 and the sum with a third fit float64, but for the smallest
    expected = (a.double() * b.double() + c.double()).float().bfloat16()
    wrong = torch.from_numpy(got.view(np.int16).copy()).view(torch.bfloat16) != expected
    exact = a.double() * b.double() + c.double()
    assert (exact[wrong] != exact[wrong].float().double()).all()  # only where the reference rounds twice
    assert wrong.float().mean() < 0.01


@pytest.mark.parametrize("type_", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_float_to_integer_saturates(type_, mode):
    bits = 8 * SIZES[type_]
    a = floats(torch.float32, 1).numpy().copy()
    a[8:16] = [0.5, 1.5, 2.5, -0.5, -1.5, 2.0**31, -(2.0**31), 2.0**63]
    got = run_instruction(f"cvt.{mode}.{type_}.f32 %d, %a;", [type_, "f32"], [a])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if type_[0] == "s" else (0, (1 << bits) - 1)
    function = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode]

    def expected(x):
        if math.isnan(x):
            return 0
        return max(low, min(high, function(x) if math.isfinite(x) else (high if x > 0 else low)))

    assert got.tolist() == [expected(float(x)) % (1 << bits) for x in a]


@pytest.mark.parametrize("type_", ["s32", "u32", "s64", "u64"])
def test_integer_to_float_rounds_once(type_):
    from fractions import Fraction

    bits = 8 * SIZES[type_]
    values = integers(bits, 5)
    got = run_instruction(
        f"cvt.rn.f32.{type_} %d, %a;", ["f32", type_], [np.array(values, {32: np.uint32, 64: np.uint64}[bits])]
    ).view(np.float32)
    signed = [S(value, bits) if type_[0] == "s" else value for value in values]
    assert got.tolist() == [float(nearest_f32(Fraction(value))) for value in signed]


@pytest.mark.parametrize("type_, dtype", [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_tables(type_, dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(dtype).double().numpy()
    assert np.array_equal(FP8_TABLES[type_], expected, equal_nan=True)
    largest = torch.finfo(dtype).max
    values = (torch.randn(4000) * torch.randint(-12, 8, (4000,)).float().exp2()).clamp(-largest, largest)
    assert np.array_equal(to_fp8(values.numpy(), type_), values.to(dtype).view(torch.uint8).numpy())


# --- language and reports -----------------------------------------------------------------------------------------
HEAD = ".version 8.0\n.target sm_90\n.address_size 64\n"


def test_unknown_instruction_is_named():
    with pytest.raises(PtxError, match="line 5: frobnicate.b32"):
        run_ptx(HEAD + ".visible .entry k() {\nfrobnicate.b32 ;\nret; }", "k", 1, 32, [])


def test_missing_kernel_is_named():
    with pytest.raises(PtxError, match=r"'j' is not in this PTX; it has \['k'\]"):
        run_ptx(HEAD + ".visible .entry k() { ret; }", "j", 1, 32, [])


def test_endless_loop_is_a_livelock():
    with pytest.raises(Fault, match="livelock"):
        run_ptx(HEAD + ".visible .entry k() {\nagain: bra again;\n}", "k", 1, 32, [], max_steps=1000)


def test_lanes_of_a_warp_need_a_barrier_too():
    body = """.visible .entry k() {{ .reg .b32 %a, %b, %v; .shared .align 4 .b8 s[128];
    mov.u32 %a, %tid.x; shl.b32 %a, %a, 2; mov.u32 %b, s; add.u32 %b, %b, %a; st.shared.u32 [%b], %a;
    {0} xor.b32 %a, %a, 4; mov.u32 %b, s; add.u32 %b, %b, %a; ld.shared.u32 %v, [%b]; ret; }}"""
    run_ptx(HEAD + body.format("bar.warp.sync 0xffffffff;"), "k", 1, 32, [])
    with pytest.raises(Fault, match="race"):
        run_ptx(HEAD + body.format(""), "k", 1, 32, [])


# lane stride in words and the passes that a 4-byte access of a warp then takes: the largest common divisor with 32
@pytest.mark.parametrize("stride, passes", [(0, 1), (1, 1), (2, 2), (3, 1), (4, 4), (16, 16), (32, 32), (33, 1)])
def test_bank_conflicts(stride, passes):
    body = f""".visible .entry k() {{ .reg .b32 %a, %b, %v; .shared .align 4 .b8 s[8192];
    mov.u32 %a, %tid.x; mul.lo.u32 %a, %a, {4 * stride}; mov.u32 %b, s; add.u32 %b, %b, %a;
    st.shared.u32 [%b], 7; ret; }}"""
    counters = run_ptx(HEAD + body, "k", 1, 32, [])
    assert counters.shared_wavefronts == passes and counters.bank_conflicts == passes - 1


# bytes between lanes: within one sector, whole sectors, one each, astride
@pytest.mark.parametrize("stride, sectors", [(4, 4), (8, 8), (32, 32), (64, 32), (0, 1)])
def test_sectors(stride, sectors):
    body = f""".visible .entry k(.param .u64 p) {{ .reg .b64 %a, %b; .reg .b32 %t, %v;
    ld.param.u64 %a, [p]; mov.u32 %t, %tid.x; mul.wide.u32 %b, %t, {stride}; add.u64 %a, %a, %b;
    ld.global.u32 %v, [%a]; ret; }}"""
    counters = run_ptx(HEAD + body, "k", 1, 32, [torch.zeros(2048)])
    assert counters.read_sectors == counters.read_unique_sectors == sectors
    assert counters.read_bytes == 128 and counters.write_sectors == 0
    page = report("k", counters, floor_bytes=128)
    assert f"{32 * sectors / 128:.3f} of the floor" in page


def test_struct_argument_and_floats():
    body = """.visible .entry k(.param .align 4 .b8 s[8], .param .f32 f, .param .u64 p) {
    .reg .b32 %a, %b, %f; .reg .b64 %p; ld.param.u32 %a, [s]; ld.param.u32 %b, [s+4]; ld.param.f32 %f, [f];
    ld.param.u64 %p, [p]; st.global.v2.u32 [%p], {%a, %b}; st.global.f32 [%p+8], %f; ret; }"""
    out = torch.zeros(3, dtype=torch.int32)
    run_ptx(HEAD + body, "k", 1, 1, [struct.pack("<ii", 5, -6), 1.5, out])
    assert out.tolist() == [5, -6, struct.unpack("<i", struct.pack("<f", 1.5))[0]]
