"""Reading an adapter's folder as PEFT writes it, checked against the model.

Whatever would change the result and is not understood is an error: an adapter that is silently ignored is the most
common complaint about other servers. Layouts: those of PEFT 0.21's LoraLayer, read without PEFT.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

PREFIX = "base_model.model."
#: parameter suffix in the file -> the factor it holds
_SUFFIXES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
#: settings that change what the weights mean, and the values under which they do not
_PLAIN_SETTINGS = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "arrow_config": (None,),
    # others replace the base weight (pissa, olora, corda, kasa, loftq): the adapter alone is then not the difference
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


@dataclass
class ModuleAdapter:
    """An adapter's tensors for one module."""

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None
    keys: dict[str, str]  # factor -> key in the file


@dataclass
class Adapter:
    config: dict
    modules: dict[str, ModuleAdapter]


def _error(adapter: str, what: str, expected: str, actual: object, remedy: str = "") -> ValueError:
    message = f"load_peft_adapters: {what} of adapter {adapter!r} must be {expected}, got {actual}"
    return ValueError(message + (f"; {remedy}" if remedy else ""))


def read_adapter(name: str, path: Path, model: nn.Module, allow_other_base: bool) -> Adapter:
    """An adapter's folder, checked against the model."""
    from safetensors.torch import load_file

    config_file, weights_file = path / "adapter_config.json", path / "adapter_model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise _error(name, "folder", f"one with {file.name}", path)
    config = json.loads(config_file.read_text())
    for setting, allowed in _PLAIN_SETTINGS.items():
        if config.get(setting, allowed[0]) not in allowed:
            raise _error(name, setting, " or ".join(map(repr, allowed)), repr(config[setting]))
    base, own = config.get("base_model_name_or_path"), getattr(getattr(model, "config", None), "_name_or_path", "")
    if base and own and base != own and not allow_other_base:
        raise _error(name, "base model", own, base, "pass allow_other_base=True to add it to this one")
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in load_file(weights_file).items():
        matched = next((suffix for suffix in _SUFFIXES if key.endswith("." + suffix)), None)
        if matched is None or not key.startswith(PREFIX):
            raise _error(name, "key", f"{PREFIX}<module>.<one of {', '.join(_SUFFIXES)}>", key)
        module = key.removeprefix(PREFIX).removesuffix("." + matched)
        parts.setdefault(module, {})[_SUFFIXES[matched]] = (key, tensor)
    if not parts:
        raise _error(name, "file", "one with LoRA weights", weights_file)
    modules = {module: _module(name, module, found, config, model) for module, found in parts.items()}
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, list) else []:
        if not any(module == target or module.endswith("." + target) for module in modules):
            raise _error(name, "target_modules", "modules that have weights", repr(target))
    return Adapter(config, modules)


def _module(
    adapter: str, name: str, found: dict[str, tuple[str, Tensor]], config: dict, model: nn.Module
) -> ModuleAdapter:
    for factor in ("a", "b"):
        if factor not in found:
            raise _error(adapter, f"module {name}", f"there with both factors, lora_{factor.upper()} too", list(found))
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise _error(adapter, "key", "of a module of the model", found["a"][0]) from None
    layer = getattr(layer, "base_layer", layer)
    if not isinstance(layer, nn.Linear | nn.Embedding):
        raise _error(adapter, f"module {name}", "a Linear or an Embedding", type(layer).__name__)
    a, b = found["a"][1], found["b"][1]
    out, width = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
    rank = _pattern(config.get("rank_pattern"), name, config["r"])
    if a.shape != (rank, width):
        raise _error(adapter, found["a"][0], f"of shape [rank={rank}, in={width}]", list(a.shape))
    if b.shape != (out, rank):
        raise _error(adapter, found["b"][0], f"of shape [out={out}, rank={rank}]", list(b.shape))
    for factor, (key, tensor) in found.items():
        if factor != "magnitude" and tensor.dtype != layer.weight.dtype:
            remedy = "save the adapter in the model's dtype, or cast the model"
            raise _error(adapter, key, f"of the base's dtype {layer.weight.dtype}", tensor.dtype, remedy)
    magnitude = found.get("magnitude", (None, None))[1]
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise _error(adapter, f"module {name}", f"saved with use_dora={config.get('use_dora')}", list(found))
    if magnitude is not None and not isinstance(layer, nn.Linear):
        raise _error(adapter, f"module {name}", "a Linear where use_dora is set", type(layer).__name__)
    if magnitude is not None and magnitude.shape != (out,):
        raise _error(adapter, found["magnitude"][0], f"of shape [out={out}]", list(magnitude.shape))
    alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return ModuleAdapter(a, b, scaling, magnitude, {factor: key for factor, (key, _) in found.items()})


def _pattern(patterns: dict | None, module: str, default: float) -> float:
    """The first pattern that the module's name ends with, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
