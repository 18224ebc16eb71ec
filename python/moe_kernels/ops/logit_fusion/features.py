"""Fusing the features of several models, place by place: :func:`fuse_features`."""

from collections.abc import Sequence

from torch import Tensor

from moe_kernels._checks import (
    FLOAT_DTYPES,
    check_same_device,
    check_tensor,
    dtype_error,
    shape_error,
    value_error,
)
from moe_kernels.ops.logit_fusion import autograd


def fuse_features(features: Sequence[Tensor], map_logits: Tensor) -> Tensor:
    """A weighted sum of K models' features; the weights are a softmax over the models at each place.

    ::

        A = softmax(map_logits, over models)        out[n, c, s] = sum_k A[n, k, s] features_k[n, c, s]

    Sums are in float32 (float64 for float64). The features are neither stacked nor copied, forward or backward: with O
    the gradient of the result, ``dF_k = A_k O`` and ``dmap_k = A_k (s_k - sum_j A_j s_j)``, ``s_k = sum_c F_k O``.

    Args:
        features: K tensors [batch_size, channels, *places], of one shape and dtype, any strides.
        map_logits: [batch_size, K, *places], any float dtype.

    Returns:
        [batch_size, channels, *places] in the features' dtype. Differentiable in features and map.

    Plain PyTorch on every device, a call for each model: there is no kernel to win (``addcmul_`` runs at the memory's
    speed).

    Source: Adaptive Feature Aggregation, arXiv 2405.17082.
    """
    op, features = "fuse_features", list(features)
    if not features:
        raise value_error(op, "features", "at least one tensor", "none")
    for k, feature in enumerate(features):
        check_tensor(op, f"features[{k}]", feature)
        if feature.dim() < 2 or feature.shape != features[0].shape:
            expected = f"{list(features[0].shape)}, as features[0]" if k else "[batch_size, channels, *places]"
            raise shape_error(op, f"features[{k}]", expected, feature)
        if feature.dtype not in FLOAT_DTYPES or feature.dtype != features[0].dtype:
            raise dtype_error(op, f"features[{k}]", features[0].dtype if k else FLOAT_DTYPES, feature)
    check_tensor(op, "map_logits", map_logits)
    batch_size, _, *places = features[0].shape
    if map_logits.shape != (batch_size, len(features), *places):
        expected = f"{[batch_size, len(features), *places]}, [batch_size, num_models, *places]"
        raise shape_error(op, "map_logits", expected, map_logits)
    if map_logits.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, "map_logits", FLOAT_DTYPES, map_logits)
    check_same_device(op, **{f"features[{k}]": f for k, f in enumerate(features)}, map_logits=map_logits)
    return autograd.FuseFeatures.apply(map_logits, *features)
