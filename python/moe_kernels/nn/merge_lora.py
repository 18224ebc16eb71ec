"""One adapter from several: :func:`merge_lora`, and tables of which layer takes which (:class:`LayerMap`)."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from moe_kernels._checks import shape_error, value_error


def merge_lora(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    weights: Sequence[float],
    *,
    scaling: Sequence[float] | None = None,
    method: Literal["cat", "linear"] = "cat",
) -> tuple[Tensor, Tensor]:
    """Merges adapters of one layer into one of scaling 1.

    * ``"cat"``: ``B A = sum_i w_i s_i B_i A_i``, exactly, of rank ``sum r_i``. Weights 1/K are SELMA's merge of K
      skills (arXiv 2403.06952).
    * ``"linear"``: ``A = sum_i sqrt(w_i s_i) A_i``, ``B = sum_i sqrt(w_i s_i) B_i`` (PEFT's "linear"), of the adapters'
      own rank: factor by factor, so that cross terms ``B_i A_j`` join in. It is not the weighted sum of the adapters.

    Args:
        lora_a: of each adapter [rank, in]; lora_b: of each [out, rank].
        weights: of each adapter; at least 0 for "linear".
        scaling: of each adapter; None: 1.

    Returns:
        lora_a [rank, in] and lora_b [out, rank]. Differentiable in the factors.
    """
    op = "merge_lora"
    count = len(lora_a)
    for name, found in (("lora_b", lora_b), ("weights", weights), ("scaling", scaling)):
        if found is not None and len(found) != count:
            raise value_error(op, name, f"one for each of {count} adapters", f"{len(found)}")
    if count == 0:
        raise value_error(op, "lora_a", "at least one adapter", "none")
    for i, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        if a.dim() != 2 or a.shape[1] != lora_a[0].shape[1]:
            raise shape_error(op, f"lora_a[{i}]", f"[rank, in={lora_a[0].shape[1]}]", a)
        if b.shape != (lora_b[0].shape[0], a.shape[0]):
            raise shape_error(op, f"lora_b[{i}]", f"[out={lora_b[0].shape[0]}, rank={a.shape[0]}]", b)
    factors = [w * s for w, s in zip(weights, scaling or [1.0] * count, strict=True)]
    if method == "cat":
        return torch.cat(list(lora_a)), torch.cat([c * b for c, b in zip(factors, lora_b, strict=True)], 1)
    if method != "linear":
        raise value_error(op, "method", "'cat' or 'linear'", repr(method))
    if min(factors) < 0:
        raise value_error(op, "weights", "at least 0 for method='linear'", list(weights), "use method='cat'")
    ranks = {a.shape[0] for a in lora_a}
    if len(ranks) > 1:
        raise value_error(op, "lora_a", "of one rank for method='linear'", sorted(ranks), "use method='cat'")
    roots = [c**0.5 for c in factors]
    return tuple(sum(c * f for c, f in zip(roots, found, strict=True)) for found in (lora_a, lora_b))


class LayerMap:
    """Which adapters a layer takes and how much of each: the first pattern that its name matches; none: no adapter.

    ``{pattern: {adapter: weight}}``. One entry for all layers, weights 1/K, is SELMA's mixture (arXiv 2403.06952); see
    :meth:`swap` for Layer Swapping. A map is served under a name of its own in mixed batches
    (:meth:`moe_kernels.integrations.peft.PeftAdapters.define`).

    Args:
        table: regular expression, found anywhere in a module's name -> adapters and weights.
    """

    def __init__(self, table: Mapping[str, Mapping[str, float]]):
        self.table = [(re.compile(pattern), dict(weights)) for pattern, weights in table.items()]

    def __call__(self, name: str) -> dict[str, float]:
        """Adapters and weights of the module of this name."""
        return next((weights for pattern, weights in self.table if pattern.search(name)), {})

    @property
    def adapters(self) -> set[str]:
        """All that are named."""
        return {adapter for _, weights in self.table for adapter in weights}

    @classmethod
    def swap(
        cls, outer: str, inner: str, num_layers: int, *, bottom: int, top: int, transition: int = 1, prefix=r"layers\."
    ) -> "LayerMap":
        """Layer Swapping (arXiv 2410.01335): ``outer`` (the language) at both ends, ``inner`` (the task) between.

        Args:
            num_layers: decoder layers; ``bottom`` and ``top`` of them take ``outer``, and between these and ``inner``
                lie ``transition`` layers with half of each.
            prefix: regular expression before a layer's number in module names.
        """
        if min(bottom, top, transition) < 0 or bottom + top + 2 * transition > num_layers:
            expected = f"at least 0, with bottom + top + 2 * transition at most num_layers={num_layers}"
            raise value_error("LayerMap.swap", "bottom, top and transition", expected, (bottom, top, transition))
        table = {}
        for layer in range(num_layers):
            depth = min(layer - bottom, num_layers - 1 - top - layer)
            weights = {outer: 1.0} if depth < 0 else {outer: 0.5, inner: 0.5} if depth < transition else {inner: 1.0}
            table[rf"{prefix}{layer}(\.|$)"] = weights
        return cls(table)
