"""Drop-in modules made of the ops, and what makes them from dense models."""

from moe_kernels.nn.adapter_pool import AdapterPool
from moe_kernels.nn.attention import MoEAttention
from moe_kernels.nn.cosine_router import CosineRouter
from moe_kernels.nn.dmoerm import DMoERewardModel
from moe_kernels.nn.expert_lora import add_expert_lora
from moe_kernels.nn.expert_switcher import ExpertSwitcher
from moe_kernels.nn.feature_aggregator import FeatureAggregator
from moe_kernels.nn.feed_forward import MoEFeedForward, Routed
from moe_kernels.nn.logit_fusion import LogitFusion
from moe_kernels.nn.merge_lora import LayerMap, merge_lora
from moe_kernels.nn.mixlora import MixLoRAFeedForward
from moe_kernels.nn.multi_lora import AdapterRouting, MultiLoRAEmbedding, MultiLoRALinear
from moe_kernels.nn.per_adapter import PerAdapterModule
from moe_kernels.nn.poly_lora import PolyLoRALinear
from moe_kernels.nn.prior_approximate import prior_approximate_loss, train_router
from moe_kernels.nn.prune import merge_experts, prune_experts
from moe_kernels.nn.quantize import quantize_experts
from moe_kernels.nn.quantized_experts import QuantizedExperts
from moe_kernels.nn.routed_lora_linear import (
    ArrowRouter,
    LoRAMoERouter,
    NullAdapterRouter,
    PhatgooseGate,
    PhatgooseRouter,
    RoutedLoRALinear,
)
from moe_kernels.nn.split import split_dense
from moe_kernels.nn.statistics import ModuleStatistics
from moe_kernels.nn.task_vector_linear import TaskVectorLinear
from moe_kernels.nn.upcycle import upcycle
from moe_kernels.nn.x_lora import XLoRA, XLoRAClassifier

__all__ = [
    "AdapterPool",
    "AdapterRouting",
    "ArrowRouter",
    "CosineRouter",
    "DMoERewardModel",
    "ExpertSwitcher",
    "FeatureAggregator",
    "LayerMap",
    "LoRAMoERouter",
    "MixLoRAFeedForward",
    "LogitFusion",
    "MoEAttention",
    "MoEFeedForward",
    "ModuleStatistics",
    "MultiLoRAEmbedding",
    "MultiLoRALinear",
    "NullAdapterRouter",
    "PerAdapterModule",
    "PhatgooseGate",
    "PhatgooseRouter",
    "PolyLoRALinear",
    "QuantizedExperts",
    "Routed",
    "RoutedLoRALinear",
    "TaskVectorLinear",
    "XLoRA",
    "XLoRAClassifier",
    "add_expert_lora",
    "merge_experts",
    "merge_lora",
    "prior_approximate_loss",
    "prune_experts",
    "quantize_experts",
    "split_dense",
    "train_router",
    "upcycle",
]
