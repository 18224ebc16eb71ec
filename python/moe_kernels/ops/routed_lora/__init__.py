from moe_kernels.ops.routed_lora.api import lora_expand, lora_shrink, routed_lora

__all__ = ["lora_expand", "lora_shrink", "routed_lora"]
