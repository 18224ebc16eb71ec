"""Quantised expert weights: their bytes, and what may be asked of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_kernels._checks import value_error
from moe_kernels.ops.quantize import reference

#: in the order of QuantizedFormat in csrc/microkernels/quantized.h
FORMATS = ("int8", "int4", "fp8", "mxfp4")
#: rows of a panel: kQuantizedPanel there
_PANEL = 32
_MAGIC, _VERSION, _HEADER_BYTES = 0x4D4F45515741, 1, 64


@dataclass(frozen=True)
class QuantizedWeights:
    """Result of :func:`moe_kernels.quantize`; give it wherever an op takes ``expert_weights``. Frozen: no gradient.

    ``data`` says everything about itself, so a checkpoint needs nothing else: :meth:`from_bytes` makes the rest again.
    One layout serves every instruction set, and experts are rows: ``data[3:5]`` holds two of them. A row is::

        header   8 int64: magic, version (1), format, group_size, num_splits, interleaved, out, in
        panels   for each split (gate, up), for each 32 rows of it, for each group of ``group_size`` inputs:
                 32 scales (float32 beside codes of 8 bits, bfloat16 beside those of 4), then words of 32 bits, one for
                 each row in turn; a word holds the next 4 or 8 codes of its row, in its low half the first, third, …,
                 in its high half the others, each from the lowest bits up

    and zero where a matrix does not fill a panel or a word. Rows beyond the last input count for nothing.

    Attributes:
        data: [num_experts, expert_bytes] uint8.
        shape: [num_experts, out, in] of the weights.
        format: one of :data:`FORMATS`; :mod:`.reference` defines them.
        group_size: inputs that share a scale.
        num_splits: 2 where gate and up rows are held apart (a gated expert's gate_up_proj), else 1.
        interleaved: whether gate and up rows alternated.
    """

    data: Tensor
    shape: tuple[int, int, int]
    format: str
    group_size: int
    num_splits: int
    interleaved: bool

    @property
    def device(self):
        return self.data.device

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        """Memory in bytes; the original weights are not needed beside it."""
        return self.data.numel()

    @staticmethod
    def from_bytes(data: Tensor) -> "QuantizedWeights":
        """The weights that ``data`` holds.

        Raises:
            ValueError: it was not made by this library, by another version of the layout, or is not whole.
        """
        op, argument = "QuantizedWeights", "data"
        if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[0] == 0 or data.shape[1] < _HEADER_BYTES:
            raise value_error(
                op, argument, "[num_experts, expert_bytes] uint8", f"{list(data.shape)} {data.dtype}", "call quantize"
            )
        headers = data[:, :_HEADER_BYTES].contiguous().view(torch.int64)
        if not torch.equal(headers, headers[:1].expand_as(headers)):
            raise value_error(op, argument, "of one shape and format for all experts", "experts that differ")
        magic, version, format_id, group_size, num_splits, interleaved, out, in_features = headers[0].tolist()
        if magic != _MAGIC or version != _VERSION:
            actual = f"version {version}" if magic == _MAGIC else "other bytes"
            raise value_error(op, argument, f"of layout version {_VERSION}", actual, "call quantize again")
        fits = 0 <= format_id < len(FORMATS) and group_size > 0 and num_splits in (1, 2) and out >= 0 <= in_features
        fits = fits and out % num_splits == 0 and (group_size % 8 == 0 or group_size >= in_features)
        if not fits or data.shape[1] != expert_bytes(FORMATS[format_id], group_size, num_splits, out, in_features):
            raise value_error(op, argument, "as long as its header says", f"{data.shape[1]} bytes an expert")
        shape = (data.shape[0], out, in_features)
        return QuantizedWeights(data, shape, FORMATS[format_id], group_size, num_splits, bool(interleaved))

    def codes_and_scales(self, expert: int) -> tuple[Tensor, Tensor]:
        """Of one expert: codes [out, in] uint8, a code in each byte, and scales [out, groups] float32."""
        _, out, in_features = self.shape
        rows, panels, words, spans = _sizes(self.format, self.group_size, self.num_splits, out, in_features)
        body = self.data[expert, _HEADER_BYTES:].view(self.num_splits, panels, -1)
        scale_dtype, code_spans = _scale_dtype(self.format), []
        scales = torch.empty(self.num_splits, panels, _PANEL, len(spans), device=self.device)
        for group, (begin, middle, end) in enumerate(spans):
            scales[..., group] = body[:, :, begin:middle].contiguous().view(scale_dtype)
            code_spans.append(body[:, :, middle:end])
        packed = torch.cat([*code_spans, body[:, :, :0]], 2).view(self.num_splits, panels, words, _PANEL, 4)
        packed = packed.permute(0, 1, 3, 2, 4).reshape(self.num_splits, panels * _PANEL, words * 4)[:, :rows]
        if reference.code_bits(self.format) == 4:
            packed = torch.stack((packed & 15, packed >> 4), 3).flatten(2)
        # a word's low half holds its even codes
        half = 16 // reference.code_bits(self.format)
        packed = packed.reshape(*packed.shape[:2], words, 2, half).transpose(3, 4).flatten(2)
        codes = self._restore_order(packed[:, :, :in_features])
        return codes, self._restore_order(scales.view(self.num_splits, panels * _PANEL, -1)[:, :rows])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[num_experts, out, in] in ``dtype``: value times scale, rounded once."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        for expert in range(self.shape[0]):
            codes, scales = self.codes_and_scales(expert)
            out[expert] = reference.dequantize(codes, scales, self.format, self.group_size, dtype)
        return out

    def _restore_order(self, split_rows: Tensor) -> Tensor:
        """[num_splits, rows, n] to [out, n]."""
        return (split_rows.transpose(0, 1) if self.interleaved else split_rows).reshape(self.shape[1], -1)


def expert_bytes(format: str, group_size: int, num_splits: int, out: int, in_features: int) -> int:
    """Bytes of one expert, the header included."""
    words, groups = -(-in_features // (32 // reference.code_bits(format))), -(-in_features // group_size)
    row_bytes = 4 * words + groups * _scale_dtype(format).itemsize
    return _HEADER_BYTES + num_splits * -(-out // num_splits // _PANEL) * _PANEL * row_bytes


def pack(
    codes: Tensor, scales: Tensor, format: str, group_size: int, num_splits: int, interleaved: bool, row: Tensor
) -> None:
    """Writes one expert's codes [out, in] and scales [out, groups] into its row of ``data``."""
    out, in_features = codes.shape
    rows, panels, words, spans = _sizes(format, group_size, num_splits, out, in_features)

    def in_panels(tensor: Tensor, width: int) -> Tensor:
        split = tensor.view(rows, num_splits, -1).transpose(0, 1) if interleaved else tensor.view(num_splits, rows, -1)
        padded = tensor.new_zeros(num_splits, panels * _PANEL, width)
        padded[:, :rows, : split.shape[2]] = split
        return padded.view(num_splits, panels, _PANEL, width)

    half = 16 // reference.code_bits(format)
    # a word's low half holds its even codes
    packed = in_panels(codes, 2 * half * words)
    packed = packed.view(*packed.shape[:3], words, half, 2).transpose(4, 5).flatten(3)
    if reference.code_bits(format) == 4:
        packed = packed[..., 0::2] | packed[..., 1::2] << 4
    packed = packed.view(num_splits, panels, _PANEL, words, 4).transpose(2, 3).reshape(num_splits, panels, -1)
    scales = in_panels(scales, len(spans)).to(_scale_dtype(format))
    header = [_MAGIC, _VERSION, FORMATS.index(format), group_size, num_splits, int(interleaved), out, in_features]
    row[:_HEADER_BYTES] = torch.tensor(header, dtype=torch.int64).view(torch.uint8)
    body = row[_HEADER_BYTES:].view(num_splits, panels, -1)
    at = 0
    for group, (begin, middle, end) in enumerate(spans):
        body[:, :, begin:middle] = scales[..., group].contiguous().view(torch.uint8)
        body[:, :, middle:end] = packed[:, :, at : at + end - middle]
        at += end - middle


def _scale_dtype(format: str) -> torch.dtype:
    return torch.float32 if reference.code_bits(format) == 8 else torch.bfloat16


def _sizes(format: str, group_size: int, num_splits: int, out: int, in_features: int):
    """Rows and panels of a split, words of a row, and for each group where in a panel its scales and its words lie."""
    codes, scale_bytes = 32 // reference.code_bits(format), _scale_dtype(format).itemsize
    rows = out // num_splits
    spans, at = [], 0
    for begin in range(0, in_features, group_size):
        words = -(-min(group_size, in_features - begin) // codes)
        spans.append((at, at + _PANEL * scale_bytes, at + _PANEL * (scale_bytes + 4 * words)))
        at = spans[-1][2]
    return rows, -(-rows // _PANEL), -(-in_features // codes), spans
