"""AMD's zentorch (ZenDNN): ``zentorch_fused_moe``, float32 and bfloat16."""

import torch

from benchmarks.providers.base import Batch, Layer, Provider, Run, module_missing


class ZenTorch(Provider):
    name = "zentorch"
    what = "torch.ops.zentorch.zentorch_fused_moe (AMD ZenDNN)"
    distribution = "zentorch"
    copies = 2.0  # the clone and its own packing, which it keeps to the end of the process (seen in 2.13.0.2)

    def missing(self) -> str | None:
        return module_missing("zentorch", "--no-deps zentorch (built for one torch version, see its wheel's name)")

    def unsuited(self, layer: Layer, num_tokens: int | None = None) -> str | None:
        if layer.dtype not in (torch.float32, torch.bfloat16):
            return "float32 and bfloat16 only"
        return None

    def prepare(self, layer: Layer) -> Run:
        import zentorch  # noqa: F401 - registers the op

        op = torch.ops.zentorch.zentorch_fused_moe
        # its first call rearranges the weights in place: everyone who reads them later would get garbage
        gate_up_proj, down_proj = layer.gate_up_proj.detach().clone(), layer.down_proj.detach().clone()

        def run(batch: Batch) -> torch.Tensor:
            out = torch.empty_like(batch.hidden_states)
            op(
                out, batch.hidden_states, gate_up_proj, down_proj, None, None,
                batch.topk_weights_fp32, batch.topk_ids_int32, False, "silu",
            )  # fmt: skip
            return out

        return run
