"""Weights that are solved for each row: :func:`tilt_stats` and :func:`solve_tilt`, and the methods that use them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels._checks import check_same_device, check_tensor, dtype_error, shape_error, value_error
from moe_kernels._dispatch import Backend, resolve
from moe_kernels.ops.logit_fusion import native, reference
from moe_kernels.ops.logit_fusion.api import check_vocab, fuse_logits

#: position in these tuples is the code that the kernels take (csrc/ops/logit_fusion/tilt.h)
TARGETS = ("kl", "reverse_kl", "jeffreys", "symmetry", "match")
STATUSES = ("solved", "at_low", "at_high", "broken")

Direction = Tensor | tuple[Tensor, Tensor]


class TiltStats(NamedTuple):
    """The logarithm of the partition function and its first two derivatives, each [num_rows, num_alphas] float64."""

    log_partition: Tensor
    mean: Tensor
    variance: Tensor


class TiltSolution(NamedTuple):
    """What :func:`solve_tilt` found.

    Attributes:
        alpha: [num_rows] float64; NaN in a broken row.
        residual: [num_rows] float64: the target's value less what was wanted, at the last evaluation; "match": the
            squared misfit.
        status: [num_rows] int32, positions in :data:`STATUSES`; at_low and at_high say that a bound stopped the search.
        num_sweeps: [num_rows] int32: how often the row was evaluated.
    """

    alpha: Tensor
    residual: Tensor
    status: Tensor
    num_sweeps: Tensor


def tilt_stats(
    base: Tensor,
    direction: Direction,
    alpha: Tensor | Sequence[float],
    *,
    vocab: int | None = None,
    backend: Backend = "auto",
) -> TiltStats:
    """Three sums over the exponential tilt of a distribution, on which every divergence along it depends.

    With P = softmax(base), d the direction and P_a ~ P exp(a d)::

        A(a) = log sum_v P_v exp(a d_v)        A'(a) = E_{P_a} d        A''(a) = Var_{P_a} d

        KL(P_a || P) = a A'(a) - A(a)          KL(P || P_a) = A(a) - a A'(0)

    A token at -inf in any tensor takes part in none of them; NaN, +inf, or no token left makes a row NaN.

    Args:
        base: [num_rows, vocab] logits, float32, bfloat16 or float16, or float64 like the direction.
        direction: a tensor like ``base``, or (tuned, untuned), which means their difference without making it.
            Vocabularies may differ by the padding of one tokenizer; the tokens they share take part.
        alpha: [num_alphas] for every row, or [num_rows, num_alphas].
        vocab: how many tokens take part, the first ones, as in :func:`moe_kernels.fuse_logits`.
        backend: see :mod:`moe_kernels`.

    Returns:
        float64. Not differentiable.
    """
    sources = _sources("tilt_stats", base, direction, vocab)
    alpha = torch.as_tensor(alpha, dtype=torch.float64, device=base.device)
    if alpha.dim() not in (1, 2) or (alpha.dim() == 2 and alpha.shape[0] != base.shape[0]):
        raise shape_error("tilt_stats", "alpha", f"[num_alphas] or [num_rows={base.shape[0]}, num_alphas]", alpha)
    alpha = alpha.detach().expand(base.shape[0], -1)
    op = reference if resolve("tilt_stats", backend, base.device.type) == "reference" else native
    return TiltStats(*op.tilt_stats(sources, alpha).unbind(2))


def solve_tilt(
    base: Tensor,
    direction: Direction,
    target: str,
    values: float | Tensor | tuple[Tensor, Tensor] = 0.0,
    *,
    bounds: tuple[float, float] = (0.0, 2.0),
    grid: int | None = None,
    vocab: int | None = None,
    backend: Backend = "auto",
) -> TiltSolution:
    """How far to tilt each row: the alpha at which a divergence takes a given value.

    ===========  ===========================================================  ====================================
    target       alpha solves                                                 used by
    ===========  ===========================================================  ====================================
    kl           KL(P_a || P) = value                                         a budget on leaving the base model
    reverse_kl   KL(P || P_a) = value                                         the same, the other way round
    jeffreys     KL(P_a || P) + KL(P || P_a) = value                          a smooth form of "match"
    symmetry     KL(P_a || P) - KL(P_a || P_1) = value                        Chernoff's point (0), CP-Fuse
    match        least (KL(P_a || P) - kl)^2 + (KL(P || P_a) - reverse)^2     Dynamic Logits Fusion
    ===========  ===========================================================  ====================================

    (:func:`tilt_stats` has the notation.) The first four rise with alpha, so a bracketed Newton iteration finds the
    one root. The two divergences of "match" each have one root, and the smallest misfit lies between them; a sweep over
    nine points there finds the valley, since there may be several, and the same iteration its bottom.

    Args:
        base, direction: as for :func:`tilt_stats`.
        target: see above.
        values: a number or [num_rows]; for "match" the pair (kl, reverse), each a number or [num_rows].
        bounds: alpha stays within; not below 0, "symmetry" excepted.
        grid: for "match": the first of ``grid`` evenly spaced points, bounds included, whose misfit is the smallest,
            as the method's authors search. 2 exponentials a token, however many points.
        vocab: as for :func:`tilt_stats`.
        backend: see :mod:`moe_kernels`.

    Returns:
        a :class:`TiltSolution`. Alpha is a constant: no gradient goes through it.

    Source: Fan et al., "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion", arXiv 2406.15480.
    """
    sources = _sources("solve_tilt", base, direction, vocab)
    if target not in TARGETS:
        raise value_error("solve_tilt", "target", f"one of {', '.join(TARGETS)}", repr(target))
    low, high = (float(bound) for bound in bounds)
    if not (-math.inf < low < high < math.inf and (low >= 0 or target == "symmetry")):
        expected = "finite and rising" + ("" if target == "symmetry" else ", from at least 0")
        raise value_error("solve_tilt", "bounds", expected, bounds)
    if grid is not None and (target != "match" or grid < 2):
        raise value_error("solve_tilt", "grid", "at least 2, for target='match'", grid)
    is_pair = isinstance(values, tuple)
    if is_pair != (target == "match") or (is_pair and len(values) != 2):
        expected = "a pair (kl, reverse)" if target == "match" else "a number or a tensor"
        raise value_error("solve_tilt", "values", f"{expected} for target={target!r}", type(values).__name__)
    columns = [_value(value, base) for value in (values if is_pair else (values, 0.0))]
    op = reference if resolve("solve_tilt", backend, base.device.type) == "reference" else native
    return TiltSolution(*op.solve_tilt(sources, torch.stack(columns, 1), TARGETS.index(target), low, high, grid or 0))


def dynamic_solution(
    base: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor]],
    *,
    expert: int = 0,
    bounds: tuple[float, float] = (0.0, 2.0),
    grid: int | None = None,
    vocab: int | None = None,
    backend: Backend = "auto",
) -> TiltSolution:
    """The weight of each row in :func:`dynamic_fusion`, which has the arguments."""
    if not 0 <= expert < len(pairs):
        raise value_error("dynamic_fusion", "expert", f"in [0, {len(pairs)}), the number of pairs", expert)
    kl, reverse = [], []
    for tuned, untuned in pairs:
        stats = tilt_stats(untuned, (tuned, untuned), [0.0, 1.0], vocab=vocab, backend=backend)
        kl.append(stats.mean[:, 1] - stats.log_partition[:, 1])
        reverse.append(stats.log_partition[:, 1] - stats.mean[:, 0])
    values = (torch.stack(kl).mean(0), torch.stack(reverse).mean(0))
    return solve_tilt(base, pairs[expert], "match", values, bounds=bounds, grid=grid, vocab=vocab, backend=backend)


def dynamic_fusion(
    base: Tensor,
    pairs: Sequence[tuple[Tensor, Tensor]],
    *,
    expert: int = 0,
    bounds: tuple[float, float] = (0.0, 2.0),
    grid: int | None = None,
    vocab: int | None = None,
    backend: Backend = "auto",
    **options,
) -> Tensor:
    """``base + alpha (tuned - untuned)``, alpha such that the large model moves as far as tuning moved the small one.

    Far is measured by both Kullback-Leibler divergences between before and after. With several pairs the authors
    search each expert's alpha with the others' at zero, against the divergences of all; a sum of squared misfits is
    smallest where the misfit from their mean is, so the mean is what the search sees.

    Args:
        base: the large model's logits [num_rows, vocab].
        pairs: (tuned, untuned) logits of each small model.
        expert: whose pair is added.
        bounds, grid, vocab: as for :func:`solve_tilt`; the authors' search is ``grid=21``.
        options: of :func:`fuse_logits`.

    Source: Dynamic Logits Fusion, arXiv 2406.15480.
    """
    tilt = {"vocab": vocab, "backend": backend}
    alpha = _read(dynamic_solution(base, pairs, expert=expert, bounds=bounds, grid=grid, **tilt).alpha)
    weights = torch.stack([torch.ones_like(alpha), alpha, -alpha], 1)
    return fuse_logits([base, *pairs[expert]], weights, **tilt, **options)


def copyright_protecting_fusion(
    first: Tensor,
    second: Tensor,
    *,
    first_path: float | Tensor = 0.0,
    second_path: float | Tensor = 0.0,
    vocab: int | None = None,
    backend: Backend = "auto",
    **options,
) -> Tensor:
    """The distribution whose larger divergence from two models, less what each has gathered so far, is the smallest.

    ``min_p max_i KL(p || p_i) - path_i``, path_i the log-probability of the text so far under model i less that under
    the fusion. The solution is a geometric mean, and inside (0, 1) the two terms are equal: one root in place of the
    authors' grid over both exponents (the solution's sum to one).

    Args:
        first, second: logits [num_rows, vocab].
        first_path, second_path: numbers or [num_rows].
        vocab: as for :func:`tilt_stats`.
        options: of :func:`fuse_logits`.

    Source: CP-Fuse, arXiv 2407.20105.
    """
    offset = torch.as_tensor(first_path, dtype=torch.float64) - torch.as_tensor(second_path, dtype=torch.float64)
    tilt = {"vocab": vocab, "backend": backend}
    alpha = solve_tilt(first, (second, first), "symmetry", offset, bounds=(0.0, 1.0), **tilt).alpha
    weights = torch.stack([_read(1 - alpha), _read(alpha)], 1)
    return fuse_logits([first, second], weights, **tilt, **options)


def _read(weight: Tensor) -> Tensor:
    """Zero made the smallest weight: it adds nothing, but its source is read, and masks what it gives no chance."""
    return weight.clamp(min=torch.finfo(torch.float32).tiny)


def _sources(op: str, base: Tensor, direction: Direction, vocab: int | None) -> list[Tensor]:
    named = {"base": base}
    if isinstance(direction, tuple):
        if len(direction) != 2:
            raise value_error(op, "direction", "a tensor or a pair (tuned, untuned)", f"{len(direction)} tensors")
        named |= {"direction[0]": direction[0], "direction[1]": direction[1]}
    else:
        named["direction"] = direction
    for name, source in named.items():
        check_tensor(op, name, source)
        if source.dim() != 2 or source.shape[1] == 0 or source.shape[0] != base.shape[0]:
            raise shape_error(op, name, f"[num_rows={base.shape[0]}, vocab_size >= 1]", source)
        if not source.is_floating_point() or (source.dtype == torch.float64) != (base.dtype == torch.float64):
            raise dtype_error(op, name, "a float, and float64 like all others or none", source)
    vocab = check_vocab(op, vocab, named)
    check_same_device(op, **named)
    return [source.detach()[:, :vocab] for source in named.values()]


def _value(value: float | Tensor, base: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float64, device=base.device)
    if value.shape not in ((), (base.shape[0],)):
        raise shape_error("solve_tilt", "values", f"[num_rows={base.shape[0]}]", value)
    return value.detach().expand(base.shape[0])
