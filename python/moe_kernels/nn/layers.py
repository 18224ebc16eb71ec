"""The mixture-of-experts layers of a model, as :mod:`moe_kernels.nn.prune` changes them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels._checks import value_error
from moe_kernels.nn.feed_forward import MoEFeedForward

#: model types of transformers whose experts and router these functions know: configuration's name for num_experts
CONFIG_NAMES = {
    "mixtral": "num_local_experts",
    "olmoe": "num_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_experts",
}


class ExpertLayer(NamedTuple):
    """One layer whose tensors are indexed by expert.

    Attributes:
        name: of the module that :class:`ModuleStatistics` counts under.
        experts: holds ``gate_up_proj`` [num_experts, 2 * intermediate_size, hidden_size] and ``down_proj``.
        router: holds ``weight`` and perhaps ``bias``, one row for each logit, the experts' first.
    """

    name: str
    experts: nn.Module
    router: nn.Module

    @property
    def num_experts(self) -> int:
        return self.experts.down_proj.shape[0]

    @property
    def top_k(self) -> int:
        return (self.experts if isinstance(self.experts, MoEFeedForward) else self.router).top_k


def expert_layers(op: str, model: nn.Module) -> list[ExpertLayer]:
    """The layers of a model that holds :class:`MoEFeedForward`, or of a transformers model of a known type."""
    found = [
        ExpertLayer(name, module, module.router)
        for name, module in model.named_modules()
        if isinstance(module, MoEFeedForward)
    ]
    if found:
        if any(not isinstance(layer.router, nn.Linear) for layer in found):
            raise value_error(op, "router", "an nn.Linear", type(found[0].router).__name__)
        return found
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type not in CONFIG_NAMES:
        expected = f"one with MoEFeedForward layers or a transformers {', '.join(CONFIG_NAMES)}"
        raise value_error(op, "model", expected, model_type)
    return [
        ExpertLayer(f"{name}.experts" if name else "experts", block.experts, block.gate)
        for name, block in model.named_modules()
        if hasattr(block, "experts") and hasattr(block, "gate")
    ]


@torch.no_grad()
def remix(layer: ExpertLayer, mixing: Tensor) -> None:
    """Replaces the experts by sums of them: ``new[n] = sum_e mixing[n, e] * old[e]``, rounded once.

    Sums run in float32 (float64 for float64). Router rows are mixed likewise, those past the experts (identity and null
    experts) are kept.
    """
    num_experts = layer.num_experts
    for name in ("gate_up_proj", "down_proj"):
        setattr(layer.experts, name, _like(getattr(layer.experts, name), _mix(getattr(layer.experts, name), mixing)))
    for name in ("weight", "bias"):
        rows = getattr(layer.router, name, None)
        if rows is not None:
            setattr(layer.router, name, _like(rows, torch.cat([_mix(rows[:num_experts], mixing), rows[num_experts:]])))
    if isinstance(layer.router, nn.Linear):
        layer.router.out_features = layer.router.weight.shape[0]
    bias = getattr(layer.experts, "expert_bias", None)
    if bias is not None:
        layer.experts.expert_bias = torch.cat([_mix(bias[:num_experts], mixing), bias[num_experts:]])
        layer.experts.expert_counts = torch.zeros_like(layer.experts.expert_bias, dtype=torch.int64)


def set_num_experts(op: str, model: nn.Module, layers: list[ExpertLayer]) -> None:
    """Writes the number of experts where a transformers model keeps it: one for all ``layers``."""
    if all(isinstance(layer.experts, MoEFeedForward) for layer in layers):
        return
    numbers = sorted({layer.num_experts for layer in layers})
    if len(numbers) != 1:
        raise value_error(op, "the number of experts", "the same in every layer of a transformers model", numbers)
    (num_experts,) = numbers
    setattr(model.config, CONFIG_NAMES[model.config.model_type], num_experts)
    for module in model.modules():
        if isinstance(getattr(module, "num_experts", None), int):
            module.num_experts = num_experts


def _mix(stack: Tensor, mixing: Tensor) -> Tensor:
    wide = torch.float64 if stack.dtype == torch.float64 else torch.float32
    mixing, rows = mixing.to(stack.device, wide), stack.to(wide).reshape(stack.shape[0], -1)
    # row by row: an expert that has no part in a sum stays out of it, also where it holds inf
    mixed = torch.stack([weights[weights != 0] @ rows[weights != 0] for weights in mixing])
    return mixed.view(mixing.shape[0], *stack.shape[1:]).to(stack.dtype)


def _like(old: nn.Parameter, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new, requires_grad=old.requires_grad)
