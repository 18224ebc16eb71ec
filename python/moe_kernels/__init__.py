"""Kernels and drop-in modules for composing experts.

Every op takes ``backend``:

========== =================================================================================================
auto       the best that is there for the tensors' device (``python -m moe_kernels env`` prints the order)
reference  plain PyTorch, any device, any float dtype: the specification
native     hand-written kernels: C++ on CPU tensors, CUDA C++ on CUDA tensors
triton     Triton kernels on CUDA tensors
========== =================================================================================================

A backend that cannot run here raises ``RuntimeError`` and says why. Results never depend on the number of threads or on
the other rows of a batch.
"""

from importlib.metadata import Distribution, PackageNotFoundError


def _refuse_name_clash() -> None:
    # another distribution, PyPI's `moe-kernels`, installs a package of this import name over ours
    try:
        other = Distribution.from_name("moe-kernels")
    except PackageNotFoundError:
        return
    raise ImportError(
        f"moe_kernels: the distribution moe-kernels {other.version} is installed beside moe-kernels-torch and writes "
        "into the same package folder; run: pip uninstall moe-kernels && pip install --force-reinstall --no-deps "
        "moe-kernels-torch"
    )


_refuse_name_clash()

from moe_kernels.activation import Activation  # noqa: E402
from moe_kernels.memory import empty_cache  # noqa: E402
from moe_kernels.ops.expert_ffn import expert_ffn  # noqa: E402
from moe_kernels.ops.grouped_gemm import PrepackedWeights, grouped_gemm, prepack  # noqa: E402
from moe_kernels.ops.logit_fusion import (  # noqa: E402
    TokenFilter,
    fuse_features,
    fuse_heads,
    fuse_logits,
    fused_verify,
    solve_tilt,
    tilt_stats,
)
from moe_kernels.ops.merge import merge, merge_tensors  # noqa: E402
from moe_kernels.ops.permute import DispatchPlan, permute, plan_dispatch, unpermute  # noqa: E402
from moe_kernels.ops.quantize import (  # noqa: E402
    QuantizedWeights,
    quantize,
    quantized_from_fp8,
    quantized_from_mxfp4,
)
from moe_kernels.ops.route import (  # noqa: E402
    balance_loss,
    consistency_loss,
    cosine_logits,
    entropy_loss,
    expert_capacity,
    expert_counts,
    growing_top_k,
    identity_weights,
    limit_capacity,
    localized_balance_loss,
    mask_experts,
    route,
    route_expert_choice,
    route_forced,
    route_random,
    route_soft,
    route_top_p,
    route_two_level,
    route_weights,
    tune_experts,
    update_expert_bias_,
    z_loss,
)
from moe_kernels.ops.routed_lora import (  # noqa: E402
    LoRARouting,
    bgmv,
    lora_expand,
    lora_shrink,
    prepare_routing,
    routed_lora,
    sgmv,
)
from moe_kernels.ops.task_vector import (  # noqa: E402
    PackedDelta,
    Patch,
    TernaryDelta,
    Undo,
    apply_,
    apply_patch_,
    compare,
    compress,
    decompress,
    make_patch,
    unapply_,
    unapply_patch_,
)
from moe_kernels.ops.ternary_linear import ternary_linear  # noqa: E402

__all__ = [
    "Activation",
    "DispatchPlan",
    "LoRARouting",
    "PackedDelta",
    "Patch",
    "PrepackedWeights",
    "QuantizedWeights",
    "TernaryDelta",
    "TokenFilter",
    "Undo",
    "apply_",
    "apply_patch_",
    "balance_loss",
    "bgmv",
    "compare",
    "compress",
    "consistency_loss",
    "cosine_logits",
    "decompress",
    "empty_cache",
    "entropy_loss",
    "expert_capacity",
    "expert_counts",
    "expert_ffn",
    "fuse_features",
    "fuse_heads",
    "fuse_logits",
    "fused_verify",
    "solve_tilt",
    "tilt_stats",
    "grouped_gemm",
    "growing_top_k",
    "identity_weights",
    "limit_capacity",
    "localized_balance_loss",
    "lora_expand",
    "lora_shrink",
    "make_patch",
    "mask_experts",
    "merge",
    "merge_tensors",
    "permute",
    "plan_dispatch",
    "prepack",
    "prepare_routing",
    "quantize",
    "quantized_from_fp8",
    "quantized_from_mxfp4",
    "route",
    "route_expert_choice",
    "route_forced",
    "route_random",
    "route_soft",
    "route_top_p",
    "route_two_level",
    "route_weights",
    "routed_lora",
    "sgmv",
    "ternary_linear",
    "tune_experts",
    "unapply_",
    "unapply_patch_",
    "unpermute",
    "update_expert_bias_",
    "z_loss",
]
