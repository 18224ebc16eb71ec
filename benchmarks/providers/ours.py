"""moe_kernels: the plain layout of transformers, and prepacked copies."""

from benchmarks.providers.base import Layer, Provider, Run
from moe_kernels import _dispatch, expert_ffn, prepack


class Ours(Provider):
    name = "ours"
    what = "moe_kernels.expert_ffn on the weights as transformers stores them"
    ours = True
    trains = True
    distribution = "moe-kernels-torch"

    def unsuited(self, layer: Layer, num_tokens: int | None = None) -> str | None:
        if layer.gate_up_proj.requires_grad and self.version() == "reference" and layer.weight_bytes > 1 << 26:
            # autograd adds a zero gradient of the size of all experts for each expert that is used
            return "the reference's backward takes minutes at this size and the native kernels are not there"
        return None

    def prepare(self, layer: Layer) -> Run:
        gate_up_proj, down_proj = layer.gate_up_proj, layer.down_proj

        def run(batch):
            return expert_ffn(batch.hidden_states, batch.topk_ids, batch.topk_weights, gate_up_proj, down_proj)

        return run

    def version(self) -> str:
        return _dispatch.resolve("expert_ffn", "auto", "cpu")


class OursPrepacked(Ours):
    name = "ours_prepacked"
    what = "moe_kernels.expert_ffn on moe_kernels.prepack() copies"
    trains = False
    copies = 1.0

    def missing(self) -> str | None:
        reason = _dispatch.missing_reason("expert_ffn", "native", "cpu")
        return reason and f"prepack needs the native kernels: {reason}"

    def prepare(self, layer: Layer) -> Run:
        gate_up_proj, down_proj = prepack(layer.gate_up_proj, num_splits=2), prepack(layer.down_proj)

        def run(batch):
            return expert_ffn(batch.hidden_states, batch.topk_ids, batch.topk_weights, gate_up_proj, down_proj)

        return run
