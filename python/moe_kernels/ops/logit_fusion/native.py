"""Schemas, fakes and handles of the compiled logit ops (csrc/ops/logit_fusion)."""

import torch
from torch import Tensor

from moe_kernels.ops.logit_fusion.token_filter import TokenFilter

# a step counts up: a symbol, so that it does not compile anew
torch.library.define(
    "moe_kernels::fuse_logits",
    "(Tensor[] sources, Tensor? rows, Tensor weights, Tensor temperature, Tensor? request_ids, int seed, SymInt step, "
    "SymInt vocab_size, bool mixture, int anchor, int neg_inf, float[] mask, float[] floor, float[] keep, int out) "
    "-> (Tensor, Tensor)",
)
torch.library.define(
    "moe_kernels::fuse_logits_backward",
    "(Tensor grad, Tensor fused, Tensor[] sources, Tensor weights, Tensor temperature, Tensor source_stats, "
    "bool mixture, int anchor, int neg_inf, int out) -> (Tensor[], Tensor, Tensor)",
)
torch.library.define("moe_kernels::tilt_stats", "(Tensor[] sources, Tensor alpha) -> Tensor")
torch.library.define(
    "moe_kernels::solve_tilt",
    "(Tensor[] sources, Tensor values, int target, float low, float high, int grid) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)

fuse_logits = torch.ops.moe_kernels.fuse_logits.default
fuse_logits_backward = torch.ops.moe_kernels.fuse_logits_backward.default
tilt_stats = torch.ops.moe_kernels.tilt_stats.default
solve_tilt = torch.ops.moe_kernels.solve_tilt.default

#: that a launch of the CUDA kernels takes
MAX_CUDA_SOURCES = 16


def gpu_misfit(backend: str, num_sources: int, **filters: TokenFilter | None) -> tuple[str, str, object] | None:
    """The argument that a GPU's kernels cannot take, what it would have to be, and what it is; None where they fit."""
    for name, one in filters.items():
        if one is not None and (one.top_k != 0 or one.top_p != 1 or one.min_keep != 1):
            return name, "of min_p alone on a GPU", one
    if backend == "native" and num_sources > MAX_CUDA_SOURCES:
        return "sources", f"at most {MAX_CUDA_SOURCES} in CUDA", num_sources
    return None


@torch.library.register_fake("moe_kernels::fuse_logits")
def _(sources, rows, weights, temperature, request_ids, seed, step, vocab_size, *rest):
    dtype = torch.float64 if sources[0].dtype == torch.float64 else torch.float32
    num_rows, num_sources = weights.shape
    is_token = rest[-1] >= 3
    fused = (
        weights.new_empty(num_rows, dtype=torch.int64)
        if is_token
        else weights.new_empty((num_rows, vocab_size), dtype=dtype)
    )
    return fused, weights.new_empty((num_rows, num_sources, 2), dtype=dtype)


@torch.library.register_fake("moe_kernels::fuse_logits_backward")
def _(grad, fused, sources, weights, temperature, source_stats, mixture, anchor, neg_inf, out):
    grad_sources: list[Tensor] = [source.new_empty(source.shape) for source in sources]
    return grad_sources, weights.new_empty(weights.shape), temperature.new_empty(temperature.shape)


@torch.library.register_fake("moe_kernels::tilt_stats")
def _(sources, alpha):
    return alpha.new_empty((*alpha.shape, 3))


@torch.library.register_fake("moe_kernels::solve_tilt")
def _(sources, values, target, low, high, grid):
    alpha = values.new_empty(values.shape[0])
    status = values.new_empty(values.shape[0], dtype=torch.int32)
    return alpha, torch.empty_like(alpha), status, torch.empty_like(status)
