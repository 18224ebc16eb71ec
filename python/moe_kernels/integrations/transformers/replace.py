"""Turns the experts of a model that is already there over to moe_kernels, and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType

from torch import nn
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from moe_kernels.integrations.transformers.experts import fusable_gate, refuse_fp8
from moe_kernels.integrations.transformers.undecorated import ADAPTERS, CONTAINERS, REFUSED
from moe_kernels.nn.quantized_experts import QuantizedExperts

#: value of ``experts_implementation``
IMPLEMENTATION = "moe_kernels"


@dataclass
class ReplacementReport:
    """What :func:`replace_modules` did. ``print`` shows it as a table; as a context manager it restores on leaving.

    Attributes:
        replaced: (name, class) of each module that now runs on moe_kernels.
        refused: (name, class, reason) of each module that looks like experts and was left as it is.
        paths: name of a replaced module -> "fused" (:func:`moe_kernels.expert_ffn`) or "unfused" (grouped GEMMs around
            the module's own code).
    """

    replaced: list[tuple[str, type[nn.Module]]] = field(default_factory=list)
    refused: list[tuple[str, type[nn.Module], str]] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def restore(self) -> None:
        """Puts everything back as it was, in reverse order. A second call does nothing.

        Raises:
            RuntimeError: somebody else has replaced a forward since; undo that first.
        """
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def __enter__(self) -> ReplacementReport:
        return self

    def __exit__(self, *_) -> None:
        self.restore()

    def __str__(self) -> str:
        lines = [("replaced", name, cls.__name__, self.paths[name]) for name, cls in self.replaced]
        lines += [("refused", name, cls.__name__, reason) for name, cls, reason in self.refused]
        name_width = max((len(name) for _, name, _, _ in lines), default=0)
        class_width = max((len(cls) for _, _, cls, _ in lines), default=0)
        table = [f"{what:8}  {name:{name_width}}  {cls:{class_width}}  {how}" for what, name, cls, how in lines]
        return "\n".join([f"moe_kernels: {len(self.replaced)} replaced, {len(self.refused)} refused", *table])


def replace_modules(model: nn.Module) -> ReplacementReport:
    """Runs the experts of ``model`` on moe_kernels, in place and reversibly; no weight is copied or renamed.

    A class that transformers dispatches gets ``experts_implementation="moe_kernels"`` on its configuration object,
    which other modules, and other models built from the same object, share. Mixture-of-experts classes that it does
    not dispatch (llama4, dbrx, longcat_flash, step3p7, jetmoe, doge) get another ``forward`` on the instance.
    Everything else that looks like experts is refused, by name and with the reason; nothing is skipped in silence.

    Args:
        model: any module; a whole model or a part.

    Returns:
        A :class:`ReplacementReport`.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_modules: model must be a torch.nn.Module, got {type(model).__name__}")
    report = ReplacementReport()
    settled: list[str] = []  # names below which everything belongs to a module already listed
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in settled):
            continue
        cls = type(module)
        path = f"{cls.__module__}.{cls.__qualname__}"
        interface = dispatches_by(cls)
        if interface is not None:
            reason = _replace_decorated(name, module, interface, report)
        elif path in ADAPTERS:
            reason = _replace_undecorated(name, module, path, report)
        elif path in REFUSED:
            reason = REFUSED[path]
        elif path not in CONTAINERS and _looks_like_experts(name, module):
            reason = _why_unknown(module)
        else:
            continue
        if reason is None:
            report.replaced.append((name, cls))
        else:
            report.refused.append((name, cls, reason))
        settled.append(f"{name}." if name else "")
    return report


def dispatches_by(cls: type[nn.Module]) -> ExpertsInterface | None:
    """The interface by which a decorated class dispatches: the decorator's wrapper closes over it."""
    code = getattr(cls.forward, "__code__", None)
    if code is None or "experts_interface" not in code.co_freevars:
        return None
    interface = cls.forward.__closure__[code.co_freevars.index("experts_interface")].cell_contents
    return interface if isinstance(interface, ExpertsInterface) else None


def _replace_decorated(
    name: str, experts: nn.Module, interface: ExpertsInterface, report: ReplacementReport
) -> str | None:
    if IMPLEMENTATION not in interface:
        return f"it dispatches through {type(interface).__name__}, where moe_kernels is not registered"
    config = experts.config
    previous = config._experts_implementation
    if previous == "deepgemm_megamoe":
        return "deepgemm_megamoe rewrites the weights, so it cannot be left; load the model without it"
    quantised = isinstance(interface, FP8ExpertsInterface)
    if quantised:
        refusal = refuse_fp8(experts)
        if refusal is not None:
            argument, expected, actual, remedy = refusal
            return f"{argument} must be {expected}, got {actual}; {remedy}"

    def undo() -> None:
        config._experts_implementation_internal = previous

    report._undo.append(undo)
    # the attribute behind the property: the property's setter would change sub-configurations too
    config._experts_implementation_internal = IMPLEMENTATION
    fused = "fused" if fusable_gate(experts) is not None else "unfused"
    dequantises = quantised and not isinstance(experts.down_proj, QuantizedExperts)
    report.paths[name] = f"dequantised at each call, {fused}" if dequantises else fused
    return None


def _replace_undecorated(name: str, module: nn.Module, path: str, report: ReplacementReport) -> str | None:
    adapter = ADAPTERS[path]
    current = module.__dict__.get("forward")
    if getattr(current, "__func__", None) is not adapter.forward:
        refusal = adapter.refusal(module)
        if refusal is not None:
            return refusal
        forward = MethodType(adapter.forward, module)

        def undo() -> None:
            if module.__dict__.get("forward") is not forward:
                raise RuntimeError(
                    f"restore: the forward of {name or 'the model'} must be the one that replace_modules set, got "
                    f"{module.__dict__.get('forward')}; undo the later change first"
                )
            del module.forward

        report._undo.append(undo)
        module.forward = forward
    report.paths[name] = "fused" if adapter.gate(module) is not None else "unfused"
    return None


def _looks_like_experts(name: str, module: nn.Module) -> bool:
    if next(module.parameters(), None) is None:
        return False
    class_name = type(module).__name__
    if name.rpartition(".")[2] == "experts":
        return True
    if re.search("expert", class_name, re.IGNORECASE):
        return not re.search("router|gating|gate", class_name, re.IGNORECASE)
    stacked = any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    return stacked and any(hasattr(module, count) for count in ("num_experts", "num_local_experts"))


def _why_unknown(module: nn.Module) -> str:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return "its experts are separate modules; stacking them would copy the weights"
    return "its forward does not go through transformers' experts interface, and it is no class that is known here"
