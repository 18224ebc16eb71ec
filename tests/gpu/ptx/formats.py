"""Number formats of PTX as numpy arrays, and rounding to them.

Narrow formats are computed in float64 with rounding to odd, so that the second rounding cannot go wrong; bf16, e4m3 and
e5m2, which numpy lacks, travel as their bits.

Source of rounding to odd: S. Boldo and G. Melquiond, "Emulation of FMA and correctly rounded sums" (2008).
"""

from __future__ import annotations

import numpy as np

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I32, I64, F16, F32, F64 = np.int32, np.int64, np.float16, np.float32, np.float64

STORAGE = {1: U8, 2: U16, 4: U32, 8: U64}
DTYPE = {
    "pred": np.bool_, "b8": U8, "u8": U8, "s8": np.int8, "e4m3": U8, "e5m2": U8, "b16": U16, "u16": U16,
    "s16": np.int16, "f16": F16, "bf16": U16, "e4m3x2": U16, "e5m2x2": U16, "b32": U32, "u32": U32, "s32": I32,
    "f32": F32, "tf32": F32, "f16x2": U32, "bf16x2": U32, "b64": U64, "u64": U64, "s64": I64, "f64": F64, "f32x2": U64,
}  # fmt: skip
FLOATS = {"f16", "bf16", "f32", "f64"}
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32", "u16x2": "u16", "s16x2": "s16"}


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(U32) << U32(16)).view(F32)


def two_sum(a, b):
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def odd64(value, error):
    """``value + error`` rounded to odd, where ``value`` is its nearest float64."""
    value = np.asarray(value, F64)
    bits = value.view(I64)
    inexact = (error != 0) & np.isfinite(value) & np.isfinite(error) & (bits & 1 == 0)
    away = (error > 0) == (value >= 0)
    return np.where(inexact, bits + np.where(away, 1, -1), bits).view(F64)


def odd32(value) -> np.ndarray:
    """float64 to float32, rounded to odd."""
    value = np.asarray(value, F64)
    near = value.astype(F32)
    error = value - near.astype(F64)
    bits = near.view(I32)
    inexact = (error != 0) & np.isfinite(near) & (bits & 1 == 0)
    away = (error > 0) == (value >= 0)
    return np.where(inexact, bits + np.where(away, 1, -1).astype(I32), bits).view(F32)


def _directed(near, value, mode):
    """Moves ``near``, the nearest of ``value``, by one unit where the mode asks for it."""
    if mode == "rn":
        return near
    wide = near.astype(F64)
    if mode == "rz":
        wrong, goal = np.abs(wide) > np.abs(value), np.zeros_like(near)
    elif mode == "rm":
        wrong, goal = wide > value, np.full_like(near, -np.inf)
    else:
        wrong, goal = wide < value, np.full_like(near, np.inf)
    return np.where(wrong, np.nextafter(near, goal), near)


def f32_to_bf16(value, mode: str = "rn") -> np.ndarray:
    value = np.asarray(value, F32)
    bits = value.view(U32)
    if mode == "rn":
        bits = bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))
    return np.where(np.isnan(value), U16(0x7FFF), (bits >> U32(16)).astype(U16))


def narrow(value, type_: str, mode: str = "rn"):
    """float64 (rounded to odd where it was inexact) to the register's form of ``type_``."""
    value = np.asarray(value, F64)
    if type_ == "f64":
        return value
    if type_ == "f32":
        return _directed(value.astype(F32), value, mode)
    if type_ == "f16":
        return _directed(value.astype(F16), value, mode)
    if type_ == "bf16":
        return f32_to_bf16(odd32(value), mode)
    raise KeyError(type_)


def widen(raw, type_: str) -> np.ndarray:
    """The register's form to float64."""
    if type_ == "bf16":
        return bf16_to_f32(raw).astype(F64)
    if type_ in FP8_TABLES:
        return FP8_TABLES[type_][raw]
    return np.asarray(raw).astype(F64)


def fma(a, b, c, type_: str):
    """``a * b + c`` in float64, rounded to odd; exact in the product for every type narrower than float64."""
    product = a * b
    total, error = two_sum(product, c)
    if type_ == "f64":
        split = F64(134217729.0)
        high_a, high_b = a * split - (a * split - a), b * split - (b * split - b)
        low_a, low_b = a - high_a, b - high_b
        tail = ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b
        exact = total + (error + tail)
        return np.where(np.isfinite(exact), exact, total)
    return odd64(total, error)


def flush(value):
    """Subnormal float32 to zero of the same sign."""
    return np.where(np.abs(value) < F32(1.1754944e-38), np.copysign(F32(0), value), value)


def _fp8_table(exponent_bits: int, mantissa_bits: int, has_infinity: bool) -> np.ndarray:
    bias = (1 << (exponent_bits - 1)) - 1
    table = np.zeros(256)
    for code in range(256):
        exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
        mantissa = code & ((1 << mantissa_bits) - 1)
        if exponent == 0:
            value = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        if exponent == (1 << exponent_bits) - 1:
            if has_infinity:
                value = np.nan if mantissa else np.inf
            elif mantissa == (1 << mantissa_bits) - 1:
                value = np.nan
        table[code] = -value if code & 0x80 else value
    return table


FP8_TABLES = {"e4m3": _fp8_table(4, 3, False), "e5m2": _fp8_table(5, 2, True)}


def to_fp8(value, type_: str) -> np.ndarray:
    """Nearest even, saturating to the largest finite value (PTX has no other mode from float32)."""
    value = np.asarray(value, F64)
    table = FP8_TABLES[type_][:128]
    finite = table[np.isfinite(table)]
    size = np.minimum(np.abs(value), finite[-1])
    high = np.clip(np.searchsorted(finite, size), 0, len(finite) - 1)
    low = np.maximum(high - 1, 0)
    above, below = finite[high] - size, size - finite[low]
    code = np.where(
        finite[high] == size, high, np.where((below < above) | ((below == above) & (low % 2 == 0)), low, high)
    )
    code = code.astype(U8) | np.where(np.signbit(value), U8(0x80), U8(0))
    return np.where(np.isnan(value), U8(0x7F), code).astype(U8)
