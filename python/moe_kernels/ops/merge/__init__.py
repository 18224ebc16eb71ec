from moe_kernels.ops.merge.api import merge, merge_tensors

__all__ = ["merge", "merge_tensors"]
