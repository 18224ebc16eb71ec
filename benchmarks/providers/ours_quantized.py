"""moe_kernels: expert weights quantised by moe_kernels.quantize."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.providers.base import Batch, Layer
from benchmarks.providers.ours import Ours
from moe_kernels import QuantizedWeights, expert_ffn, quantize


@dataclass(frozen=True)
class QuantizedRun:
    """What is timed, and the weights that it reads."""

    gate_up_proj: QuantizedWeights
    down_proj: QuantizedWeights

    def __call__(self, batch: Batch) -> Tensor:
        weights = self.gate_up_proj, self.down_proj
        return expert_ffn(batch.hidden_states, batch.topk_ids, batch.topk_weights, *weights)

    def of_expert(self) -> list:
        """For each of the two, [1, out, in] of an expert in a dtype."""

        def dequantized(weights: QuantizedWeights, expert: int, dtype: torch.dtype) -> Tensor:
            return QuantizedWeights.from_bytes(weights.data[expert : expert + 1]).dequantize(dtype)

        return [
            lambda expert, dtype, weights=weights: dequantized(weights, expert, dtype)
            for weights in (self.gate_up_proj, self.down_proj)
        ]


class OursQuantized(Ours):
    trains = False

    def __init__(self, format: str, group_size: int | None = None):
        groups = "" if group_size is None else f" in groups of {group_size}"
        self.name = f"ours_{format}" + ("" if group_size is None else f"_{group_size}")
        self.what = f"moe_kernels.expert_ffn on weights quantised to {format}{groups}"
        self.options = {"format": format, "group_size": group_size}
        self.copies = 0.5 if format in ("int8", "fp8") else 0.28

    def prepare(self, layer: Layer) -> QuantizedRun:
        gate_up_proj = quantize(layer.gate_up_proj.detach(), num_splits=2, **self.options)
        return QuantizedRun(gate_up_proj, quantize(layer.down_proj.detach(), **self.options))
