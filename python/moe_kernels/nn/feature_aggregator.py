"""One block of Adaptive Feature Aggregation: :class:`FeatureAggregator`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.ops.logit_fusion import fuse_features


class FeatureAggregator(nn.Module):
    """Fuses the feature maps that several diffusion models have after the same block, with weights at every pixel.

    ::

        x = conv_in(concat_k F_k)                           1 x 1
        x = x + residual(x, time)                           convolutions, the time step added between them
        x = x + layers(x, text)                             self-attention, cross-attention to the text, gated MLP
        out = fuse_features(F, conv_out(x))                 1 x 1, zero at first: the mean of the models

    The models stay as they are; every one of them goes on with ``out``. Text states and time embeddings may be given as
    one for each model, whose mean is taken.

    Args:
        num_models: K.
        channels: of each model's features.
        text_size, time_size: of the text's states and of the time embedding.
        hidden_size: of the block.
        num_layers, num_heads: of the attention.
        num_groups: of the normalisations; divides ``hidden_size``.

    Source: arXiv 2405.17082.
    """

    def __init__(
        self,
        num_models: int,
        channels: int,
        *,
        text_size: int,
        time_size: int,
        hidden_size: int = 320,
        num_layers: int = 1,
        num_heads: int = 8,
        num_groups: int = 32,
    ):
        super().__init__()
        for name, divisor in (("num_heads", num_heads), ("num_groups", num_groups)):
            if hidden_size % divisor:
                raise ValueError(f"FeatureAggregator: {name} must be a divisor of {hidden_size}, got {divisor}")
        self.num_models, self.channels = num_models, channels
        self.conv_in = nn.Conv2d(num_models * channels, hidden_size, 1)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(num_groups, hidden_size) for _ in range(3))
        self.conv1, self.conv2 = (nn.Conv2d(hidden_size, hidden_size, 3, padding=1) for _ in range(2))
        self.time = nn.Linear(time_size, hidden_size)
        self.project_in, self.project_out = (nn.Linear(hidden_size, hidden_size) for _ in range(2))
        self.layers = nn.ModuleList(_Layer(hidden_size, text_size, num_heads) for _ in range(num_layers))
        self.conv_out = nn.Conv2d(hidden_size, num_models, 1, bias=False)
        nn.init.zeros_(self.conv_out.weight)

    def map_logits(self, features: Sequence[Tensor], text: Tensor, time: Tensor) -> Tensor:
        """[batch_size, num_models, height, width], before the softmax over the models."""
        x = self.conv_in(torch.cat(list(features), 1))
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        x = x + self.conv2(F.silu(self.norm2(y)))
        y = self.project_in(self.norm3(x).flatten(2).transpose(1, 2))
        for layer in self.layers:
            y = layer(y, text)
        return self.conv_out(x + self.project_out(y).transpose(1, 2).view_as(x))

    def forward(
        self, features: Sequence[Tensor], text: Tensor | Sequence[Tensor], time: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """Fuses K maps [batch_size, channels, height, width].

        Args:
            text: [batch_size, length, text_size], or one for each model.
            time: [batch_size, time_size], or one for each model.
        """
        if len(features) != self.num_models or any(map_.shape[1] != self.channels for map_ in features):
            shapes = [list(map_.shape) for map_ in features]
            expected = f"{self.num_models} maps of {self.channels} channels"
            raise ValueError(f"FeatureAggregator: features must be {expected}, got {shapes}")
        text, time = (each if isinstance(each, Tensor) else torch.stack(list(each)).mean(0) for each in (text, time))
        return fuse_features(features, self.map_logits(features, text, time))


class _Layer(nn.Module):
    """Self-attention, cross-attention to the text and a gated MLP, each added to what it reads."""

    def __init__(self, hidden_size: int, text_size: int, num_heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(3))
        self.itself = _Attention(hidden_size, hidden_size, num_heads)
        self.text = _Attention(hidden_size, text_size, num_heads)
        self.up, self.down = nn.Linear(hidden_size, 8 * hidden_size), nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.itself(normed, normed)
        x = x + self.text(self.norms[1](x), text)
        up, gate = self.up(self.norms[2](x)).chunk(2, dim=-1)
        return x + self.down(up * F.gelu(gate))


class _Attention(nn.Module):
    def __init__(self, hidden_size: int, context_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key, self.value = (nn.Linear(context_size, hidden_size, bias=False) for _ in range(2))
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        heads = [
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (self.query(x), self.key(context), self.value(context))
        ]
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
