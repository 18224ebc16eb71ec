"""Linear layers with ternary task vectors in plain PyTorch: the specification."""

import torch
from torch import Tensor

from moe_kernels.ops.task_vector.ternary import TernaryDelta


def ternary_linear(
    x: Tensor,
    weight: Tensor,
    deltas: list[TernaryDelta],
    values: list[float],
    delta_ids: Tensor | None,
    delta_weights: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The equation of :func:`moe_kernels.ternary_linear`, every product with every delta written out; x is 2-d."""
    base = torch.nn.functional.linear(x, weight, bias)
    if not deltas:
        return base
    products = torch.stack([x @ delta.signs().to(x.dtype).T for delta in deltas])  # [num_deltas, num_tokens, out]
    tokens, order = (torch.arange(size, device=x.device) for size in (len(x), len(deltas)))
    ids = order.expand(len(x), -1) if delta_ids is None else delta_ids.long()
    used = (ids >= 0) & (ids < len(deltas))
    ids = torch.where(used, ids, 0)
    pairs = products[ids, tokens[:, None]]  # [num_tokens, K, out]
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights = torch.tensor(values, dtype=accumulator, device=x.device)[ids]
    if delta_weights is not None:
        weights = weights * delta_weights
    terms = torch.where(used[..., None], weights.to(x.dtype)[..., None] * pairs, 0)
    return base + terms.sum(1)
