"""What a provider of the expert FFN is: ours, a torch or transformers path, or another project's kernel.

A provider that cannot run says why and is left out; nothing but torch has to be installed.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from benchmarks.shapes import LayerShape


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; every provider reads these or makes private copies of them, and none may change them.

    Attributes:
        gate_up_proj: Parameter [num_experts, 2 * intermediate_size, hidden_size], gate rows before up rows.
        down_proj: Parameter [num_experts, hidden_size, intermediate_size].
        threads: threads that a provider with its own thread pool is to use.
    """

    shape: LayerShape
    gate_up_proj: torch.nn.Parameter
    down_proj: torch.nn.Parameter
    threads: int

    @property
    def dtype(self) -> torch.dtype:
        return self.gate_up_proj.dtype

    @property
    def weight_bytes(self) -> int:
        return self.shape.weight_bytes(self.dtype.itemsize)


@dataclass(frozen=True)
class Batch:
    """Tokens and their routing, in every form that a provider asks for: converting is not what is timed.

    All forms of the weights hold the same values, which ``dtype`` can represent.
    """

    hidden_states: Tensor  # [num_tokens, hidden_size]
    topk_ids: Tensor  # [num_tokens, top_k] int64, as transformers has it
    topk_ids_int32: Tensor
    topk_weights: Tensor  # [num_tokens, top_k] in the dtype of hidden_states, as transformers has it
    topk_weights_fp32: Tensor


Run = Callable[[Batch], Tensor]


class Provider:
    """One way to compute ``expert_ffn``.

    Attributes:
        name: what ``--providers`` takes.
        what: one line for ``--list``.
        ours: it is this project's, so it has to be right before it is timed.
        default: it runs when ``--providers`` is not given.
        devices: types of device that it runs on.
        trains: it is differentiable in the hidden states, the routing weights and both expert weights.
        trains_by_default: like ``default``, for the training step.
        distribution: whose version goes into the results.
        copies: private copies of the weights that it makes, in multiples of the weights' size (seen in the resident
            memory, after the first call).
    """

    name = ""
    what = ""
    ours = False
    default = True
    devices: tuple[str, ...] = ("cpu",)
    trains = False
    trains_by_default = True
    distribution = "torch"
    copies = 0.0

    def missing(self) -> str | None:
        """Why it cannot run on this machine at all, or None."""
        return None

    def unsuited(self, layer: Layer, num_tokens: int | None = None) -> str | None:
        """Why it cannot or should not run this layer (``num_tokens`` None) or this many tokens, or None."""
        return None

    def prepare(self, layer: Layer) -> Run:
        """Makes whatever is made once for a layer (packed copies, sessions) and returns the function to time."""
        raise NotImplementedError

    def version(self, layer: Layer | None = None) -> str:
        """What goes into the results beside the name; for a layer, where it depends on that."""
        return installed_version(self.distribution)


def installed_version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def module_missing(module: str, install: str) -> str | None:
    """Reason for :meth:`Provider.missing` where a top-level module is not there; does not import it."""
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed; pip install {install}"
    return None
