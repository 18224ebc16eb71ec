"""Task vectors switched on a live model, and the base restored to the last bit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_kernels._checks import dtype_error, shape_error, value_error
from moe_kernels.ops.task_vector import (
    Packed,
    PackedDelta,
    Patch,
    TernaryDelta,
    Undo,
    apply_,
    apply_patch_,
    from_bytes,
    unapply_,
    unapply_patch_,
)

Delta = TernaryDelta | PackedDelta | Patch
#: parameter's name -> what is added to it, with which coefficients; a patch stands alone
Plan = dict[str, tuple[list[Delta], list[float]]]
#: one number, or one for each parameter, by its name
Coefficient = float | Callable[[str], float]


@dataclass(eq=False)
class _Patched:
    """What takes a patch back: itself."""

    patch: Patch
    version: int | None
    nbytes: int = 0


class ExpertSwitcher:
    """Makes a model one of its fine-tunes, or a mixture of several, and the base again.

    The parameters are changed in place, so that hooks, compiled functions, optimisers and captured CUDA graphs stay
    valid, and no second copy of the model is held: beside the task vectors there are two bits for each weight that one
    of the active ones touches. ``theta = round(theta_0 + sum_e coefficient_e(name) * delta_e[name])``, in one pass with
    one rounding, from the base and not from the expert before: the order of switches leaves no trace.

    A switch is a transaction: what can be wrong is looked at before the first weight changes, and if one fails the
    others are put back. ``generation`` counts the switches. A weight that somebody else changed since is found by
    PyTorch's version counter, and refused.

    Experts need not cover the model: a parameter without a task vector stays the base's (half fine-tuning,
    arXiv 2404.18466, freezes half of the matrices). A coefficient that depends on the parameter's name swaps layers
    (arXiv 2410.01335)::

        switcher = ExpertSwitcher(model)
        switcher.add("math", load_file("math.safetensors"))
        switcher.switch({"math": lambda name: 0.0 if layer_of(name) in (0, 1, 30, 31) else 1.0, "swahili": 0.5})
        ...
        switcher.restore()

    An expert may keep values where signs are too little (``compress(..., values=...)``): a graft is a small density
    (arXiv 2302.06600), sparse fine-tunes of a task and of a language add up (LT-SFT, arXiv 2110.07560). It may be a
    lossless :class:`~moe_kernels.Patch` of some parameters: these become the tuned ones, bit for bit, and no other
    expert is added to them.

    Args:
        model: its parameters must be floating tensors where a task vector has their name.
    """

    def __init__(self, model: nn.Module):
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        # a parameter that is tied goes by its first name, whichever name an expert has
        firsts: dict[int, str] = {}
        self._first_names = {name: firsts.setdefault(id(p), name) for name, p in self._parameters.items()}
        self._experts: dict[str, dict[str, Delta]] = {}
        self._undo: dict[str, Undo | _Patched] = {}
        self._applied: Plan = {}
        self._active: dict[str, Coefficient] = {}
        self.generation = 0

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts that were added."""
        return tuple(self._experts)

    @property
    def active(self) -> dict[str, Coefficient]:
        """The experts that the model is made of now, with their coefficients; empty: it is the base."""
        return dict(self._active)

    @property
    def undo_bytes(self) -> int:
        """Memory that restoring the base takes, beyond the task vectors."""
        return sum(undo.nbytes for undo in self._undo.values())

    def add(self, expert: str, deltas: Mapping[str, Delta | Tensor], *, any_base: bool = False) -> None:
        """Makes an expert known; changes no weight.

        Args:
            expert: its name.
            deltas: parameter's name -> task vector or patch, or the bytes of one as a safetensors file holds them.
                They are moved to the parameter's device. Names that share one parameter need one of them; a
                coefficient by name is then asked for the first of the names.
            any_base: take packed task vectors of another base (PortLLM, arXiv 2410.10870, carries them to an updated
                one). Otherwise the parameters must be, bit for bit, those that the differences were taken from.

        Raises:
            ValueError: a name, shape or base that is not the model's, or an expert of that name.
        """
        op = f"ExpertSwitcher.add({expert!r})"
        if expert in self._experts:
            raise value_error(op, "expert", "a new name", "one that was added", "call remove first")
        if self._active:
            raise value_error(op, "the model", "its base", f"{', '.join(self._active)} on it", "call restore first")
        unknown = sorted(set(deltas) - set(self._parameters))
        if unknown:
            raise value_error(op, "deltas", "of the model's parameters", f"others: {', '.join(unknown[:8])}")
        taken: dict[str, tuple[str, Delta]] = {}
        checked: dict[str, Delta] = {}
        for name, delta in deltas.items():
            parameter = self._parameters[name]
            if isinstance(delta, Tensor):
                delta = from_bytes(delta)
            if not isinstance(delta, (TernaryDelta, Packed)):
                raise TypeError(f"{op}: {name} must be a task vector, got {type(delta).__name__}; call compress")
            if delta.shape != parameter.shape:
                raise shape_error(op, name, str(list(delta.shape)), parameter, "the task vector is of another model")
            if isinstance(delta, Patch) and delta.dtype != parameter.dtype:
                raise dtype_error(op, name, delta.dtype, parameter, "the patch is of another model")
            if isinstance(delta, Patch) and not delta.fits(parameter):
                raise value_error(op, name, "of this base", "a patch of another", "it would lead to other weights")
            if isinstance(delta, PackedDelta) and not any_base and not delta.fits(parameter):
                raise value_error(op, name, "of this base", "a task vector of another", "pass any_base=True to use it")
            first = taken.setdefault(self._first_names[name], (name, delta))
            if first[0] == name:
                checked[self._first_names[name]] = delta.to(parameter.device)
            elif not _equal(first[1], delta):
                raise value_error(op, name, f"the task vector of {first[0]}, which is the same parameter", "another")
        self._experts[expert] = checked

    def remove(self, expert: str) -> None:
        """Forgets an expert that is not active."""
        self._known("remove", expert)
        if expert in self._active:
            raise value_error("ExpertSwitcher.remove", "expert", "inactive", repr(expert), "call restore first")
        del self._experts[expert]

    def switch(self, experts: str | Mapping[str, Coefficient] | None) -> None:
        """Makes the model the base plus these experts: one name, or names with their coefficients; None: the base.

        Raises:
            RuntimeError: a weight was changed since the last switch. No weight is changed then.
        """
        wanted = {} if experts is None else {experts: 1.0} if isinstance(experts, str) else dict(experts)
        for expert in wanted:
            self._known("switch", expert)
        plan = self._plan(wanted)
        self._check_untouched()
        before = self._applied
        self._take_back()
        try:
            self._apply(plan)
        except BaseException:
            self._take_back()
            self._apply(before)
            raise
        self._active = wanted
        self.generation += 1

    def restore(self) -> None:
        """The base, bit for bit."""
        self.switch(None)

    @contextmanager
    def using(self, experts: str | Mapping[str, Coefficient] | None) -> Iterator[None]:
        """:meth:`switch` for a while; what was active before is active again after it."""
        before = self.active
        self.switch(experts)
        try:
            yield
        finally:
            self.switch(before)

    def _known(self, method: str, expert: str) -> None:
        if expert not in self._experts:
            known = ", ".join(self._experts) or "none"
            raise value_error(f"ExpertSwitcher.{method}", "expert", f"one that was added ({known})", repr(expert))

    def _plan(self, wanted: Mapping[str, Coefficient]) -> Plan:
        """Parameter's name -> what to add to it; refuses numbers that cannot be added before anything is."""
        plan: Plan = {}
        for expert, coefficient in wanted.items():
            for name, delta in self._experts[expert].items():
                value = float(coefficient(name) if callable(coefficient) else coefficient)
                if value == 0:
                    continue
                self._check_patch(expert, name, delta, value, plan)
                if not isinstance(delta, Patch) and not abs(value * delta.scale) <= torch.finfo(torch.float32).max:
                    raise value_error("ExpertSwitcher.switch", f"coefficient of {name}", "finite", value)
                deltas, coefficients = plan.setdefault(name, ([], []))
                deltas.append(delta)
                coefficients.append(value)
        return plan

    def _check_patch(self, expert: str, name: str, delta: Delta, coefficient: float, plan: Plan) -> None:
        op = "ExpertSwitcher.switch"
        if isinstance(delta, Patch) and coefficient != 1:
            raise value_error(op, f"coefficient of {name}", f"1 or 0: {expert!r} has a patch of it", coefficient)
        if name in plan and (isinstance(delta, Patch) or isinstance(plan[name][0][0], Patch)):
            raise value_error(op, name, "changed by one expert where one has a patch of it", f"another and {expert!r}")

    def _check_untouched(self) -> None:
        for name, undo in self._undo.items():
            parameter = self._parameters[name]
            if not parameter.is_inference() and parameter._version != undo.version:
                raise RuntimeError(
                    f"ExpertSwitcher: {name} was changed since the last switch; nothing was switched. Restore before "
                    "training or loading weights"
                )

    def _apply(self, plan: Plan) -> None:
        self._applied = plan
        for name, (deltas, coefficients) in plan.items():
            parameter = self._parameters[name]
            if isinstance(deltas[0], Patch):
                apply_patch_(parameter, deltas[0])
                self._undo[name] = _Patched(deltas[0], None if parameter.is_inference() else parameter._version)
            else:
                self._undo[name] = apply_(parameter, deltas, coefficients, undo=True)

    def _take_back(self) -> None:
        for name, undo in self._undo.items():
            if isinstance(undo, _Patched):
                unapply_patch_(self._parameters[name], undo.patch)
            else:
                unapply_(self._parameters[name], undo)
        self._undo.clear()


def _equal(one: Delta, other: Delta) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Packed):
        return torch.equal(one.data, other.data)
    return one.scale == other.scale and torch.equal(one.planes, other.planes)
