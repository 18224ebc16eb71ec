"""moe_kernels: expert weights quantised by moe_kernels.quantize."""

from benchmarks.providers.base import Layer, Run
from benchmarks.providers.ours import Ours
from moe_kernels import QuantizedWeights, expert_ffn, quantize


class OursQuantized(Ours):
    trains = False

    def __init__(self, format: str, group_size: int | None = None):
        self.name = f"ours_{format}" + ("" if group_size is None else f"_{group_size}")
        self.what = f"moe_kernels.expert_ffn on weights quantised to {format}" + (
            "" if group_size is None else f" in groups of {group_size}"
        )
        self.options = {"format": format, "group_size": group_size}
        self.copies = 0.5 if format in ("int8", "fp8") else 0.28

    def unsuited(self, layer: Layer, num_tokens: int | None = None) -> str | None:
        group_size = self.options["group_size"] or {"int4": 32, "mxfp4": 32}.get(self.options["format"], 1)
        sizes = layer.shape.hidden_size, layer.shape.intermediate_size
        return f"groups of {group_size} do not divide {sizes}" if any(size % group_size for size in sizes) else None

    def weights(self, layer: Layer) -> tuple[QuantizedWeights, QuantizedWeights]:
        gate_up = quantize(layer.gate_up_proj.detach(), num_splits=2, **self.options)
        return gate_up, quantize(layer.down_proj.detach(), **self.options)

    def run_on(self, gate_up: QuantizedWeights, down: QuantizedWeights) -> Run:
        return lambda batch: expert_ffn(batch.hidden_states, batch.topk_ids, batch.topk_weights, gate_up, down)
