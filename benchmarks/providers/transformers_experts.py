"""The experts implementations of Hugging Face transformers, on its own experts module."""

import torch

from benchmarks.providers.base import Layer, Provider, Run, module_missing

#: batched_mm copies two weight matrices for each token and expert; above this many bytes it only pages
_MAX_COPIED_BYTES = 2.2e9


class _Transformers(Provider):
    implementation = ""
    devices = ("cpu", "cuda")
    trains = True
    distribution = "transformers"

    def missing(self) -> str | None:
        return module_missing("transformers", "transformers")

    def prepare(self, layer: Layer) -> Run:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        # Mixtral's, Qwen's and DeepSeek's experts modules differ in nothing but their names
        config = Qwen3MoeConfig(
            hidden_size=layer.shape.hidden_size,
            moe_intermediate_size=layer.shape.intermediate_size,
            num_experts=layer.shape.num_experts,
            num_experts_per_tok=layer.shape.top_k,
        )
        config._experts_implementation = self.implementation
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config)
        experts.gate_up_proj, experts.down_proj = layer.gate_up_proj, layer.down_proj
        return lambda batch: experts(batch.hidden_states, batch.topk_ids, batch.topk_weights)


class TransformersEager(_Transformers):
    name = "transformers_eager"
    what = "experts_implementation='eager': a loop over experts"
    implementation = "eager"
    trains_by_default = False  # one step takes a minute: a full-size zero gradient for each expert


class TransformersBatchedMM(_Transformers):
    name = "transformers_batched_mm"
    what = "experts_implementation='batched_mm': a copy of the weights for each token and expert"
    implementation = "batched_mm"
    trains_by_default = False

    def unsuited(self, layer: Layer, num_tokens: int | None = None) -> str | None:
        copied = (num_tokens or 0) * layer.shape.top_k * layer.weight_bytes / layer.shape.num_experts
        return f"would copy {copied / 1e9:.1f} GB of weights in each call" if copied > _MAX_COPIED_BYTES else None


class TransformersGroupedMM(_Transformers):
    name = "transformers_grouped_mm"
    what = "experts_implementation='grouped_mm'"
    implementation = "grouped_mm"
