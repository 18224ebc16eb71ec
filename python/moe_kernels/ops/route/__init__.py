from moe_kernels.ops.route.api import route

__all__ = ["route"]
