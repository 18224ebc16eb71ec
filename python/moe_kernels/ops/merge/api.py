"""Several fine-tunes of one model as one: :func:`merge` and :func:`merge_tensors`."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moe_kernels._checks import FLOAT_DTYPES, check_same_device, check_tensor, dtype_error, shape_error, value_error
from moe_kernels._dispatch import Backend
from moe_kernels.ops.merge.methods import (
    METHODS,
    Settings,
    check_settings,
    check_takes_task_vectors,
    merge_one,
    prepare,
)
from moe_kernels.ops.merge.recipe import Expert, held
from moe_kernels.ops.task_vector.packed import PackedDelta
from moe_kernels.ops.task_vector.ternary import TernaryDelta

Weights = Sequence[float] | Callable[[str], Sequence[float]]


def merge(
    base: Tensor | Mapping[str, Tensor] | None,
    experts: Sequence[Expert | Mapping[str, Expert]],
    *,
    method: str = "ties",
    semantics: str = "official",
    weights: Weights | None = None,
    density: float = 1.0,
    lambda_: float = 1.0,
    normalize: bool | None = None,
    gamma: float = 0.01,
    epsilon: float = 0.1,
    select_topk: float = 1.0,
    t: float = 0.5,
    seed: int = 0,
    backend: Backend = "auto",
) -> Tensor | dict[str, Tensor]:
    """Merges fine-tunes of one base, tensor by tensor.

    ``t_k = expert_k - base`` runs in float32 (float64 for float64), and the result is rounded once to the dtype of the
    experts. On the CPU nothing is allocated but the result and a block of 1024 elements an expert (2^20 where whole
    rows or the variances of all experts are looked at), and a mapping may load its tensors when it is asked for them:
    one name is held at a time.

    ================  ==============================================================================================
    method            what it does; the exact sums are in :mod:`.recipe`
    ================  ==============================================================================================
    linear            ``sum_k w_k expert_k``, over ``sum_k w_k`` unless ``normalize=False``; ``base`` is not used
    slerp             spherical interpolation from the base, or the first of two experts, to the other, at ``t``
    task_arithmetic   ``base + lambda sum_k w_k t_k`` (arXiv 2212.04089)
    magnitude_prune   the same of the largest entries of each tensor, as PEFT
    ties              trim, elect signs, mean of those that agree (arXiv 2306.01708)
    dare_linear       entries dropped at random, the others rescaled, then task arithmetic (arXiv 2311.03099)
    dare_ties         the same, then TIES' election and mean
    breadcrumbs       the largest ``gamma`` dropped, of the rest the largest ``density`` kept (arXiv 2312.06795)
    breadcrumbs_ties  the same, then an election (mergekit)
    della             dropped at random, the small ones of a row more often, then an election (arXiv 2406.11617)
    della_linear      the same without an election
    sce               weights by the mean square of each task vector, after an election (arXiv 2408.07990)
    model_stock       towards the mean as far as the angle between task vectors says (arXiv 2403.19522)
    ================  ==============================================================================================

    Libraries mean different things by these names, so the meaning has a name too:

    ===========  ==================================  ==============================  ==============================
    semantics    official                            peft                            mergekit
    ===========  ==================================  ==============================  ==============================
    ties trims   the whole model at once             each tensor                     each tensor
    keeps        ``int(n density) + 1`` and ties     ``int(n density)``              ``max(1, int(n density))``
    weights      none, ``lambda_`` at the end        after the election              before the election
    sign of 0    the sum of all signs of the model   plus                            plus
    divisor      number that agree                   number that agree               sum of the agreeing weights
                                                                                     (``normalize``, ties' default)
    dare keeps   divided by ``density``              divided by ``density``          to the same sum of magnitudes
    breadcrumbs  by rows of the last dimension       (none)                          by tensor
    ===========  ==================================  ==============================  ==============================

    A density of 0 keeps nothing (the base), except official TIES' one entry; random numbers depend on ``seed``, the
    tensor's name, the expert and the position alone. Of equal magnitudes the first are the larger.

    Args:
        base: what the experts were fine-tuned from; may be None for linear and slerp.
        experts: tensors of one shape and dtype, or mappings of the same names. Tensors that are not floating must
            be equal in all of them, and are passed on. Or task vectors ``t_k`` themselves, ternary or packed, which
            are read as they lie, a block at a time: task_arithmetic, ties (with density 1: they are trimmed) and
            dare. A dict of those need not have every name of the base: what it lacks, its expert did not change.
        weights: one for each expert, default 1; or a function of the tensor's name that gives them (layer tables).
        density, lambda_, normalize, gamma, epsilon, select_topk, t: as above.
        seed: of the random masks.
        backend: see :mod:`moe_kernels`.

    Returns:
        The merged tensor, or one for each name.

    Raises:
        ValueError: names or shapes that differ, a method that the semantics do not have, NaN or infinities where
            entries are chosen by magnitude or a sum decides over the tensor (mergekit's DARE, sce, model_stock, slerp);
            the message names the tensor. Elsewhere they pass through; a random mask may drop them.
    """
    given = dict(method=method, semantics=semantics, weights=weights, density=density, lambda_=lambda_)
    given |= dict(normalize=normalize, gamma=gamma, epsilon=epsilon, select_topk=select_topk, t=t, seed=seed)
    if isinstance(experts, Tensor) or not isinstance(experts, Sequence):
        raise TypeError(f"merge: experts must be a sequence of tensors or mappings, got {type(experts).__name__}")
    if experts and all(isinstance(expert, Expert) for expert in experts):
        check_base = base is None or isinstance(base, Tensor)
        if not check_base:
            raise TypeError(f"merge: base must be a tensor like the experts, got {type(base).__name__}")
        wrapped = None if base is None else {"": base}
        return dict(merge_tensors(wrapped, [{"": expert} for expert in experts], backend=backend, **given))[""]
    return dict(merge_tensors(base, experts, backend=backend, **given))


def merge_tensors(
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Expert]],
    *,
    method: str = "ties",
    semantics: str = "official",
    weights: Weights | None = None,
    density: float = 1.0,
    lambda_: float = 1.0,
    normalize: bool | None = None,
    gamma: float = 0.01,
    epsilon: float = 0.1,
    select_topk: float = 1.0,
    t: float = 0.5,
    seed: int = 0,
    names: Iterable[str] | None = None,
    progress: Callable[[str], object] | None = None,
    backend: Backend = "auto",
) -> Iterator[tuple[str, Tensor]]:
    """:func:`merge`, one name after the other as they are asked for: for checkpoints that memory does not hold.

    Args:
        names: which tensors to give, in this order, asked for one by one; default all, sorted. What is of the whole
            model (official TIES' threshold and majority) is of all of them, whichever are given.
        progress: is called with a tensor's name when a pass over it ends; official TIES has two before the last
            of a model of several tensors, and one more where experts cancel out exactly.
    """
    op = "merge"
    choices = (density, lambda_, normalize, gamma, epsilon, select_topk, t, seed)
    settings = Settings(method, semantics, *choices, len(experts), base is not None, backend)
    check_settings(op, settings)
    mappings = [*experts, *([] if base is None else [base])]
    for mapping in mappings:
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{op}: base and experts must be all tensors or all mappings, got {type(mapping).__name__}")
    if base is None and METHODS[method].needs_base:
        raise value_error(op, "base", f"given for method {method!r}", None)
    known = sorted(mappings[-1])
    compressed = [_is_of_task_vectors(mapping) for mapping in mappings]
    if any(compressed):
        if base is None:
            raise value_error(op, "base", "given where experts are task vectors", None)
        check_takes_task_vectors(op, settings)
        unknown = sorted({name for mapping in experts for name in mapping} - set(known))
        if unknown:
            raise value_error(op, "experts", "task vectors of the base's tensors", f"others: {', '.join(unknown[:8])}")
    for mapping in [mapping for mapping, is_compressed in zip(mappings, compressed, strict=True) if not is_compressed]:
        differing = sorted(set(known) ^ set(mapping))
        if differing:
            raise value_error(op, "base and experts", "of the same names", f"not in all: {', '.join(differing[:8])}")
    of_name = _weights(op, weights, len(experts))
    if not METHODS[method].has_weights(semantics) and any(of_name(name) != [1.0] * len(experts) for name in known):
        remedy = "give lambda_, or semantics='peft' or 'mergekit'"
        raise value_error(op, "weights", f"1 for {semantics} {method}, which has none", "others", remedy)

    def load(name: str) -> tuple[Tensor | None, list[Expert]]:
        """The base's tensor and the experts'; none of these where none changed it."""
        given = [
            mapping.get(name) if lacking else mapping[name]
            for mapping, lacking in zip(experts, compressed, strict=False)
        ]
        first = given[-1] if base is None else base[name]
        _check_tensors(op, name, [*(expert for expert in given if expert is not None), first])
        if first.is_floating_point() and any(expert is not None for expert in given):
            given = [_nothing(first) if expert is None else expert for expert in given]
        else:
            given = [expert for expert in given if expert is not None]
        given = [expert.detach().contiguous() if isinstance(expert, Tensor) else expert for expert in given]
        return (None if base is None else first.detach().contiguous()), given

    return _generate(op, settings, known, names, load, of_name, progress or (lambda name: None))


def _generate(op, settings, known, names, load, of_name, progress) -> Iterator[tuple[str, Tensor]]:
    whole = prepare(op, settings, known, load, progress)
    for name in known if names is None else names:
        if name not in known:
            raise value_error(op, "names", "of the experts' tensors", repr(name))
        base, experts = load(name)
        if experts and (experts[0] if base is None else base).is_floating_point():
            yield name, merge_one(op, settings, whole, name, base, experts, of_name(name))
        else:
            yield name, experts[0] if base is None else base
        progress(name)


def _is_of_task_vectors(mapping: Mapping[str, Expert]) -> bool:
    # other mappings load a tensor when they are asked for it, and hold no task vectors
    return isinstance(mapping, dict) and any(isinstance(one, (TernaryDelta, PackedDelta)) for one in mapping.values())


def _nothing(base: Tensor) -> TernaryDelta:
    """The task vector of an expert that did not change the tensor."""
    planes = torch.zeros(-(-base.numel() // 64), 2, dtype=torch.int64, device=base.device)
    return TernaryDelta(planes, base.shape)


def _weights(op: str, weights: Weights | None, count: int) -> Callable[[str], list[float]]:
    def of_name(name: str) -> list[float]:
        given = [1.0] * count if weights is None else weights(name) if callable(weights) else weights
        given = [float(weight) for weight in given]
        if len(given) != count:
            raise value_error(op, "weights", f"{count} numbers, one an expert", f"{len(given)}")
        if not all(map(math.isfinite, given)):
            raise value_error(op, "weights", "finite", given)
        return given

    return of_name


def _check_tensors(op: str, name: str, tensors: list[Tensor]) -> None:
    what = name or "experts"
    first = tensors[-1]
    for tensor in tensors:
        if isinstance(tensor, (TernaryDelta, PackedDelta)):
            if tensor.shape != first.shape:
                raise shape_error(op, what, f"{list(tensor.shape)} like its task vector", first)
            if not first.is_floating_point():
                raise dtype_error(op, what, FLOAT_DTYPES, first, "it has a task vector")
            continue
        check_tensor(op, what, tensor)
        if tensor.shape != first.shape:
            raise shape_error(op, what, f"{list(first.shape)} in all models", tensor, "the models must be of one shape")
        if tensor.dtype != first.dtype:
            raise dtype_error(op, what, f"{first.dtype} in all models", tensor)
    check_same_device(op, **{f"{what} of model {i}": held(tensor) for i, tensor in enumerate(tensors)})
    if first.is_floating_point():
        if first.dtype not in FLOAT_DTYPES:
            raise dtype_error(op, what, FLOAT_DTYPES, first)
    elif not all(torch.equal(tensor, first) for tensor in tensors):
        raise value_error(op, what, "equal in all models, as it is no floating tensor", f"others of {first.dtype}")
