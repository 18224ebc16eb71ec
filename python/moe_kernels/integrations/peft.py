"""PEFT adapters in mixed batches: :func:`load_peft_adapters`.

Reads what PEFT writes (adapter_config.json, adapter_model.safetensors; layouts of PEFT 0.21's LoraLayer) without PEFT.
Whatever would change the result and is not understood is an error: an adapter that is silently ignored is the most
common complaint about other servers.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_kernels.nn import AdapterPool, AdapterRouting, MultiLoRAEmbedding, MultiLoRALinear

_PREFIX = "base_model.model."
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
class _Module:
    """An adapter's tensors for one module."""

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None
    keys: dict[str, str]  # factor -> key in the file


@dataclass
class _Adapter:
    config: dict
    modules: dict[str, _Module]


def load_peft_adapters(
    model: nn.Module,
    adapters: Mapping[str, str | Path],
    *,
    num_slots: int | None = None,
    rows_per_layer: int | None = None,
    allow_other_base: bool = False,
) -> "PeftAdapters":
    """Puts LoRA adapters from PEFT folders beside a model, which then serves them in mixed batches.

    Linear layers and embeddings that an adapter targets become :class:`~moe_kernels.nn.MultiLoRALinear` and
    :class:`~moe_kernels.nn.MultiLoRAEmbedding`; base weights stay as they are. LoRA, rsLoRA, DoRA, rank and alpha
    patterns are read; each adapter keeps its own rank in each layer.

    Args:
        model: the base model.
        adapters: name -> folder.
        num_slots: adapters that fit at once; default: these and as many more, at least 4.
        rows_per_layer: sum of ranks that fits in each layer; default: ``num_slots`` times the largest rank.
        allow_other_base: accept adapters whose config names another base model (PortLLM, arXiv 2410.10870, adds the
            patch of an old base to a newer one).

    Returns:
        :class:`PeftAdapters`, which says who uses which and adds, evicts and exports.

    Raises:
        ValueError: a key that is not consumed, a setting that is not understood, a module that the model does not
            have, a target without weights, a rank or shape that does not fit; it names the adapter and the key, and
            the model is left as it was.
    """
    loaded = {name: _read(name, Path(path), model, allow_other_base) for name, path in adapters.items()}
    if not loaded:
        raise ValueError("load_peft_adapters: adapters must be at least one name and folder, got none")
    ranks = [module.a.shape[0] for adapter in loaded.values() for module in adapter.modules.values()]
    slots = num_slots or max(4, 2 * len(loaded))
    if slots < len(loaded):
        raise ValueError(f"load_peft_adapters: num_slots must be at least {len(loaded)}, got {slots}")
    served = PeftAdapters(model, slots, max(ranks), rows_per_layer or slots * max(ranks), allow_other_base)
    try:
        for name, adapter in loaded.items():
            served._fill(name, adapter)
    except Exception:
        served.restore()
        raise
    return served


class PeftAdapters:
    """The adapters of one model: who uses which, and adding, evicting and exporting them."""

    def __init__(self, model: nn.Module, num_slots: int, max_rank: int, num_rows: int, allow_other_base: bool):
        self._model, self._num_slots, self._max_rank, self._num_rows = model, num_slots, max_rank, num_rows
        self._allow_other_base = allow_other_base
        self._slots: dict[str, int] = {}
        self._adapters: dict[str, _Adapter] = {}
        self._layers: dict[str, MultiLoRALinear | MultiLoRAEmbedding] = {}
        self.routing = AdapterRouting()

    @property
    def names(self) -> list[str]:
        """The adapters that are there."""
        return list(self._slots)

    def use(self, names: Sequence[str | None] | None) -> None:
        """Says which adapter each sequence of the next batch uses; None is the base model alone.

        Raises:
            ValueError: a name that is not loaded.
        """
        if names is None:
            return self.routing.set(None)
        device = next(self._model.parameters()).device
        ids = torch.tensor([-1 if name is None else self._slot(name) for name in names], dtype=torch.int32)
        self.routing.set(ids.to(device))

    def mix(self, names: Sequence[str], weights: Tensor) -> None:
        """Every sequence uses all of ``names``, with ``weights`` [batch, len(names)]."""
        ids = torch.tensor([self._slot(name) for name in names], dtype=torch.int32, device=weights.device)
        self.routing.set(ids.expand(weights.shape), weights)

    def add(self, name: str, path: str | Path) -> None:
        """Loads one more adapter, or replaces the one of this name; the others keep their bits."""
        self._fill(name, _read(name, Path(path), self._model, self._allow_other_base))

    def evict(self, name: str) -> None:
        """Frees an adapter's rows. A batch that still names it is refused."""
        slot = self._slot(name)
        for layer in self._layers.values():
            layer.pool.evict(slot)
        del self._slots[name], self._adapters[name]

    @torch.no_grad()
    def export(self, name: str, path: str | Path) -> None:
        """Writes an adapter as PEFT would, from the rows of the pools: unchanged weights give back their bits."""
        from safetensors.torch import save_file

        slot, adapter = self._slot(name), self._adapters[name]
        tensors = {}
        for module_name, module in adapter.modules.items():
            a, b = self._layers[module_name].pool.adapter(slot)
            tensors[module.keys["a"]], tensors[module.keys["b"]] = a.contiguous(), b.contiguous()
            if module.magnitude is not None:
                tensors[module.keys["magnitude"]] = module.magnitude
        Path(path).mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(Path(path) / "adapter_model.safetensors"), metadata={"format": "pt"})
        (Path(path) / "adapter_config.json").write_text(json.dumps(adapter.config, indent=2, sort_keys=True))

    def restore(self) -> nn.Module:
        """Takes all adapters away: the model has its own layers again."""
        for name, layer in self._layers.items():
            self._model.set_submodule(name, layer.base_layer)
        self._layers, self._slots, self._adapters = {}, {}, {}
        return self._model

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            loaded = ", ".join(map(repr, self._slots)) or "none"
            raise ValueError(f"PeftAdapters: adapter must be one that is loaded ({loaded}), got {name!r}")
        return self._slots[name]

    def _fill(self, name: str, adapter: _Adapter) -> None:
        slot = self._slots.get(name)
        if slot is None:
            free = sorted(set(range(self._num_slots)) - set(self._slots.values()))
            if not free:
                raise ValueError(
                    f"PeftAdapters: adapter {name!r} needs one of {self._num_slots} slots, all are taken; evict"
                )
            slot = free[0]
        gains, new = {}, {}
        for module_name, module in adapter.modules.items():  # checked before anything is changed
            layer = self._layers.get(module_name) or self._wrap(module_name, self._model.get_submodule(module_name))
            if module_name not in self._layers:
                new[module_name] = layer
            if module.magnitude is not None:
                gains[module_name] = _dora_gain(layer.weight, module)
            layer.pool.check(name, slot, *self._factors(layer, module), gains.get(module_name))
        for module_name, layer in new.items():
            for other in self._slots.values():
                layer.pool.ranks[other] = 0  # adapters that leave this layer alone
            self._model.set_submodule(module_name, layer)
            self._layers[module_name] = layer
        for module_name, layer in self._layers.items():
            if module_name in adapter.modules:
                module = adapter.modules[module_name]
                factors = self._factors(layer, module)
                layer.pool.fill(name, slot, *factors, module.scaling, gains.get(module_name))
            else:
                layer.pool.ranks[slot] = 0
        self._slots[name], self._adapters[name] = slot, adapter

    def _wrap(self, name: str, module: nn.Module) -> MultiLoRALinear | MultiLoRAEmbedding:
        embedding = isinstance(module, nn.Embedding)
        features = (
            (module.num_embeddings, module.embedding_dim) if embedding else (module.in_features, module.out_features)
        )
        weight = module.weight
        pool = AdapterPool(
            *features, num_slots=self._num_slots, num_rows=self._num_rows, max_rank=self._max_rank, dtype=weight.dtype,
            device=weight.device,
        )  # fmt: skip
        return (MultiLoRAEmbedding if embedding else MultiLoRALinear)(module, pool, self.routing)

    @staticmethod
    def _factors(layer: nn.Module, module: _Module) -> tuple[Tensor, Tensor]:
        pool = layer.pool
        return tuple(tensor.to(pool.lora_a.device) for tensor in (module.a, module.b))


def _dora_gain(weight: Tensor, module: _Module) -> Tensor:
    """``m / |W + s B A|`` of each row, in float32."""
    full = weight.detach().float() + module.scaling * (module.b.float() @ module.a.float()).to(weight.device)
    return (module.magnitude.float().to(weight.device) / full.norm(dim=1)).to(weight.dtype)


def _error(adapter: str, what: str, expected: str, actual: object, remedy: str = "") -> ValueError:
    message = f"load_peft_adapters: {what} of adapter {adapter!r} must be {expected}, got {actual}"
    return ValueError(message + (f"; {remedy}" if remedy else ""))


def _read(name: str, path: Path, model: nn.Module, allow_other_base: bool) -> _Adapter:
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
        if matched is None or not key.startswith(_PREFIX):
            raise _error(name, "key", f"{_PREFIX}<module>.<one of {', '.join(_SUFFIXES)}>", key)
        module = key.removeprefix(_PREFIX).removesuffix("." + matched)
        parts.setdefault(module, {})[_SUFFIXES[matched]] = (key, tensor)
    if not parts:
        raise _error(name, "file", "one with LoRA weights", weights_file)
    modules = {module: _module(name, module, found, config, model) for module, found in parts.items()}
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, list) else []:
        if not any(module == target or module.endswith("." + target) for module in modules):
            raise _error(name, "target_modules", "modules that have weights", repr(target))
    return _Adapter(config, modules)


def _module(adapter: str, name: str, found: dict[str, tuple[str, Tensor]], config: dict, model: nn.Module) -> _Module:
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
    return _Module(a, b, scaling, magnitude, {factor: key for factor, (key, _) in found.items()})


def _pattern(patterns: dict | None, module: str, default: float) -> float:
    """The first pattern that the module's name ends with, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
