from moe_kernels.ops.ternary_linear.api import ternary_linear

__all__ = ["ternary_linear"]
