"""The activation of an expert, as data: every backend reads the same six numbers, so none can drop a clamp."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: position in this tuple is the code that the kernels take (``ActivationKind`` in csrc/microkernels/table.h)
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class Activation:
    """What an expert does between its two projections.

    With ``gate, up`` the two halves of the first projection (ungated: ``gate`` is all of it and ``up`` is absent)::

        gate' = min(gate, limit)                     clamp == "input"
        up'   = min(max(up, -limit), limit) + up_offset
        act   = kind(gate')                          silu: gate' * sigmoid(alpha * gate')
        act'  = min(act, limit)                      clamp == "output"
        out   = act' * up'                           ungated: act'

    A gradient passes at a clamp's boundary, as in ``torch.clamp``.

    Attributes:
        kind: "silu", "gelu" (exact, by erf), "gelu_tanh", "relu" or "relu2" (the square of relu).
        gated: whether the first projection holds gate and up.
        alpha: slope inside silu's sigmoid; 1 for every other kind.
        limit: where to clamp; infinity clamps nothing.
        clamp: whether ``limit`` bounds the gate before ("input") or after ("output") the activation.
        up_offset: added to the up half after its clamp.

    Named forms: :meth:`gpt_oss`, :meth:`clamped_swiglu`, :meth:`swiglu_step`.
    """

    kind: str = "silu"
    gated: bool = True
    alpha: float = 1.0
    limit: float = math.inf
    clamp: str = "input"
    up_offset: float = 0.0

    def __post_init__(self):
        # comparisons, not math.isfinite, which torch.compile cannot trace on symbolic numbers; NaN fails them too
        if self.kind not in KINDS:
            raise ValueError(f"Activation: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.clamp not in ("input", "output"):
            raise ValueError(f"Activation: clamp must be 'input' or 'output', got {self.clamp!r}")
        if not self.limit > 0:
            raise ValueError(f"Activation: limit must be positive, got {self.limit}")
        if not abs(self.alpha) < math.inf or (self.kind != "silu" and self.alpha != 1.0):
            raise ValueError(f"Activation: alpha must be finite, and 1 unless kind is 'silu', got {self.alpha}")
        if not abs(self.up_offset) < math.inf or (not self.gated and self.up_offset != 0.0):
            raise ValueError(f"Activation: up_offset must be finite, and 0 when ungated, got {self.up_offset}")
        # frozen, so made once: kernels take these on every call
        arguments = KINDS.index(self.kind), self.gated, self.alpha, self.limit, self.clamp == "output", self.up_offset
        object.__setattr__(self, "_kernel_arguments", arguments)

    @classmethod
    def gpt_oss(cls, alpha: float = 1.702, limit: float = 7.0) -> "Activation":
        """GPT-OSS: ``(clamp(up) + 1) * g * sigmoid(alpha * g)`` with ``g = min(gate, limit)``."""
        return cls(alpha=alpha, limit=limit, up_offset=1.0)

    @classmethod
    def clamped_swiglu(cls, limit: float = 10.0) -> "Activation":
        """DeepSeek-V4 and relatives: ``silu(min(gate, limit)) * clamp(up)``."""
        return cls(limit=limit)

    @classmethod
    def swiglu_step(cls, limit: float) -> "Activation":
        """Step: ``min(silu(gate), limit) * clamp(up)``."""
        return cls(limit=limit, clamp="output")

    def kernel_arguments(self) -> tuple[int, bool, float, float, bool, float]:
        """The arguments that every kernel takes, in the order of its schema."""
        return self._kernel_arguments

    def __call__(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """The formula in plain PyTorch: the specification of every kernel.

        Args:
            gate: any shape, floating.
            up: shape of ``gate`` when gated, None when ungated.
        """
        if (up is not None) != self.gated:
            expected, got = ("gate and up", "gate alone") if self.gated else ("gate alone", "gate and up")
            raise ValueError(
                f"Activation: a {'' if self.gated else 'non-'}gated activation takes {expected}, got {got}"
            )
        if self.clamp == "input" and self.limit != math.inf:
            gate = gate.clamp(max=self.limit)
        if self.kind == "silu":
            out = F.silu(gate) if self.alpha == 1.0 else gate * torch.sigmoid(self.alpha * gate)
        elif self.kind == "gelu":
            out = F.gelu(gate)
        elif self.kind == "gelu_tanh":
            out = F.gelu(gate, approximate="tanh")
        elif self.kind == "relu":
            out = F.relu(gate)
        else:
            out = F.relu(gate).square()
        if self.clamp == "output" and self.limit != math.inf:
            out = out.clamp(max=self.limit)
        if up is None:
            return out
        if self.limit != math.inf:
            up = up.clamp(-self.limit, self.limit)
        return out * (up + self.up_offset if self.up_offset else up)
