from moe_kernels.ops.logit_fusion import presets
from moe_kernels.ops.logit_fusion.api import fuse_logits
from moe_kernels.ops.logit_fusion.features import fuse_features
from moe_kernels.ops.logit_fusion.heads import fuse_heads
from moe_kernels.ops.logit_fusion.tilt import (
    TiltSolution,
    TiltStats,
    copyright_protecting_fusion,
    dynamic_fusion,
    dynamic_solution,
    solve_tilt,
    tilt_stats,
)
from moe_kernels.ops.logit_fusion.token_filter import TokenFilter
from moe_kernels.ops.logit_fusion.verify import Verified, fused_verify, verify_draft

__all__ = [
    "TiltSolution",
    "TiltStats",
    "TokenFilter",
    "Verified",
    "copyright_protecting_fusion",
    "dynamic_fusion",
    "dynamic_solution",
    "fuse_features",
    "fuse_heads",
    "fuse_logits",
    "fused_verify",
    "presets",
    "solve_tilt",
    "tilt_stats",
    "verify_draft",
]
