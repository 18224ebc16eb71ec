"""Drop-in modules made of the ops."""

from moe_kernels.nn.feed_forward import MoEFeedForward
from moe_kernels.nn.split import split_dense

__all__ = ["MoEFeedForward", "split_dense"]
