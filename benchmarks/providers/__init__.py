"""Everyone who computes an expert FFN, by name; see base.py for what a provider is."""

from benchmarks.providers.base import Batch, Layer, Provider, Run
from benchmarks.providers.liger import Liger
from benchmarks.providers.moe_ops import MoeOps
from benchmarks.providers.onnxruntime_moe import OnnxRuntimeMoE
from benchmarks.providers.ours import Ours, OursPrepacked, OursTriton
from benchmarks.providers.torch_ops import TorchCompile, TorchGroupedMM, TorchMM
from benchmarks.providers.transformers_experts import (
    TransformersBatchedMM,
    TransformersEager,
    TransformersGroupedMM,
)
from benchmarks.providers.vllm_cpu import VllmSGL, VllmVec
from benchmarks.providers.zentorch import ZenTorch

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Ours(),
        OursPrepacked(),
        OursTriton(),
        TorchMM(),
        TorchGroupedMM(),
        TorchCompile(),
        TransformersEager(),
        TransformersBatchedMM(),
        TransformersGroupedMM(),
        Liger(),
        MoeOps(),
        ZenTorch(),
        VllmSGL(),
        VllmVec(),
        OnnxRuntimeMoE(),
    )
}

__all__ = ["PROVIDERS", "Batch", "Layer", "Provider", "Run"]
