"""Arithmetic and logic.

Approximate functions (``ex2.approx``, ``rcp.approx``, …) are computed in float64 and rounded once: better than any
device, so a result that needs their exact bits is not proven here.

Source: PTX ISA 9.0, chapter 9.7.1 to 9.7.9.
"""

from __future__ import annotations

import numpy as np

from .compiler import operation
from .formats import (
    DTYPE,
    FLOATS,
    I64,
    PACKED,
    STORAGE,
    U32,
    U64,
    flush,
    fma,
    narrow,
    odd64,
    two_sum,
    widen,
)  # fmt: skip
from .parser import TYPE_SIZE, Instruction, PtxError


def rounding(ins: Instruction) -> str:
    return next((flag for flag in ("rz", "rm", "rp") if flag in ins.flags), "rn")


def signed(type_: str) -> bool:
    return type_.startswith("s")


def bits_of(type_: str) -> int:
    return 8 * TYPE_SIZE[type_]


def saturate(value):
    return np.clip(np.where(np.isnan(value), 0.0, value), 0.0, 1.0)


def float_function(function, arity: int, type_: str, ins: Instruction):
    """Wraps ``function`` on float64 arrays into one on the registers' form of ``type_``, packed types included."""
    lane = PACKED.get(type_, type_)
    mode, ftz = rounding(ins), "ftz" in ins.flags and lane == "f32"
    saturates, relu = "sat" in ins.flags, "relu" in ins.flags

    def scalar(*raw):
        wide = [widen(flush(value) if ftz else value, lane) for value in raw]
        result = function(*wide)
        if saturates:
            result = saturate(result)
        if relu:
            result = np.where(result > 0, result, np.where(np.isnan(result), result, 0.0))
        result = narrow(result, lane, mode)
        return flush(result) if ftz else result

    if type_ == lane:
        return scalar
    size, packed = TYPE_SIZE[lane], STORAGE[TYPE_SIZE[type_]]

    def both(*raw):
        out = None
        for half in range(2):
            shift = packed(8 * size * half)
            parts = [np.atleast_1d((value >> shift).astype(STORAGE[size])).view(DTYPE[lane]) for value in raw]
            piece = np.asarray(scalar(*parts)).view(STORAGE[size]).astype(packed) << shift
            out = piece if out is None else out | piece
        return out

    return both


def _plain_float(ins: Instruction, type_: str) -> bool:
    """Whether numpy's own float32 or float64 operation is the instruction."""
    return type_ in ("f32", "f64") and rounding(ins) == "rn" and not ins.has("ftz", "sat", "relu")


def _nary(ins, c, function, type_, result_type=None):
    sources = [c.read(operand, type_) for operand in ins.operands[1:]]
    target = c.write(ins.operands[0], result_type or type_)
    if len(sources) == 1:
        (a,) = sources
        return lambda m, i: target(m, i, function(a(m, i)))
    if len(sources) == 2:
        a, b = sources
        return lambda m, i: target(m, i, function(a(m, i), b(m, i)))
    return lambda m, i: target(m, i, function(*[source(m, i) for source in sources]))


def _sum64(a, b):
    return odd64(*two_sum(a, b))


def _quotient(a, b):
    q = a / b
    remainder = fma(-q, b, a, "f64")
    return odd64(q, np.where(np.isfinite(q) & (b != 0), remainder / np.where(b == 0, 1.0, b), 0.0))


@operation("add", "sub", "mul")
def build_arithmetic(ins, c):
    type_ = ins.types[-1]
    if ins.has("cc"):
        return _carry(ins, c)
    if type_ in FLOATS or type_ in PACKED:
        if len(ins.types) == 2 and ins.types[0] != type_:  # add.f32.bf16: a narrow operand
            raise PtxError(f"line {ins.line}: mixed precision {ins.opcode} is not read by this bench")
        plain = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[ins.name]
        if _plain_float(ins, type_):
            return _nary(ins, c, plain, type_)
        wide = {"add": _sum64, "sub": lambda a, b: _sum64(a, -b), "mul": np.multiply}[ins.name]
        return _nary(ins, c, float_function(wide, 2, type_, ins), type_)
    if ins.name == "mul" and not ins.has("lo"):
        return _nary(ins, c, *_multiply(ins, type_))
    if ins.has("sat"):
        low, high = I64(-(1 << 31)), I64((1 << 31) - 1)
        plain = np.add if ins.name == "add" else np.subtract
        saturated = lambda a, b: np.clip(plain(a.astype(I64), b.astype(I64)), low, high).astype(np.int32)  # noqa: E731
        return _nary(ins, c, saturated, type_)
    plain = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[ins.name]
    return _nary(ins, c, plain, "u" + type_[1:])


def _multiply(ins, type_):
    """``mul.hi``, ``mul.wide``, ``mul24``: function, operand type, result type."""
    bits = bits_of(type_)
    wide = (np.int64 if signed(type_) else U64) if bits == 32 else (np.int32 if signed(type_) else U32)
    if ins.has("wide"):
        return lambda a, b: a.astype(wide) * b.astype(wide), type_, f"{type_[0]}{2 * bits}"
    if bits < 64:
        dtype = DTYPE[type_]
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(dtype), type_
    if signed(type_):
        high = lambda a, b: (  # noqa: E731
            _high64(a.view(U64), b.view(U64))
            - np.where(a < 0, b.view(U64), U64(0))
            - np.where(b < 0, a.view(U64), U64(0))
        ).view(I64)
        return high, type_
    return _high64, type_


def _high64(a, b):
    mask, half = U64(0xFFFFFFFF), U64(32)
    al, ah, bl, bh = a & mask, a >> half, b & mask, b >> half
    middle = ah * bl + ((al * bl) >> half)
    other = al * bh + (middle & mask)
    return ah * bh + (middle >> half) + (other >> half)


@operation("mad", "fma", "mul24", "mad24")
def build_mad(ins, c):
    type_ = ins.types[-1]
    if type_ in FLOATS or type_ in PACKED:
        lane = PACKED.get(type_, type_)
        return _nary(ins, c, float_function(lambda x, y, z: fma(x, y, z, lane), 3, type_, ins), type_)
    if ins.name.endswith("24"):
        if ins.has("hi"):
            raise PtxError(f"line {ins.line}: {ins.opcode} is not read by this bench")
        low = U32(0xFFFFFF)
        if signed(type_):
            cut = lambda a: ((a << U32(8)).view(np.int32) >> np.int32(8)).view(U32)  # noqa: E731
        else:
            cut = lambda a: a & low  # noqa: E731
        if ins.name == "mul24":
            return _nary(ins, c, lambda a, b: cut(a) * cut(b), "u32")
        return _nary(ins, c, lambda a, b, d: cut(a) * cut(b) + d, "u32")
    a, b = c.read(ins.operands[1], type_), c.read(ins.operands[2], type_)
    if ins.has("lo"):
        unsigned = "u" + type_[1:]
        return _nary(ins, c, lambda x, y, z: x * y + z, unsigned)
    product, _, *wider = _multiply(ins, type_)
    result = wider[0] if wider else type_
    d, target = c.read(ins.operands[3], result), c.write(ins.operands[0], result)
    return lambda m, i: target(m, i, product(a(m, i), b(m, i)) + d(m, i))


@operation("addc", "subc", "madc")
def build_carry(ins, c):
    return _carry(ins, c)


def _carry(ins, c):
    """32-bit and 64-bit sums with the carry flag, which each thread keeps beside its registers."""
    type_ = "u" + ins.types[-1][1:]
    dtype, use, keep = DTYPE[type_], ins.name.endswith("c"), "cc" in ins.flags
    sources = [c.read(operand, type_) for operand in ins.operands[1:]]
    target = c.write(ins.operands[0], type_)
    if ins.name.startswith("mad") or ins.name == "mul":
        raise PtxError(f"line {ins.line}: {ins.opcode} is not read by this bench")
    subtract = ins.name.startswith("sub")

    def run(m, i):
        a, b = (np.broadcast_to(source(m, i), m.count(i)) for source in sources)
        old = m.carry[i].astype(dtype) if use else dtype(0)
        if subtract:
            result = a - b - old
            flag = (a < b) | ((a == b) & (old != 0))
        else:
            result = a + b + old
            flag = (result < a) | ((old != 0) & (result == a))
        target(m, i, result)
        if keep:
            m.carry[i] = flag

    return run


@operation("div", "rem")
def build_divide(ins, c):
    type_ = ins.types[-1]
    if type_ in FLOATS:
        if _plain_float(ins, type_):
            return _nary(ins, c, np.divide, type_)
        return _nary(ins, c, float_function(_quotient, 2, type_, ins), type_)

    def run(a, b):
        zero = b == 0
        safe = np.where(zero, b.dtype.type(1), b)
        if signed(type_):
            quotient = a // safe
            rest = a - quotient * safe  # numpy rounds down, PTX toward zero
            quotient = quotient + ((rest != 0) & ((a < 0) != (safe < 0)))
        else:
            quotient = a // safe
        result = quotient if ins.name == "div" else a - quotient * safe
        # a division by zero gives all ones on the devices
        return np.where(zero, a if ins.name == "rem" else ~np.zeros_like(result), result)

    return _nary(ins, c, lambda a, b: run(*np.broadcast_arrays(a, b)), type_)


@operation("abs", "neg")
def build_sign(ins, c):
    type_ = ins.types[-1]
    if type_ in FLOATS or type_ in PACKED:
        bits = bits_of(type_)
        lane_bits = bits_of(PACKED.get(type_, type_))
        sign = sum(1 << (at + lane_bits - 1) for at in range(0, bits, lane_bits))
        dtype = STORAGE[bits // 8]
        if ins.name == "abs":
            function = lambda a: a & dtype(~sign & ((1 << bits) - 1))  # noqa: E731
        else:
            function = lambda a: a ^ dtype(sign)  # noqa: E731
        plain = _nary(ins, c, function, f"b{bits}")
        if "ftz" not in ins.flags:
            return plain
        source, target = c.read(ins.operands[1], type_), c.write(ins.operands[0], type_)
        sign_function = np.abs if ins.name == "abs" else np.negative
        return lambda m, i: target(m, i, flush(sign_function(source(m, i))))
    return _nary(ins, c, np.abs if ins.name == "abs" else np.negative, type_)


@operation("min", "max")
def build_extreme(ins, c):
    type_ = ins.types[-1]
    smallest = ins.name == "min"
    if type_ in FLOATS or type_ in PACKED:
        if "NaN" in ins.flags:
            plain = np.minimum if smallest else np.maximum
        else:
            plain = np.fmin if smallest else np.fmax

        def ordered(*values):
            result = values[0]
            for other in values[1:]:
                both_zero = (result == 0) & (other == 0)
                zero = np.where(np.signbit(result) | np.signbit(other), -0.0, 0.0)
                if not smallest:
                    zero = np.where(np.signbit(result) & np.signbit(other), -0.0, 0.0)
                result = np.where(both_zero, zero, plain(result, other))
            return result

        return _nary(ins, c, float_function(ordered, 2, type_, ins), type_)
    return _nary(ins, c, np.minimum if smallest else np.maximum, type_)


_UNARY = {
    "rcp": lambda a: 1.0 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1.0 / np.sqrt(a),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@operation(*_UNARY)
def build_function(ins, c):
    type_ = ins.types[-1]
    return _nary(ins, c, float_function(_UNARY[ins.name], 1, type_, ins), type_)


@operation("copysign")
def build_copysign(ins, c):
    return _nary(ins, c, lambda a, b: np.copysign(b, a), ins.types[-1])


# --- logic ------------------------------------------------------------------------------------------------------
@operation("and", "or", "xor", "not", "cnot")
def build_logic(ins, c):
    function = {
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
        "cnot": lambda a: (a == 0).astype(a.dtype),
    }[ins.name]  # fmt: skip
    return _nary(ins, c, function, ins.types[-1])


@operation("lop3")
def build_lop3(ins, c):
    *sources, table = ins.operands[1:5]
    a, b, d = (c.read(source, "b32") for source in sources)
    target = c.write(ins.operands[0], "b32")
    terms = [term for term in range(8) if table.value >> term & 1]

    def run(m, i):
        values = [a(m, i), b(m, i), d(m, i)]
        result = np.zeros(m.count(i), U32)
        for term in terms:
            part = U32(0xFFFFFFFF)
            for value, bit in zip(values, (4, 2, 1), strict=True):
                part = part & (value if term & bit else ~value)
            result |= part
        target(m, i, result)

    return run


@operation("shl", "shr")
def build_shift(ins, c):
    type_ = ins.types[-1]
    bits, left = bits_of(type_), ins.name == "shl"
    a, amount = c.read(ins.operands[1], type_), c.read(ins.operands[2], "u32")
    target, dtype = c.write(ins.operands[0], type_), DTYPE[type_]

    def run(m, i):
        value, by = a(m, i), amount(m, i)
        shift = np.minimum(by, U32(bits - 1)).astype(dtype)
        if left:
            result = np.where(by >= bits, dtype(0), value << shift)
        elif signed(type_):
            result = value >> shift
        else:
            result = np.where(by >= bits, dtype(0), value >> shift)
        target(m, i, result)

    return run


@operation("shf")
def build_funnel(ins, c):
    wrap = "wrap" in ins.flags

    def run(low, high, by):
        by = (by & U32(31) if wrap else np.minimum(by, U32(32))).astype(U64)
        both = (high.astype(U64) << U64(32)) | low.astype(U64)
        if "l" in ins.flags:
            return ((both << by) >> U64(32)).astype(U32)
        return (both >> by).astype(U32)

    return _nary(ins, c, run, "b32")


@operation("prmt")
def build_permute_bytes(ins, c):
    a, b, selector = (c.read(source, "b32") for source in ins.operands[1:4])
    target = c.write(ins.operands[0], "b32")
    if ins.has("f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
        raise PtxError(f"line {ins.line}: {ins.opcode} is not read by this bench")

    def run(m, i):
        both = (b(m, i).astype(U64) << U64(32)) | a(m, i).astype(U64)
        select = selector(m, i).astype(U64)
        result = U32(0)
        for byte in range(4):
            code = (select >> U64(4 * byte)) & U64(15)
            value = (both >> ((code & U64(7)) * U64(8))) & U64(0xFF)
            value = np.where(code & U64(8), np.where(value & U64(0x80), U64(0xFF), U64(0)), value)
            result = result | (value.astype(U32) << U32(8 * byte))
        target(m, i, result)

    return run


@operation("bfe")
def build_extract(ins, c):
    type_ = ins.types[-1]
    bits = bits_of(type_)
    a, position, length = c.read(ins.operands[1], type_), *(c.read(o, "u32") for o in ins.operands[2:4])
    target, unsigned = c.write(ins.operands[0], type_), STORAGE[bits // 8]

    def run(m, i):
        value = a(m, i).view(unsigned).astype(U64)
        start, count = position(m, i) & U32(255), length(m, i) & U32(255)
        start64, count64 = np.minimum(start, 63).astype(U64), np.minimum(count, 63).astype(U64)
        mask = np.where(count >= 64, U64(0xFFFFFFFFFFFFFFFF), (U64(1) << count64) - U64(1))
        result = np.where(start >= bits, U64(0), value >> start64) & mask
        if signed(type_):
            top = np.minimum(start.astype(I64) + count - 1, bits - 1)
            sign = (value >> np.maximum(top, 0).astype(U64)) & U64(1)
            have = np.clip(bits - start.astype(I64), 0, np.minimum(count, bits))
            fill = np.where(have >= 64, U64(0), ~((U64(1) << np.minimum(have, 63).astype(U64)) - U64(1)))
            result = np.where((count > 0) & (sign == 1), result | fill, result)
        target(m, i, result.astype(unsigned))

    return run


@operation("bfi")
def build_insert(ins, c):
    type_ = ins.types[-1]
    bits = bits_of(type_)
    a, b = c.read(ins.operands[1], type_), c.read(ins.operands[2], type_)
    position, length = c.read(ins.operands[3], "u32"), c.read(ins.operands[4], "u32")
    target, dtype = c.write(ins.operands[0], type_), DTYPE[type_]

    def run(m, i):
        start, count = position(m, i) & U32(255), length(m, i) & U32(255)
        ones = np.where(count >= 64, U64(0xFFFFFFFFFFFFFFFF), (U64(1) << np.minimum(count, 63).astype(U64)) - U64(1))
        shift = np.minimum(start, 63).astype(U64)
        mask = np.where(start >= bits, U64(0), ones << shift)
        value = a(m, i).astype(U64) << shift
        target(m, i, ((value & mask) | (b(m, i).astype(U64) & ~mask)).astype(dtype))

    return run


@operation("bfind", "clz", "popc", "brev")
def build_bits(ins, c):
    type_ = ins.types[-1]
    bits = bits_of(type_)
    a = c.read(ins.operands[1], type_)
    target = c.write(ins.operands[0], type_ if ins.name == "brev" else "u32")

    def digits(value):
        raw = np.atleast_1d(np.ascontiguousarray(value)).view(STORAGE[bits // 8])
        return (raw[:, None] >> np.arange(bits - 1, -1, -1).astype(raw.dtype)) & raw.dtype.type(1)

    def run(m, i):
        value = np.broadcast_to(a(m, i), m.count(i))
        if ins.name == "bfind" and signed(type_):
            value = np.where(value < 0, ~value, value)
        digit = digits(value)
        if ins.name == "popc":
            result = digit.sum(1).astype(U32)
        elif ins.name == "brev":
            result = (digit << np.arange(bits).astype(digit.dtype)).sum(1, dtype=digit.dtype)
        else:
            leading = np.where(digit.any(1), digit.argmax(1), bits)
            if ins.name == "clz":
                result = leading.astype(U32)
            elif "shiftamt" in ins.flags:
                result = np.where(leading == bits, -1, leading).astype(np.int32).view(U32)
            else:
                result = np.where(leading == bits, -1, bits - 1 - leading).astype(np.int32).view(U32)
        target(m, i, result)

    return run


@operation("bmsk")
def build_mask(ins, c):
    def run(start, count):
        count = np.minimum(count, U32(32)).astype(U64)
        mask = ((U64(1) << count) - U64(1)) << np.minimum(start, U32(63)).astype(U64)
        return mask.astype(U32)

    return _nary(ins, c, run, "u32")


@operation("sad")
def build_sad(ins, c):
    return _nary(ins, c, lambda a, b, d: np.where(a < b, b - a, a - b) + d, ins.types[-1])


@operation("dp4a")
def build_dp4a(ins, c):
    kinds = [np.int8 if type_ == "s32" else np.uint8 for type_ in ins.types]
    sources = [c.read(operand, "b32") for operand in ins.operands[1:]]
    target = c.write(ins.operands[0], "b32")

    def run(m, i):
        a, b, total = (np.broadcast_to(source(m, i), m.count(i)).copy() for source in sources)
        products = a.view(kinds[0]).astype(I64).reshape(-1, 4) * b.view(kinds[1]).astype(I64).reshape(-1, 4)
        target(m, i, total + products.sum(1).astype(U32))

    return run
