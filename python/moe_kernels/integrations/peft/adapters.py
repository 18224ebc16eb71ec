"""PEFT adapters in mixed batches: :func:`load_peft_adapters`."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_kernels.integrations.peft.bases import BaseChange, base_change
from moe_kernels.integrations.peft.folder import Adapter, ModuleAdapter, read_adapter
from moe_kernels.nn import AdapterPool, AdapterRouting, LayerMap, MultiLoRAEmbedding, MultiLoRALinear, PerAdapterModule


def load_peft_adapters(
    model: nn.Module,
    adapters: Mapping[str, str | Path],
    *,
    num_slots: int | None = None,
    rows_per_layer: int | None = None,
    allow_other_base: bool = False,
    initial_adapters: Mapping[str, str | Path] | None = None,
) -> "PeftAdapters":
    """Puts LoRA adapters from PEFT folders beside a model, which then serves them in mixed batches.

    Linear layers and embeddings that an adapter targets become :class:`~moe_kernels.nn.MultiLoRALinear` and
    :class:`~moe_kernels.nn.MultiLoRAEmbedding`; base weights stay as they are. LoRA, rsLoRA, DoRA, rank and alpha
    patterns are read; each adapter keeps its own rank in each layer. Modules that an adapter has whole
    (``modules_to_save``) become :class:`~moe_kernels.nn.PerAdapterModule`.

    Args:
        model: the base model.
        adapters: name -> folder.
        num_slots: adapters that fit at once; default: these and as many more, at least 4.
        rows_per_layer: sum of ranks that fits in each layer; default: ``num_slots`` times the largest rank.
        initial_adapters: name -> folder of the adapter as it started, for CorDA and other starts that do not follow
            from the base. PiSSA, OLoRA and KaSA need none. All become plain LoRA of twice the rank on the unchanged
            base, and are exported as such.
        allow_other_base: accept adapters whose config names another base model (PortLLM, arXiv 2410.10870, adds the
            patch of an old base to a newer one).

    Returns:
        :class:`PeftAdapters`, which says who uses which and adds, evicts and exports.

    Raises:
        ValueError: a key that is not consumed, a setting that is not understood, a module that the model does not
            have, a target without weights, a rank or shape that does not fit; it names the adapter and the key, and
            the model is left as it was.
    """
    initial = {name: Path(path) for name, path in (initial_adapters or {}).items()}
    for name in initial.keys() - adapters.keys():
        raise ValueError(f"load_peft_adapters: initial_adapters must be of names in adapters, got {name!r}")
    loaded = {
        name: read_adapter(name, Path(path), model, allow_other_base, initial.get(name))
        for name, path in adapters.items()
    }
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
        self._adapters: dict[str, Adapter] = {}
        self._layers: dict[str, MultiLoRALinear | MultiLoRAEmbedding] = {}
        self._saved: dict[str, PerAdapterModule] = {}
        self._maps: dict[str, LayerMap] = {}
        self._own_routings: dict[str, AdapterRouting] = {}  # of each layer, where maps tell layers apart
        self.routing = AdapterRouting()

    @property
    def names(self) -> list[str]:
        """The adapters that are there."""
        return list(self._slots)

    @property
    def layers(self) -> dict[str, MultiLoRALinear | MultiLoRAEmbedding]:
        """The adapted layers by name, in the model's order: what :class:`~moe_kernels.nn.XLoRA` takes.

        Adapters are slots in the order in which they were loaded. :meth:`use` and :meth:`mix` give all layers the
        routing of this object again.
        """
        return {name: self._layers[name] for name, _ in self._model.named_modules() if name in self._layers}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The factors of all adapters, in two tensors a layer, for an optimizer; frozen until ``requires_grad_``.

        Sequences of a batch train their own adapters: an optimizer that treats elements alone, and does nothing where
        the gradient was always zero (Adam without weight decay), trains each as if it were alone.
        """
        for layer in self._layers.values():
            yield from layer.pool.parameters()

    def requires_grad_(self, requires_grad: bool = True) -> "PeftAdapters":
        """Whether the adapters are trained. DoRA's magnitudes are not: its row scale is made when it is loaded.

        Linear layers in training mode then drop elements of the adapters' input at the adapters' ``lora_dropout``.

        Raises:
            ValueError: a DoRA adapter is loaded and would be trained, or adapters differ in ``lora_dropout``.
        """
        for name, adapter in self._adapters.items():
            if requires_grad and any(module.magnitude is not None for module in adapter.modules.values()):
                raise ValueError(
                    f"PeftAdapters: adapter {name!r} must be without DoRA to be trained, got use_dora=True"
                )
        rates = sorted({adapter.config.get("lora_dropout") or 0.0 for adapter in self._adapters.values()})
        if requires_grad and len(rates) > 1:
            raise ValueError(
                f"PeftAdapters: lora_dropout must be the same in all adapters to be trained, got {rates}; set it in "
                "their adapter_config.json"
            )
        for layer in self._layers.values():
            if isinstance(layer, MultiLoRALinear):
                layer.dropout = rates[0] if requires_grad and rates else 0.0
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def use(self, names: Sequence[str | None] | None) -> None:
        """Says which adapter each sequence of the next batch uses; None is the base model alone.

        Args:
            names: adapters, or maps that :meth:`define` made.

        Raises:
            ValueError: a name that is not loaded, or a map that names an adapter that is not loaded any more.
        """
        if names is None:
            return self._share(None)
        device = next(self._model.parameters()).device
        if not any(name in self._maps for name in names):
            ids = torch.tensor([-1 if name is None else self._slot(name) for name in names], dtype=torch.int32)
            return self._share(ids.to(device))
        for name in names:
            for adapter in self._maps[name].adapters if name in self._maps else ():
                self._check_mixable(adapter)
        rows = {}
        for module_name in self._layers:
            of_names = [
                self._maps[name](module_name) if name in self._maps else {} if name is None else {name: 1.0}
                for name in names
            ]
            top_k = max(1, max(map(len, of_names)))
            ids = torch.full((len(names), top_k), -1, dtype=torch.int32)
            weights = torch.zeros(len(names), top_k)
            for row, found in enumerate(of_names):
                for k, (adapter, weight) in enumerate(found.items()):
                    ids[row, k], weights[row, k] = self._slot(adapter), weight
            rows[module_name] = ids.to(device), weights.to(device)
        # for layers that later adapters bring and for whole modules, which no map concerns
        plain = [self._slots.get(name, -1) for name in names]
        self.routing.set(torch.tensor(plain, dtype=torch.int32, device=device))
        for module_name, row in rows.items():  # only now: a name that is not loaded leaves the last batch's in place
            # the same object for every batch: compiled code is not compiled again
            own = self._own_routings.setdefault(module_name, AdapterRouting())
            own.set(*row)
            self._layers[module_name].routing = own

    def define(self, name: str, layers: LayerMap) -> None:
        """Gives a mixture of loaded adapters, which may differ from layer to layer, a name for :meth:`use`.

        Raises:
            ValueError: the name of an adapter, or a map that names one that is not loaded.
        """
        if name in self._slots:
            raise ValueError(f"PeftAdapters: name must be none of the adapters', got {name!r}")
        for adapter in layers.adapters:
            self._check_mixable(adapter)
        self._maps[name] = layers

    @torch.no_grad()
    def compare_bases(self, name: str, old_base: nn.Module) -> dict[str, BaseChange]:
        """How far this model's weights are from those that an adapter was trained on, beside the adapter's own size.

        PortLLM (arXiv 2410.10870) adds the patch of an old base to an updated one, ``W'' = W' + s B A``, which
        :func:`load_peft_adapters` does with ``allow_other_base``; this is what to look at before trusting it.

        Returns:
            Module -> :class:`BaseChange`, with fingerprints of both weights.
        """
        self._slot(name)
        return {
            module_name: base_change(
                module_name, old_base, self._layers[module_name].weight, module.a, module.b, module.scaling
            )
            for module_name, module in self._adapters[name].modules.items()
        }

    def mix(self, names: Sequence[str], weights: Tensor) -> None:
        """Every sequence uses all of ``names``, with ``weights`` [batch, len(names)]."""
        for name in names:
            self._check_mixable(name)
        ids = torch.tensor([self._slot(name) for name in names], dtype=torch.int32, device=weights.device)
        self._share(ids.expand(weights.shape), weights)

    def add(self, name: str, path: str | Path, initial: str | Path | None = None) -> None:
        """Loads one more adapter, or replaces the one of this name; the others keep their bits.

        Args:
            initial: see ``initial_adapters`` of :func:`load_peft_adapters`.
        """
        started = None if initial is None else Path(initial)
        self._fill(name, read_adapter(name, Path(path), self._model, self._allow_other_base, started))

    def evict(self, name: str) -> None:
        """Frees an adapter's rows. A batch that still names it is refused."""
        slot = self._slot(name)
        for layer in self._layers.values():
            layer.pool.evict(slot)
        self._drop_saved(slot)
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
        for module_name, saved in adapter.saved.items():
            state = self._saved[module_name].copies[str(slot)].state_dict()
            tensors |= {key: state[parameter].contiguous() for parameter, (key, _) in saved.items()}
        Path(path).mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(Path(path) / "adapter_model.safetensors"), metadata={"format": "pt"})
        (Path(path) / "adapter_config.json").write_text(json.dumps(adapter.config, indent=2, sort_keys=True))

    def restore(self) -> nn.Module:
        """Takes all adapters away: the model has its own layers again."""
        for name, layer in (*self._layers.items(), *self._saved.items()):
            self._model.set_submodule(name, layer.base_layer)
        self._saved = {}
        self._layers, self._slots, self._adapters, self._maps = {}, {}, {}, {}
        return self._model

    def _share(self, adapter_ids: Tensor | None, adapter_weights: Tensor | None = None) -> None:
        """One routing for all layers."""
        self.routing.set(adapter_ids, adapter_weights)
        for layer in self._layers.values():
            layer.routing = self.routing

    def _check_mixable(self, name: str) -> None:
        self._slot(name)
        if self._adapters[name].saved:
            raise ValueError(f"PeftAdapters: adapter {name!r} must have no modules_to_save to be mixed with others")

    def _drop_saved(self, slot: int) -> None:
        for module in self._saved.values():
            if str(slot) in module.copies:
                del module.copies[str(slot)]

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            loaded = ", ".join(map(repr, self._slots)) or "none"
            raise ValueError(f"PeftAdapters: adapter must be one that is loaded ({loaded}), got {name!r}")
        return self._slots[name]

    def _fill(self, name: str, adapter: Adapter) -> None:
        if name in self._maps:
            raise ValueError(f"PeftAdapters: adapter's name must be none of the maps', got {name!r}")
        for other, found in (self._adapters | {name: adapter}).items():
            for whole, adapted in ((adapter.saved, found.modules), (found.saved, adapter.modules)):
                clash = [module for module in whole if any(f"{part}.".startswith(f"{module}.") for part in adapted)]
                if clash:
                    raise ValueError(
                        f"PeftAdapters: {clash[0]} of adapter {name!r} must be whole (modules_to_save) or adapted "
                        f"as in the others, got the other way in {other!r}"
                    )
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
            try:
                layer.pool.check(name, slot, *self._factors(layer, module), gains.get(module_name))
            except (ValueError, TypeError) as error:
                raise type(error)(f"{error} (key {module.keys['a']})") from None
        for module_name, layer in new.items():
            for other in self._slots.values():
                layer.pool.leave_alone(other)
            self._model.set_submodule(module_name, layer)
            self._layers[module_name] = layer
        for module_name, layer in self._layers.items():
            if module_name in adapter.modules:
                module = adapter.modules[module_name]
                factors = self._factors(layer, module)
                layer.pool.fill(name, slot, *factors, module.scaling, gains.get(module_name))
            else:
                layer.pool.leave_alone(slot)
        self._drop_saved(slot)
        for module_name, saved in adapter.saved.items():
            if module_name not in self._saved:
                self._saved[module_name] = PerAdapterModule(self._model.get_submodule(module_name), self.routing)
                self._model.set_submodule(module_name, self._saved[module_name])
            own = copy.deepcopy(self._saved[module_name].base_layer).requires_grad_(False)
            own.load_state_dict({parameter: tensor for parameter, (_, tensor) in saved.items()})
            self._saved[module_name].copies[str(slot)] = own
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
    def _factors(layer: nn.Module, module: ModuleAdapter) -> tuple[Tensor, Tensor]:
        pool = layer.pool
        return tuple(tensor.to(pool.lora_a.device) for tensor in (module.a, module.b))


def _dora_gain(weight: Tensor, module: ModuleAdapter) -> Tensor:
    """``m / |W + s B A|`` of each row, in float32."""
    full = weight.detach().float() + module.scaling * (module.b.float() @ module.a.float()).to(weight.device)
    return (module.magnitude.float().to(weight.device) / full.norm(dim=1)).to(weight.dtype)
