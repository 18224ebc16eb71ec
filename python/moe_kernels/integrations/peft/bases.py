"""An adapter on another base than its own (PortLLM): how far the bases are apart, and how large the patch is."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn


class BaseChange(NamedTuple):
    """One layer of an adapter on a newer base; Frobenius norms in float64."""

    old_fingerprint: str  #: of the old weight, see :func:`fingerprint`
    new_fingerprint: str
    weight: float  #: |W|, the old weight
    change: float  #: |W' - W|
    patch: float  #: |s B A|


def fingerprint(weight: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bits: equal for equal weights, on any device."""
    digest = hashlib.sha256(f"{weight.dtype} {list(weight.shape)}".encode())
    digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_change(name: str, old: nn.Module, new: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> BaseChange:
    """Compares the weight of module ``name`` of ``old`` with ``new``.

    Raises:
        ValueError: ``old`` has no such module, or of another shape.
    """
    try:
        before = old.get_submodule(name).weight.detach()
    except AttributeError:
        raise ValueError(f"compare_bases: old_base must be a model with module {name}, got none") from None
    if before.shape != new.shape:
        raise ValueError(
            f"compare_bases: module {name} of old_base must be of shape {list(new.shape)}, got {list(before.shape)}"
        )
    a, b = lora_a.double(), lora_b.double()
    # |B A|^2 = sum of (A A^T) * (B^T B): nothing of the weight's size
    patch = abs(scaling) * ((a @ a.T) * (b.T @ b)).sum().clamp_min(0).sqrt()
    return BaseChange(
        fingerprint(before),
        fingerprint(new),
        before.double().norm().item(),
        (new.detach().double() - before.double()).norm().item(),
        patch.item(),
    )
