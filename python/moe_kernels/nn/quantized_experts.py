"""Quantised weights in the place of a layer's parameter: :class:`QuantizedExperts`."""

from dataclasses import replace

from torch import Tensor, nn

from moe_kernels.ops.quantize import QuantizedWeights


class QuantizedExperts(nn.Module):
    """Holds :class:`QuantizedWeights` in the place of a parameter, so that they move and are saved with their layer.

    Attributes:
        data: [num_experts, expert_bytes] uint8, all of its state. A checkpoint's bytes are checked when they are
            loaded, and what their header says (the format, for one) holds from then on.
    """

    def __init__(self, weights: QuantizedWeights):
        super().__init__()
        self.register_buffer("data", weights.data)
        self._weights = weights

    @property
    def shape(self) -> tuple[int, int, int]:
        """[num_experts, out, in]"""
        return self._weights.shape

    def forward(self) -> QuantizedWeights:
        """The weights, for an op."""
        return replace(self._weights, data=self.data)

    def _load_from_state_dict(self, *arguments, **options) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._weights = QuantizedWeights.from_bytes(self.data)

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}, format={self._weights.format}, group_size={self._weights.group_size}"


def expert_weights(weights: Tensor | QuantizedExperts) -> Tensor | QuantizedWeights:
    """What an op takes, from a layer's parameter or from what :func:`quantize_experts` put in its place."""
    return weights() if isinstance(weights, QuantizedExperts) else weights


def put_in_place(module: nn.Module, name: str, weights: QuantizedWeights) -> None:
    """Puts quantised weights where a parameter was."""
    delattr(module, name)
    module.add_module(name, QuantizedExperts(weights))
