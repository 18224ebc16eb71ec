"""Reading an adapter's folder as PEFT writes it, checked against the model.

Whatever would change the result and is not understood is an error: an adapter that is silently ignored is the most
common complaint about other servers. Layouts: those of PEFT 0.21's LoraLayer, read without PEFT.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from moe_kernels.integrations.peft import convert

PREFIX = "base_model.model."
#: parameter suffix in the file -> the factor it holds
_SUFFIXES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_diag": "diagonal",
}
#: settings that change what the weights mean, and the values under which they do not
_PLAIN_SETTINGS = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "arrow_config": (None,),
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
    """``saved``: modules that the adapter has whole, module -> parameter -> (key in the file, tensor)."""

    config: dict
    modules: dict[str, ModuleAdapter]
    saved: dict[str, dict[str, tuple[str, Tensor]]] = field(default_factory=dict)


def _error(adapter: str, what: str, expected: str, actual: object, remedy: str = "") -> ValueError:
    message = f"load_peft_adapters: {what} of adapter {adapter!r} must be {expected}, got {actual}"
    return ValueError(message + (f"; {remedy}" if remedy else ""))


def read_adapter(
    name: str, path: Path, model: nn.Module, allow_other_base: bool, initial: Path | None = None
) -> Adapter:
    """An adapter's folder, checked against the model; as plain LoRA where it was trained beside a changed base.

    Args:
        initial: folder of the adapter as it started, for starts that do not follow from the base.
    """
    adapter, diagonals = _read(name, path, model, allow_other_base)
    start = adapter.config.get("init_lora_weights", True)
    if not diagonals and start in convert.PLAIN_STARTS:
        if initial is not None:
            raise _error(name, "initial adapter", "given for a start that changes the base", repr(start))
        return adapter
    if adapter.config.get("use_dora"):
        raise _error(name, "use_dora", f"False with init_lora_weights={start!r} or KaSA", True)
    if initial is None and start not in (*convert.PLAIN_STARTS, *convert.FROM_BASE):
        remedy = "name the folder of the adapter as it started in initial_adapters"
        raise _error(name, "init_lora_weights", "one that follows from the base alone", repr(start), remedy)
    started = None if initial is None else _read(f"{name}, as it started", initial, model, allow_other_base)[0].modules
    for module_name, module in adapter.modules.items():
        layer = _layer(model, module_name)
        if not isinstance(layer, nn.Linear):
            expected = f"a Linear with init_lora_weights={start!r} or KaSA"
            raise _error(name, f"module {module_name}", expected, type(layer).__name__)
        weight = layer.weight
        if diagonals:
            factors = convert.without_tail(module.a, module.b, diagonals[module_name], weight, module.scaling)
        elif started is None:
            begin = convert.start_factors(start, weight, module.a.shape[0], module.scaling)
            factors = convert.without_start(module.a, module.b, begin)
        else:
            begin = started.get(module_name)
            if begin is None or begin.a.shape != module.a.shape or begin.scaling != module.scaling:
                raise _error(
                    name, f"module {module_name} of the initial adapter", "there with its rank and scale", begin
                )
            factors = convert.without_start(module.a, module.b, (begin.a, begin.b))
        module.a, module.b = factors
    adapter.config = convert.doubled(adapter.config)
    return adapter


def _read(name: str, path: Path, model: nn.Module, allow_other_base: bool) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter as its files say, and KaSA's diagonals."""
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
    saved: dict[str, dict[str, tuple[str, Tensor]]] = {}
    whole = config.get("modules_to_save") or []
    for key, tensor in load_file(weights_file).items():
        matched = next((suffix for suffix in _SUFFIXES if key.endswith("." + suffix)), None)
        module = _saved_module(key.removeprefix(PREFIX), whole)
        if key.startswith(PREFIX) and matched is not None:
            name_of_module = key.removeprefix(PREFIX).removesuffix("." + matched)
            parts.setdefault(name_of_module, {})[_SUFFIXES[matched]] = (key, tensor)
        elif key.startswith(PREFIX) and module is not None:
            saved.setdefault(module, {})[key.removeprefix(f"{PREFIX}{module}.")] = (key, tensor)
        else:
            raise _error(name, "key", f"{PREFIX}<module>.<one of {', '.join(_SUFFIXES)}>", key)
    if not parts:
        raise _error(name, "file", "one with LoRA weights", weights_file)
    modules = {module: _module(name, module, found, config, model) for module, found in parts.items()}
    for setting, there in (("target_modules", modules), ("modules_to_save", saved)):
        targets = config.get(setting)
        for target in targets if isinstance(targets, list) else []:
            if not any(module == target or module.endswith("." + target) for module in there):
                raise _error(name, setting, "modules that have weights", repr(target))
    for module, found in saved.items():
        _check_saved(name, module, found, model)
    diagonals = {module: found["diagonal"][1] for module, found in parts.items() if "diagonal" in found}
    kasa = config.get("kasa_config") is not None
    if diagonals.keys() != (modules.keys() if kasa else set()):
        expected = "with a lora_diag for each module" if kasa else "without lora_diag where kasa_config is not set"
        raise _error(name, "file", expected, sorted(diagonals))
    for module, diagonal in diagonals.items():
        if diagonal.shape != modules[module].a.shape[:1]:
            raise _error(
                name, parts[module]["diagonal"][0], f"of shape [rank={len(modules[module].a)}]", diagonal.shape
            )
    return Adapter(config, modules, saved), diagonals


def _saved_module(key: str, whole: list[str]) -> str | None:
    """The module to which a parameter's key belongs, where ``modules_to_save`` names it."""
    words = key.split(".")
    for length in range(1, len(words)):
        module = ".".join(words[:length])
        if any(module == name or module.endswith("." + name) for name in whole):
            return module
    return None


def _check_saved(adapter: str, name: str, found: dict[str, tuple[str, Tensor]], model: nn.Module) -> None:
    """Raises unless the tensors are all those of the model's module."""
    try:
        own = model.get_submodule(name)
    except AttributeError:
        raise _error(adapter, "key", "of a module of the model", next(iter(found.values()))[0]) from None
    own = own.base_layer.state_dict() if hasattr(own, "copies") else own.state_dict()
    if own.keys() != found.keys():
        raise _error(adapter, f"module {name}", f"saved with {', '.join(own)}", ", ".join(found))
    for parameter, (key, tensor) in found.items():
        like = own[parameter]
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            expected = f"of shape {list(like.shape)} and {like.dtype}"
            raise _error(adapter, key, expected, f"{list(tensor.shape)} and {tensor.dtype}")


def _layer(model: nn.Module, name: str) -> nn.Module:
    layer = model.get_submodule(name)
    return getattr(layer, "base_layer", layer)


def _module(
    adapter: str, name: str, found: dict[str, tuple[str, Tensor]], config: dict, model: nn.Module
) -> ModuleAdapter:
    for factor in ("a", "b"):
        if factor not in found:
            raise _error(adapter, f"module {name}", f"there with both factors, lora_{factor.upper()} too", list(found))
    try:
        layer = _layer(model, name)
    except AttributeError:
        raise _error(adapter, "key", "of a module of the model", found["a"][0]) from None
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
        if factor in ("a", "b") and tensor.dtype != layer.weight.dtype:
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
