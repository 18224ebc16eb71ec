"""Gradients of fused logits, log-probabilities and probabilities, and of fused features."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_kernels.ops.logit_fusion import native


def kernels(backend: str):
    """The module whose functions run: native, or their Triton twins, which are imported when first asked for."""
    if backend == "native":
        return native
    from moe_kernels.ops.logit_fusion import triton

    return triton


class FuseLogits(torch.autograd.Function):
    """Saves the sources, the result and two numbers for each row and source: its floor, or a mixture's sum.

    With z the fused logits before the softmax, T the temperature and g the gradient of the result::

        logits      dz = g
        log_probs   dz = g - probs sum(g)
        probs       dz = probs (g - sum(probs g))

        linear      dl_k = w_k dz / T        dw_k = sum(dz l_k) / T        dT = -sum(dz z) / T
        mixture     r_k = w_k p_k / sum_j w_j p_j
                    dl_k = (r_k dz - p_k sum(r_k dz)) / T    dw_k = sum(r_k dz) / (w_k T)    dT = -sum(dz z) / T

    Tokens at -inf and logits that a floor raised get zero; floors and masks are constants.
    """

    @staticmethod
    def forward(
        ctx,
        weights: Tensor,
        temperature: Tensor,
        vocab_size: int,
        mixture: bool,
        anchor: int,
        neg_inf: int,
        mask: list[float],
        floor: list[float],
        keep: list[float],
        out: int,
        *sources: Tensor,
    ) -> Tensor:
        filters = (mask, floor, keep)
        fused, source_stats = native.fuse_logits(
            list(sources), None, weights, temperature, None, 0, 0, vocab_size, mixture, anchor, neg_inf, *filters, out
        )
        ctx.save_for_backward(fused, source_stats, weights, temperature, *sources)
        ctx.arguments = (mixture, anchor, neg_inf, out)
        return fused

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        fused, source_stats, weights, temperature, *sources = ctx.saved_tensors
        grad_sources, grad_weights, grad_temperature = native.fuse_logits_backward(
            grad, fused, sources, weights, temperature, source_stats, *ctx.arguments
        )
        return grad_weights, grad_temperature, *(None,) * 8, *grad_sources


class FuseFeatures(torch.autograd.Function):
    """Saves the features and the softmax of the map; :func:`moe_kernels.fuse_features` has the equations."""

    @staticmethod
    def forward(ctx, map_logits: Tensor, *features: Tensor) -> Tensor:
        acc = torch.float64 if features[0].dtype == torch.float64 else torch.float32
        shares = map_logits.to(acc).softmax(1)
        fused = shares[:, :1] * features[0]
        for k, feature in enumerate(features[1:], 1):
            fused.addcmul_(shares[:, k : k + 1], feature.to(acc))
        ctx.save_for_backward(shares, *features)
        ctx.map_dtype = map_logits.dtype
        return fused.to(features[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        shares, *features = ctx.saved_tensors
        needs_map, *needs_features = ctx.needs_input_grad
        grads = [
            (shares[:, k : k + 1] * grad).to(grad.dtype) if needed else None for k, needed in enumerate(needs_features)
        ]
        if not needs_map:
            return None, *grads
        agreement = torch.stack([(feature.to(shares.dtype) * grad).sum(1) for feature in features], 1)
        grad_map = shares * (agreement - (shares * agreement).sum(1, keepdim=True))
        return grad_map.to(ctx.map_dtype), *grads
