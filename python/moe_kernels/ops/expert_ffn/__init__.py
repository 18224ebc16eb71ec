from moe_kernels.ops.expert_ffn.api import expert_ffn

__all__ = ["expert_ffn"]
