"""The formats of quantised weights in plain PyTorch: the specification.

A weight is the value of its code times the scale of its group; groups are runs of ``group_size`` inputs of one row::

    W[o, i] = VALUES[format][codes[o, i]] * scales[o, i // group_size]

======  ====  ==================================================  =====================================================
format  bits  value of a code                                     scales (float32, here and in what dequantises)
======  ====  ==================================================  =====================================================
int8    8     two's complement                                    max|w| / 127 of the group
int4    4     two's complement                                    max|w| / 7 of the group, rounded to bfloat16
fp8     8     e4m3: sign, 4 bits of exponent (bias 7), 3 of       max|w| / 448 of a block of 128 x 128
              mantissa; no infinities
mxfp4   4     e2m1: sign, 2 bits of exponent (bias 1), 1 of       2 ** (floor(log2 max|w|) - 2) of the group: a power
              mantissa                                            of two in [2 ** -127, 2 ** 127]
======  ====  ==================================================  =====================================================

A code is the nearest to ``w / scale``, ties to the even one, cut off at the largest; int8 and int4 are symmetric
(-127 … 127, -7 … 7). A group of zeros has the scale zero (mxfp4: the smallest) and codes of value zero.

Sources: e4m3 from arXiv 2209.05433; e2m1, its shared scales and their rule from the OCP Microscaling Formats
Specification 1.0, sections 5 and 6.
"""

import torch
from torch import Tensor

FP8_BLOCK = 128
_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}


def code_bits(format: str) -> int:
    return 8 if format in ("int8", "fp8") else 4


def values(format: str) -> Tensor:
    """The value of every code, float64: [256] or [16]. The two codes of e4m3 that are no number are NaN."""
    codes = torch.arange(2 ** code_bits(format))
    if format in ("int8", "int4"):
        return torch.where(codes < len(codes) // 2, codes, codes - len(codes)).double()
    mantissa_bits, bias = (3, 7) if format == "fp8" else (1, 1)
    magnitude = codes % (len(codes) // 2)
    mantissa = (magnitude % 2**mantissa_bits).double() / 2**mantissa_bits
    exponent = magnitude // 2**mantissa_bits
    value = torch.where(exponent == 0, mantissa, 1 + mantissa) * (exponent.clamp(min=1) - bias).double().exp2()
    if format == "fp8":
        value[magnitude == 127] = torch.nan
    return torch.where(codes < len(codes) // 2, value, -value)


def quantize(weights: Tensor, format: str, group_size: int) -> tuple[Tensor, Tensor]:
    """``weights`` [out, in] as codes [out, in] uint8 and scales [out, groups] float32."""
    out_features, in_features = weights.shape
    weights = weights.double()
    num_groups = -(-in_features // group_size)
    padded = weights.new_zeros(out_features, num_groups * group_size)
    padded[:, :in_features] = weights
    largest = padded.view(out_features, num_groups, group_size).abs().amax(2)
    if format == "mxfp4":
        scales = (largest.log2().floor() - 2).clamp(-127, 127).exp2().float()
    else:
        if format == "fp8":
            for begin in range(0, out_features, FP8_BLOCK):
                block = largest[begin : begin + FP8_BLOCK]
                block.copy_(block.amax(0).expand_as(block))
        scales = (largest / _LARGEST[format]).float()
        if format == "int4":
            scales = scales.bfloat16().float()
    scaled = weights / _expand(scales.double(), group_size, in_features)
    scaled = torch.where(scaled.isfinite(), scaled, 0.0)  # the scale is zero: so are the weights, or they round to it
    if format in ("int8", "int4"):
        largest_code = int(_LARGEST[format])
        codes = scaled.round().clamp(-largest_code, largest_code).long() & (2 ** code_bits(format) - 1)
    else:
        codes = _nearest(scaled, values(format))
    return codes.to(torch.uint8), scales


def dequantize(codes: Tensor, scales: Tensor, format: str, group_size: int, dtype: torch.dtype) -> Tensor:
    """[out, in] in ``dtype``: the product of value and scale in float64, rounded once."""
    table = values(format).to(codes.device)
    return (table[codes.long()] * _expand(scales.double(), group_size, codes.shape[1])).to(dtype)


def _expand(scales: Tensor, group_size: int, in_features: int) -> Tensor:
    return scales.repeat_interleave(group_size, 1)[:, :in_features]


def _nearest(scaled: Tensor, table: Tensor) -> Tensor:
    """The code of the nearest value, of the even one where two are as near; beyond the largest, the largest."""
    positive = table[: len(table) // 2]
    positive = positive[positive.isfinite()]
    between = (positive[1:] + positive[:-1]) / 2
    magnitude = scaled.abs()
    code = torch.searchsorted(between, magnitude)  # a tie goes to the lower one …
    tie = (code < len(between)) & (between[code.clamp(max=len(between) - 1)] == magnitude)
    code = torch.where(tie & (code % 2 == 1), code + 1, code)  # … unless the upper one is even
    return torch.where(scaled.signbit(), code + len(table) // 2, code)
