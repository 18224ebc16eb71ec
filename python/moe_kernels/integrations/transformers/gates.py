"""Exact recognition of what an experts module does between its projections, as :class:`Activation` data.

Two things are recognised, and both must be: the code of ``_apply_gate`` (the function itself, or a text that equals a
known one token for token) and the exact class of ``act_fn``. Constants are read from the module at every call. What is
not recognised is not guessed: the caller then runs the module's own ``_apply_gate``.
"""

import hashlib
import inspect
import io
import math
import tokenize
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from transformers import activations
from transformers.integrations.moe import _default_apply_gate

from moe_kernels.activation import Activation


class Gate(NamedTuple):
    """A recognised gate.

    Attributes:
        activation: what stands between the two projections.
        interleaved: whether gate and up rows of the first projection alternate.
    """

    activation: Activation
    interleaved: bool


#: ``act_fn``, by exact class or by identity -> (kind, alpha) of :class:`Activation`. FastGELUActivation is left out:
#: its constant has ten digits, so it is no tanh GELU in float64.
_KINDS: dict[object, tuple[str, float]] = {
    nn.SiLU: ("silu", 1.0),
    activations.SiLUActivation: ("silu", 1.0),
    activations.QuickGELUActivation: ("silu", 1.702),
    activations.GELUActivation: ("gelu", 1.0),
    activations.GELUTanh: ("gelu_tanh", 1.0),
    activations.NewGELUActivation: ("gelu_tanh", 1.0),
    activations.AccurateGELUActivation: ("gelu_tanh", 1.0),
    nn.ReLU: ("relu", 1.0),
    activations.ReLUSquaredActivation: ("relu2", 1.0),
    F.silu: ("silu", 1.0),
    F.gelu: ("gelu", 1.0),
    F.relu: ("relu", 1.0),
}


def activation_kind(act_fn: object) -> tuple[str, float] | None:
    """``(kind, alpha)`` of an activation that is known by its exact class or identity, else None.

    A subclass, a module with hooks and a module whose forward was replaced on the instance are not known.
    """
    if not isinstance(act_fn, nn.Module):
        return _KINDS.get(act_fn)
    if "forward" in act_fn.__dict__ or act_fn._forward_hooks or act_fn._forward_pre_hooks:
        return None
    if act_fn._backward_hooks or act_fn._backward_pre_hooks:
        return None
    return _KINDS.get(type(act_fn))


def recognise(experts: nn.Module) -> Gate | None:
    """The gate of an experts module, or None where its own ``_apply_gate`` / ``act_fn`` must run."""
    return recognise_gated(experts) if experts.has_gate else recognise_plain(experts.act_fn, gated=False)


def recognise_plain(act_fn: object, *, gated: bool = True) -> Gate | None:
    """The gate ``act_fn(gate) * up``, or ``act_fn`` alone where ungated; None where ``act_fn`` is not known."""
    kind = activation_kind(act_fn)
    return None if kind is None else gate(*kind, gated=gated)


def recognise_gated(experts: nn.Module) -> Gate | None:
    """The gate that the module's ``_apply_gate`` computes, or None where that must run itself."""
    if "_apply_gate" in experts.__dict__:
        return None
    recipe = _RECIPES.get(_recipe_name(type(experts)._apply_gate))
    return None if recipe is None else recipe(experts)


def gate(
    kind: str,
    alpha: float = 1.0,
    limit: float = math.inf,
    up_offset: float = 0.0,
    gated: bool = True,
    interleaved: bool = False,
    clamp: str = "input",
) -> Gate | None:
    """A :class:`Gate`; None where the numbers are none (a tensor, None) or not what :class:`Activation` takes."""
    if not isinstance(alpha, (int, float)) or not isinstance(limit, (int, float)) or not limit > 0:
        return None
    # traced code builds its own: a lookup would make torch.compile guard on the whole dictionary, and it grows
    if torch.compiler.is_compiling():
        # to text and back, which is exact: torch.compile(dynamic=True) makes symbols of floats, and guards where one is
        # made text; Activation takes numbers only
        alpha, limit, up_offset = float(f"{alpha}"), float(f"{limit}"), float(f"{up_offset}")
        return Gate(Activation(kind, gated, alpha, limit, clamp, up_offset), interleaved)
    key = (kind, alpha, limit, up_offset, gated, interleaved, clamp)
    known = _GATES.get(key)
    if known is None:
        known = _GATES[key] = Gate(Activation(kind, gated, alpha, limit, clamp, up_offset), interleaved)
    return known


#: building an Activation costs 3 us, looking it up 0.3
_GATES: dict[tuple, Gate] = {}


def fingerprint(function: Callable) -> str:
    """Hash of a function's source without comments, docstrings and layout; empty where there is no source."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return ""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    words, previous = [], tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc(source)).readline):
        docstring = token.type == tokenize.STRING and previous in (tokenize.INDENT, tokenize.NEWLINE)
        if token.type not in layout and not docstring:
            words.append(token.string)
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            previous = token.type
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


# safe to assume constant: torch.compile guards on the identity of the function
@torch.compiler.assume_constant_result
def _recipe_name(apply_gate: Callable) -> str:
    name = _RECIPE_NAMES.get(apply_gate)
    if name is None:
        name = "default" if apply_gate is _default_apply_gate else fingerprint(apply_gate)
        _RECIPE_NAMES[apply_gate] = name
    return name


_RECIPE_NAMES: WeakKeyDictionary[Callable, str] = WeakKeyDictionary()


def _plain(experts: nn.Module) -> Gate | None:
    return recognise_plain(experts.act_fn)


def _clamped(experts: nn.Module) -> Gate | None:
    kind = activation_kind(experts.act_fn)
    return None if kind is None else gate(*kind, experts.limit)


def _clamped_silu(experts: nn.Module) -> Gate | None:
    return gate("silu", 1.0, experts.swiglu_limit)


def _gpt_oss(experts: nn.Module) -> Gate | None:
    return gate("silu", experts.alpha, experts.limit, 1.0, interleaved=True)


def _gpt_oss_concatenated(experts: nn.Module) -> Gate | None:
    return gate("silu", experts.alpha, experts.limit, 1.0)


def _minimax_m3(experts: nn.Module) -> Gate | None:
    return gate("silu", experts.swiglu_alpha, experts.swiglu_limit, 1.0)


def _fp8(experts: nn.Module) -> Gate | None:
    if experts.gate_softcap is not None:
        return None
    if experts.swiglu_alpha is not None:
        return gate("silu", experts.swiglu_alpha, experts.swiglu_limit, 1.0)
    return _plain(experts) if experts.limit is None else _clamped(experts)


def _step(experts: nn.Module) -> Gate | None:
    kind = activation_kind(experts.act_fn)
    return None if kind is None else gate(*kind, experts.limit, clamp="output")


#: name of an ``_apply_gate``: "default" or its fingerprint -> what it computes. The tests hold each to its class.
_RECIPES: dict[str, Callable[[nn.Module], Gate | None]] = {
    "default": _plain,
    "c8d5798a6ed89de1": _plain,  # beam: in float32, as the kernels do anyway
    "8ac057487ab6184c": _clamped,  # deepseek_v4
    "e50d92fc68832328": _clamped_silu,  # hy_v4, glm5_next
    "a7f9b5b0d88e31cf": _gpt_oss,
    "a8aad4d0d0c8d0ac": _gpt_oss_concatenated,  # openai_privacy_filter
    "5fd2dc54dce3646a": _minimax_m3,  # minimax_m3_vl
    "2010d1f4e1592a50": _step,  # step3p7
    "04c824ea0acbe03b": _fp8,  # FP8Experts
}
