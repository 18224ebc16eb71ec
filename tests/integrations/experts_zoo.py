"""Every decorated experts class of the installed transformers, and how to build a tiny one of each."""

import ast
import functools
import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

#: sizes as small as layouts allow to tell apart: hidden, intermediate and expert counts all differ
NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE = 5, 12, 7
_SIZES = {
    NUM_EXPERTS: ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts"),
    HIDDEN_SIZE: ("hidden_size", "moe_hidden_size", "d_model"),
    INTERMEDIATE_SIZE: ("moe_intermediate_size", "intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"),
}


@dataclass(frozen=True)
class ExpertsClass:
    module: str  # dotted, below transformers.models
    name: str

    def load(self) -> type[nn.Module]:
        return getattr(importlib.import_module(f"transformers.models.{self.module}"), self.name)

    def __str__(self):
        return self.name


@functools.cache
def decorated_classes() -> tuple[ExpertsClass, ...]:
    """Classes under ``@use_experts_implementation`` in all modeling files, found in the source: nothing is imported."""
    found = []
    models = Path(transformers.__file__).parent / "models"
    for path in sorted(models.glob("*/modeling_*.py")):
        source = path.read_text()
        if "@use_experts_implementation" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and any(
                "use_experts_implementation" in ast.unparse(decorator) for decorator in node.decorator_list
            ):
                found.append(ExpertsClass(f"{path.parent.name}.{path.stem}", node.name))
    return tuple(found)


def _config_classes(module: str) -> list[type[PreTrainedConfig]]:
    package = module.split(".")[0]
    configuration = importlib.import_module(f"transformers.models.{package}.configuration_{package}")
    here = [value for value in vars(configuration).values() if inspect.isclass(value)]
    classes = [cls for cls in here if issubclass(cls, PreTrainedConfig) and cls.__module__ == configuration.__name__]
    # the text model's configuration first: it is the one that has experts
    return sorted(classes, key=lambda value: "Text" not in value.__name__)


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Sets the sizes that experts read to tiny ones, where the configuration has them."""
    for size, names in _SIZES.items():
        for name in names:
            if hasattr(config, name):
                # some models have a list here, one entry for each of their modalities
                setattr(config, name, [size, size] if isinstance(getattr(config, name), list) else size)
    return config


def build(experts_class: ExpertsClass, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A tiny module of the class from its model's own default configuration (its own activation, its own clamps).

    Raises:
        LookupError: no configuration of the model's package builds it; the message holds every attempt's error.
    """
    cls = experts_class.load()
    takes_size = "intermediate_size" in inspect.signature(cls.__init__).parameters
    extra = {"intermediate_size": INTERMEDIATE_SIZE} if takes_size else {}
    attempts = []
    for config_class in _config_classes(experts_class.module):
        try:
            config = shrink(config_class())
            config._experts_implementation = "eager"
            experts = cls(config, **extra)
        except Exception as error:  # a configuration of another part of the model
            attempts.append(f"{config_class.__name__}: {type(error).__name__}: {error}")
            continue
        return randomise(experts, seed).to(dtype)
    raise LookupError(f"{experts_class}: " + "; ".join(attempts))


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that pre-activations pass the clamps of every known gate (the largest is 10)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module
