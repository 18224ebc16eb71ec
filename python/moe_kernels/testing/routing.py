"""Random routings with the edges that kernels trip over."""

import torch
from torch import Tensor


def random_routing(
    num_tokens: int, num_experts: int, top_k: int, *, seed: int = 0, skip: float = 0.0, empty_expert: bool = True
) -> tuple[Tensor, Tensor]:
    """Distinct experts for each token and weights that sum to 1.

    Args:
        skip: share of the pairs whose id is replaced by -1 or by an id past the last expert.
        empty_expert: leaves the last expert without tokens where there are experts enough.

    Returns:
        topk_ids [num_tokens, top_k] int32, topk_weights [num_tokens, top_k] float32, on the default device.
    """
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    used = num_experts - 1 if empty_expert and num_experts > top_k else num_experts
    scores = torch.rand(num_tokens, used, generator=generator)
    topk_ids = scores.argsort(1)[:, :top_k].int()
    topk_weights = torch.rand(num_tokens, top_k, generator=generator).softmax(1)
    if skip:
        dropped = torch.rand(num_tokens, top_k, generator=generator) < skip
        outside = torch.where(torch.rand(num_tokens, top_k, generator=generator) < 0.5, -1, num_experts + 3)
        topk_ids = torch.where(dropped, outside, topk_ids).int()
    return topk_ids.contiguous(), topk_weights
