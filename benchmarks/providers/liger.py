"""Liger-Kernel's fused experts: gather, both projections and the weighted sum in Triton, with a backward."""

from benchmarks.providers.base import Batch, Layer, Provider, Run, module_missing


class Liger(Provider):
    name = "liger"
    what = "Liger-Kernel's LigerFusedMoEFunction; tunes 64 kernels for each shape, so only when asked for"
    default = False
    trains_by_default = False
    devices = ("cuda",)
    trains = True
    distribution = "liger-kernel"

    def missing(self) -> str | None:
        return module_missing("liger_kernel", "liger-kernel")

    def prepare(self, layer: Layer) -> Run:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        gate_up_proj, down_proj = layer.gate_up_proj, layer.down_proj

        def run(batch: Batch):
            return LigerFusedMoEFunction.apply(
                batch.hidden_states, gate_up_proj, down_proj, batch.topk_ids_int32, batch.topk_weights
            )

        return run
