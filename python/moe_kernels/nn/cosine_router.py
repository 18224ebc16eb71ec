"""A router that compares directions: :class:`CosineRouter`."""

import math

import torch
from torch import Tensor, nn

from moe_kernels.ops.route import cosine_logits


class CosineRouter(nn.Module):
    """``logits[t, e] = cos(projection @ x[t], expert_embeddings[e]) / temperature``, everything learned.

    Args:
        hidden_size: size of a token.
        num_experts: number of logits.
        projected_size: size of the space in which directions are compared; X-MoE takes half the number of experts.
        temperature: where the learned temperature starts.

    Source: Chi et al., "On the Representation Collapse of Sparse Mixture of Experts", arXiv 2204.09179.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        projected_size: int,
        *,
        temperature: float = 0.07,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.initial_temperature = temperature
        self.projection = nn.Linear(hidden_size, projected_size, bias=False, **place)
        self.expert_embeddings = nn.Parameter(torch.empty(num_experts, projected_size, **place))
        self.log_temperature = nn.Parameter(torch.empty((), **place))  # its exponential stays above 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the embeddings and the projection anew and starts the temperature again."""
        self.projection.reset_parameters()
        nn.init.normal_(self.expert_embeddings)
        nn.init.constant_(self.log_temperature, math.log(self.initial_temperature))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps [num_tokens, hidden_size] to logits [num_tokens, num_experts]."""
        return cosine_logits(self.projection(hidden_states), self.expert_embeddings, self.log_temperature.exp())
