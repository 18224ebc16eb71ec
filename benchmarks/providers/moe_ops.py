"""moe-ops (PyPI): permutation by atomic counters and a grouped GEMM with tensor copies, in Triton."""

import torch.nn.functional as F

from benchmarks.providers.base import Batch, Layer, Provider, Run, module_missing


class MoeOps(Provider):
    name = "moe_ops"
    what = "moe-ops' permute, grouped_gemm twice, torch's silu, unpermute; tunes 16 kernels, so only when asked for"
    default = False
    trains_by_default = False
    devices = ("cuda",)
    trains = True
    distribution = "moe-ops"

    def missing(self) -> str | None:
        return module_missing("moe_ops", "moe-ops")

    def unsuited(self, layer: Layer, num_tokens: int | None = None) -> str | None:
        num_experts = layer.shape.num_experts
        power_of_two = num_experts & (num_experts - 1) == 0  # its histogram's size
        return None if power_of_two else f"num_experts must be a power of two, got {num_experts}"

    def prepare(self, layer: Layer) -> Run:
        import moe_ops

        gate_up_proj, down_proj, num_experts = layer.gate_up_proj, layer.down_proj, layer.shape.num_experts

        def run(batch: Batch):
            rows, row_id_map, offsets = moe_ops.permute(batch.hidden_states, batch.topk_ids_int32, 0, num_experts)
            gate, up = moe_ops.grouped_gemm(rows, gate_up_proj, offsets).chunk(2, 1)
            y = moe_ops.grouped_gemm(F.silu(gate) * up, down_proj, offsets)
            return moe_ops.unpermute(y, row_id_map, batch.topk_weights, *batch.topk_ids.shape)

        return run
