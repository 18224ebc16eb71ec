"""Comparison, selection, moves and conversions.

Source: PTX ISA 9.0, chapters 9.7.5 (comparison and selection) and 9.7.9 (mov, cvt).
"""

from __future__ import annotations

import numpy as np

from .alu import bits_of, rounding, saturate, signed
from .compiler import operation
from .formats import (
    DTYPE,
    F32,
    F64,
    FLOATS,
    I64,
    PACKED,
    STORAGE,
    U16,
    U32,
    U64,
    flush,
    narrow,
    odd64,
    to_fp8,
    widen,
)  # fmt: skip
from .parser import TYPE_SIZE, Imm, Pair, PtxError, Reg, Vec


def compare(operator: str, type_: str):
    """The comparison on the registers' form; ``u`` before a float comparison makes it true for NaN."""
    plain = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    }  # fmt: skip
    if type_ not in FLOATS:
        return plain[operator]
    unordered = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
    to_wide = (lambda a: widen(a, type_)) if type_ in ("bf16", "f16") else (lambda a: a)
    if operator == "num":
        function = lambda a, b: ~unordered(a, b)  # noqa: E731
    elif operator == "nan":
        function = unordered
    elif operator == "ne":
        function = lambda a, b: (a != b) & ~unordered(a, b)  # noqa: E731
    elif operator in plain and operator not in ("lo", "ls", "hi", "hs"):
        function = plain[operator]
    else:
        inner = plain[operator[:-1]]
        function = lambda a, b: inner(a, b) | unordered(a, b)  # noqa: E731
    return lambda a, b: function(to_wide(a), to_wide(b))


@operation("setp", "set")
def build_compare(ins, c):
    type_ = ins.types[-1]
    operator = ins.parts[1]
    combine = next((flag for flag in ins.parts[2:] if flag in ("and", "or", "xor")), None)
    packed = PACKED.get(type_) if type_ in ("f16x2", "bf16x2") else None
    if packed and ins.name == "set":
        raise PtxError(f"line {ins.line}: {ins.opcode} is not read by this bench")
    function = compare(operator, packed or type_)
    a, b = c.read(ins.operands[1], type_), c.read(ins.operands[2], type_)
    other = c.read(ins.operands[3], "pred") if combine else None
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, None: lambda x, _: x}[combine]
    ftz = "ftz" in ins.flags
    if ins.name == "setp":
        first, second = c.pair(ins.operands[0], "pred")
        has_second = isinstance(ins.operands[0], Pair)
    else:
        result_type = ins.types[0]
        first, second, has_second = c.write(ins.operands[0], result_type), None, False
        one = {"f32": F32(1.0)}.get(result_type, DTYPE[result_type](-1 if signed(result_type) else 0))
        if result_type not in ("f32", "s32"):
            one = ~DTYPE[result_type](0)

    def run(m, i):
        x, y = a(m, i), b(m, i)
        if ftz:
            x, y = flush(x), flush(y)
        extra = other(m, i) if combine else None
        if packed:
            half = lambda value, at: (value >> U32(16 * at)).astype(U16).view(DTYPE[packed])  # noqa: E731
            first(m, i, join(function(half(x, 0), half(y, 0)), extra))
            second(m, i, join(function(half(x, 1), half(y, 1)), extra))
            return
        result = function(x, y)
        if ins.name == "set":
            truth = join(result, extra)
            first(m, i, np.where(truth, one, one.dtype.type(0)))
            return
        first(m, i, join(result, extra))
        if has_second:
            second(m, i, join(~result, extra))

    return run


@operation("selp")
def build_select(ins, c):
    type_ = ins.types[-1]
    a, b = c.read(ins.operands[1], type_), c.read(ins.operands[2], type_)
    condition, target = c.read(ins.operands[3], "pred"), c.write(ins.operands[0], type_)
    return lambda m, i: target(m, i, np.where(condition(m, i), a(m, i), b(m, i)))


@operation("slct")
def build_select_sign(ins, c):
    type_, control = ins.types[0], ins.types[1]
    a, b = c.read(ins.operands[1], type_), c.read(ins.operands[2], type_)
    condition, target = c.read(ins.operands[3], control), c.write(ins.operands[0], type_)
    return lambda m, i: target(m, i, np.where(condition(m, i) >= 0, a(m, i), b(m, i)))


@operation("testp")
def build_test(ins, c):
    source, target = c.read(ins.operands[1], ins.types[-1]), c.write(ins.operands[0], "pred")
    tiny = 1.1754944e-38 if ins.types[-1] == "f32" else 2.2250738585072014e-308
    function = {
        "finite": np.isfinite, "infinite": np.isinf, "number": lambda a: ~np.isnan(a), "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < tiny),
    }[ins.parts[1]]  # fmt: skip
    return lambda m, i: target(m, i, function(source(m, i)))


# --- moves and conversions ----------------------------------------------------------------------------------------
@operation("mov")
def build_move(ins, c):
    type_ = ins.types[-1] if ins.types else "b64"
    source, target = ins.operands[1], ins.operands[0]
    if isinstance(target, Vec) and isinstance(source, (Reg, Imm)) and type_ == "b128":
        parts = [c.write(item, "b64") for item in target.items]
        slot = c.slots[source.name]
        return lambda m, i: [part(m, i, m.registers[slot][i][..., at]) for at, part in enumerate(parts)] and None
    if type_ == "b128":
        slot, parts = c.slots[target.name], [c.read(item, "b64") for item in source.items]

        def run(m, i):
            for at, part in enumerate(parts):
                m.registers[slot][i, at] = part(m, i)

        return run
    read, write = c.read(source, type_), c.write(target, type_)
    return lambda m, i: write(m, i, read(m, i))


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_FLOAT_PAIRS = {"bf16x2": "bf16", "f16x2": "f16", "e4m3x2": "e4m3", "e5m2x2": "e5m2"}


@operation("cvt")
def build_convert(ins, c):
    to, source = ins.types[-2], ins.types[-1]
    if to in _FLOAT_PAIRS:
        return _convert_pair(ins, c, to, source)
    a, target = c.read(ins.operands[1], source), c.write(ins.operands[0], to)
    ftz = "ftz" in ins.flags and source == "f32"
    integral = next((_ROUND[flag] for flag in _ROUND if flag in ins.flags), None)
    mode = rounding(ins)
    if to == "tf32":

        def to_tf32(value):  # ties away from zero, 10 bits of mantissa
            bits = np.asarray(value, F32).view(U32)
            extra = U32(0x1000) if "rna" in ins.flags else U32(0xFFF) + ((bits >> U32(13)) & U32(1))
            return np.where(np.isfinite(value), (bits + extra) & U32(0xFFFFE000), bits).view(F32)

        return lambda m, i: target(m, i, to_tf32(a(m, i)))
    if to in FLOATS:
        if source in FLOATS:

            def convert(value):
                wide = widen(flush(value) if ftz else value, source)
                wide = integral(wide) if integral else wide
                if "relu" in ins.flags:
                    wide = np.where(wide > 0, wide, np.where(np.isnan(wide), wide, 0.0))
                if "sat" in ins.flags:
                    wide = saturate(wide)
                return narrow(wide, to, mode)
        else:

            def convert(value):
                wide = value.astype(F64)
                if source in ("u64", "s64"):  # float64 cannot hold it: round the rest to odd
                    back = np.where(np.abs(wide) < 2.0**63, wide, 0).astype(I64).astype(value.dtype)
                    rest = np.where(np.abs(wide) < 2.0**63, (value - back).view(I64), 0).astype(F64)
                    wide = wide if to == "f64" else odd64(wide, rest)
                if "sat" in ins.flags:
                    wide = saturate(wide)
                return narrow(wide, to, mode)

        return lambda m, i: target(m, i, convert(a(m, i)))
    limits = np.iinfo(DTYPE[to])
    if source in FLOATS:

        def convert(value):
            wide = integral(widen(flush(value) if ftz else value, source))
            wide = np.where(np.isnan(wide), 0.0, wide)
            big, small = wide >= float(limits.max), wide <= float(limits.min)
            inside = np.where(big | small, 0.0, wide).astype(I64 if to != "u64" else U64).astype(DTYPE[to])
            return np.where(big, limits.max, np.where(small, limits.min, inside)).astype(DTYPE[to])

    elif "sat" in ins.flags:
        convert = lambda value: np.clip(  # noqa: E731
            value, *(max(limits.min, np.iinfo(value.dtype).min), min(limits.max, np.iinfo(value.dtype).max))
        ).astype(DTYPE[to])
    else:
        convert = lambda value: value.astype(DTYPE[to])  # noqa: E731
    return lambda m, i: target(m, i, convert(a(m, i)))


def _convert_pair(ins, c, to, source):
    """Two values to one register: ``{first operand in the upper half, second in the lower}``, or a packed fp8 pair."""
    lane = _FLOAT_PAIRS[to]
    target = c.write(ins.operands[0], to)
    relu = "relu" in ins.flags

    def one(wide):
        if relu:
            wide = np.where(wide > 0, wide, np.where(np.isnan(wide), wide, 0.0))
        if lane.startswith("e"):
            return to_fp8(wide, lane)
        return np.asarray(narrow(wide, lane, rounding(ins))).view(U16)

    size = TYPE_SIZE[lane]
    packed = STORAGE[2 * size]
    if len(ins.operands) == 3:
        upper, lower = c.read(ins.operands[1], source), c.read(ins.operands[2], source)
        halves = lambda m, i: (widen(upper(m, i), source), widen(lower(m, i), source))  # noqa: E731
    else:
        inner = _FLOAT_PAIRS[source]
        read, inner_size = c.read(ins.operands[1], f"b{bits_of(source)}"), TYPE_SIZE[inner]

        def halves(m, i):
            value = read(m, i)
            low = value.astype(STORAGE[inner_size]).view(DTYPE[inner])
            high = (value >> value.dtype.type(8 * inner_size)).astype(STORAGE[inner_size]).view(DTYPE[inner])
            return widen(high, inner), widen(low, inner)

    def run(m, i):
        high, low = halves(m, i)
        target(m, i, (one(high).astype(packed) << packed(8 * size)) | one(low).astype(packed))

    return run
