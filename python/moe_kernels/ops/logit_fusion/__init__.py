from moe_kernels.ops.logit_fusion import presets
from moe_kernels.ops.logit_fusion.api import fuse_logits
from moe_kernels.ops.logit_fusion.token_filter import TokenFilter

__all__ = ["TokenFilter", "fuse_logits", "presets"]
