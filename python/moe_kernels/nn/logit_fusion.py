"""A learned fusion of several models' logits: :class:`LogitFusion`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_kernels.ops.logit_fusion import fuse_logits


class LogitFusion(nn.Module):
    """Log-probabilities of :func:`moe_kernels.fuse_logits` with weights, and a temperature, that are learned.

    linear: the weights are free and start as given. mixture: they are the softmax of what is learned, so they stay a
    distribution; the temperature is the exponential of what is learned. A softmax does not see a common factor of
    linear weights and temperature: with ``mode="linear"`` the temperature is not learned unless told.

    Args:
        weights: where each source's weight starts; for a mixture above 0 with sum 1.
        mode: "linear" or "mixture".
        temperature: where it starts.
        learn_temperature: by default for a mixture only.
        options: of :func:`moe_kernels.fuse_logits`: ``mask``, ``floor``, ``neg_inf``, ``anchor``, ``vocab``.
    """

    def __init__(
        self,
        weights: Sequence[float],
        *,
        mode: str = "linear",
        temperature: float = 1.0,
        learn_temperature: bool | None = None,
        **options,
    ):
        super().__init__()
        weights = torch.tensor(list(weights), dtype=torch.float32)
        if mode not in ("linear", "mixture"):
            raise ValueError(f"LogitFusion: mode must be one of linear, mixture, got {mode!r}")
        if mode == "mixture" and not ((weights > 0).all() and math.isclose(weights.sum().item(), 1, rel_tol=1e-5)):
            raise ValueError(f"LogitFusion: weights must be above 0 with sum 1 for a mixture, got {weights.tolist()}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"LogitFusion: temperature must be above 0, got {temperature}")
        self.mode, self.options = mode, options
        self.raw_weights = nn.Parameter(weights.log() if mode == "mixture" else weights)
        learns = mode == "mixture" if learn_temperature is None else learn_temperature
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learns)

    @property
    def weights(self) -> Tensor:
        """[num_sources], as :func:`moe_kernels.fuse_logits` takes them."""
        return self.raw_weights.softmax(0) if self.mode == "mixture" else self.raw_weights

    def forward(self, *sources: Tensor) -> Tensor:
        """Fuses K tensors [num_rows, vocab] to log-probabilities [num_rows, vocab]."""
        temperature = self.log_temperature.exp().expand(sources[0].shape[0])
        return fuse_logits(sources, self.weights, mode=self.mode, temperature=temperature, **self.options)

    def extra_repr(self) -> str:
        return f"num_sources={self.raw_weights.numel()}, mode={self.mode!r}"
