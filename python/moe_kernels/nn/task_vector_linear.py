"""A linear layer that holds its weight once and several fine-tunes of it as task vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_kernels._checks import value_error
from moe_kernels.ops.task_vector import TernaryDelta
from moe_kernels.ops.ternary_linear import ternary_linear


class TaskVectorLinear(nn.Module):
    """``y[t] = (W + sum_k a[t, k] * scale_e * T_e) x[t] + bias`` with ``e = delta_ids[t, k]``; see
    :func:`moe_kernels.ternary_linear`.

    Ids and weights are given at the call, or set once for many layers' calls with :meth:`set_deltas`. Without either
    every token uses every task vector with its coefficient.

    Args:
        linear: its parameters are used as they are, not copied.
        deltas: of the weight's shape. Their planes and scales are buffers: they go to and come from state dicts.
        coefficients: one number for each task vector, or one for all.

    Attributes:
        scales: [num_deltas] float64 buffer, which ``load_state_dict`` changes. A call does not read it, so that the
            host need not wait for the device: what else is written there has no effect; change ``coefficients``.
    """

    def __init__(
        self, linear: nn.Linear, deltas: Sequence[TernaryDelta], *, coefficients: float | Sequence[float] = 1.0
    ):
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"TaskVectorLinear: linear must be an nn.Linear, got {type(linear).__name__}")
        for delta in deltas:
            if not isinstance(delta, TernaryDelta):
                expected = "TaskVectorLinear: deltas must be TernaryDelta"
                raise TypeError(f"{expected}, got {type(delta).__name__}; call decompress")
            if delta.shape != linear.weight.shape:
                expected = f"of shape {list(linear.weight.shape)}"
                raise value_error("TaskVectorLinear", "deltas", expected, list(delta.shape))
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.num_deltas, self.coefficients = len(deltas), coefficients
        for i, delta in enumerate(deltas):
            self.register_buffer(f"planes_{i}", delta.planes.to(linear.weight.device))
        self.register_buffer("scales", torch.tensor([delta.scale for delta in deltas], dtype=torch.float64))
        self._scales = [delta.scale for delta in deltas]
        self.delta_ids: Tensor | None = None
        self.delta_weights: Tensor | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, deltas: Sequence[TernaryDelta], **options) -> "TaskVectorLinear":
        """The layer with its fine-tunes; arguments as for the class."""
        return cls(linear, deltas, **options)

    @property
    def deltas(self) -> list[TernaryDelta]:
        """The task vectors, which share the buffers' memory."""
        shape = self.weight.shape
        return [TernaryDelta(getattr(self, f"planes_{i}"), shape, scale) for i, scale in enumerate(self._scales)]

    def set_deltas(self, delta_ids: Tensor | None, delta_weights: Tensor | None = None) -> None:
        """What the next calls use where they are given no ids; None: every task vector."""
        self.delta_ids, self.delta_weights = delta_ids, delta_weights

    def forward(self, x: Tensor, delta_ids: Tensor | None = None, delta_weights: Tensor | None = None) -> Tensor:
        if delta_ids is None and delta_weights is None:
            delta_ids, delta_weights = self.delta_ids, self.delta_weights
        return ternary_linear(
            x, self.weight, self.deltas, delta_ids, delta_weights, bias=self.bias, coefficients=self.coefficients
        )

    def _load_from_state_dict(self, *arguments, **options) -> None:
        super()._load_from_state_dict(*arguments, **options)
        self._scales = self.scales.tolist()

    def _apply(self, fn, recurse: bool = True) -> "TaskVectorLinear":
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.scales.device)  # .half() and the like are for the weight
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, num_deltas={self.num_deltas}"
