from moe_kernels.ops.routed_lora.api import lora_expand, lora_shrink, routed_lora
from moe_kernels.ops.routed_lora.serving import LoRARouting, bgmv, prepare_routing, sgmv

__all__ = ["LoRARouting", "bgmv", "lora_expand", "lora_shrink", "prepare_routing", "routed_lora", "sgmv"]
