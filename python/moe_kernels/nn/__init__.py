"""Drop-in modules made of the ops."""

from moe_kernels.nn.cosine_router import CosineRouter
from moe_kernels.nn.feed_forward import MoEFeedForward, Routed
from moe_kernels.nn.split import split_dense
from moe_kernels.nn.statistics import ModuleStatistics

__all__ = ["CosineRouter", "ModuleStatistics", "MoEFeedForward", "Routed", "split_dense"]
