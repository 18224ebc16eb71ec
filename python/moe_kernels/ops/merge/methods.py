"""Each method as a recipe for one tensor, in each of its semantics."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from moe_kernels._checks import value_error
from moe_kernels._dispatch import resolve
from moe_kernels.ops.merge import native, reference
from moe_kernels.ops.merge.parts import Parts, breadcrumbs, della, sce
from moe_kernels.ops.merge.recipe import ALL, END, Expert, Recipe, Source, Undecided, random_key
from moe_kernels.ops.task_vector.api import decompress
from moe_kernels.ops.task_vector.magnitudes import INFINITY, LOW_BITS, rank, threshold
from moe_kernels.ops.task_vector.packed import PackedDelta

SEMANTICS = ("official", "peft", "mergekit")
_EVERY = frozenset(SEMANTICS)


@dataclass(frozen=True)
class Method:
    """What a method needs.

    Attributes:
        keeps: how entries are chosen: "all", "magnitude", "random", "window" (breadcrumbs), "rows" (della).
        elects: whether signs are elected.
        semantics: those that have it.
        needs_base: whether it is of differences from a base.
        unweighted: semantics in which experts have no weights.
        normalizes: whether sums are divided by the weights unless ``normalize`` says otherwise.
    """

    keeps: str = "all"
    elects: bool = False
    semantics: frozenset[str] = _EVERY
    needs_base: bool = True
    unweighted: frozenset[str] = frozenset()
    normalizes: bool = False

    def has_weights(self, semantics: str) -> bool:
        return semantics not in self.unweighted


_MERGEKIT, _OFFICIAL = frozenset({"mergekit"}), frozenset({"official"})
METHODS = {
    "linear": Method(needs_base=False, normalizes=True),
    "slerp": Method(needs_base=False, unweighted=_EVERY),
    "task_arithmetic": Method(),
    "magnitude_prune": Method("magnitude", semantics=frozenset({"peft"})),
    "ties": Method("magnitude", elects=True, unweighted=_OFFICIAL, normalizes=True),
    "dare_linear": Method("random"),
    "dare_ties": Method("random", elects=True, unweighted=_OFFICIAL),
    "breadcrumbs": Method("window", semantics=_MERGEKIT | _OFFICIAL, unweighted=_OFFICIAL),
    "breadcrumbs_ties": Method("window", elects=True, semantics=_MERGEKIT),
    "della": Method("rows", elects=True, semantics=_MERGEKIT, normalizes=True),
    "della_linear": Method("rows", semantics=_MERGEKIT),
    "sce": Method(elects=True, semantics=_MERGEKIT, unweighted=_EVERY),
    "model_stock": Method(semantics=_EVERY, unweighted=_EVERY),
}


@dataclass(frozen=True)
class Settings:
    method: str
    semantics: str
    density: float
    lambda_: float
    normalize: bool | None
    gamma: float
    epsilon: float
    select_topk: float
    t: float
    seed: int
    num_experts: int
    has_base: bool
    backend: str


@dataclass
class WholeModel:
    """What official TIES finds over all tensors: the bits of each expert's threshold, and the sign of sums of zero,
    which is found when it is asked for."""

    thresholds: list[int] = field(default_factory=list)
    zero_sign: Callable[[int], int] = int


def check_settings(op: str, settings: Settings) -> None:
    """Refuses what no method means."""
    if settings.method not in METHODS:
        raise value_error(op, "method", f"one of {', '.join(METHODS)}", repr(settings.method))
    if settings.semantics not in SEMANTICS:
        raise value_error(op, "semantics", f"one of {', '.join(SEMANTICS)}", repr(settings.semantics))
    method = METHODS[settings.method]
    if settings.semantics not in method.semantics:
        known = " or ".join(repr(one) for one in SEMANTICS if one in method.semantics)
        raise value_error(op, "semantics", f"{known} for method {settings.method!r}", repr(settings.semantics))
    for name in ("density", "gamma", "epsilon", "select_topk"):
        if not 0 <= getattr(settings, name) <= 1:
            raise value_error(op, name, "from 0 to 1", getattr(settings, name))
    for name in ("lambda_", "t"):
        if not math.isfinite(getattr(settings, name)):
            raise value_error(op, name, "finite", getattr(settings, name))
    fewest = {"slerp": 1 if settings.has_base else 2, "model_stock": 2}.get(settings.method, 1)
    most = fewest if settings.method == "slerp" else math.inf
    if not fewest <= settings.num_experts <= most:
        expected = f"{'at least ' if most > fewest else ''}{fewest} for {settings.method}"
        raise value_error(op, "the number of experts", expected, settings.num_experts)
    if method.keeps == "rows" and 0 < settings.density < 1:
        if not 0 <= settings.density - settings.epsilon <= settings.density + settings.epsilon <= 1:
            expected = "such that density - epsilon and density + epsilon are from 0 to 1"
            raise value_error(op, "epsilon", expected, settings.epsilon)


def check_takes_task_vectors(op: str, settings: Settings) -> None:
    """Those methods do that choose by chance or not at all: the entries of a task vector are the largest already."""
    able = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
    if settings.method not in able:
        expected = f"one of {', '.join(able)} for task vectors"
        raise value_error(op, "method", expected, repr(settings.method), "give whole tensors")
    if METHODS[settings.method].keeps == "magnitude" and settings.density < 1:
        raise value_error(op, "density", "1 for task vectors, which are trimmed already", settings.density)


def prepare(op: str, settings: Settings, names: list[str], load: Callable, progress: Callable) -> WholeModel:
    """The passes over the whole model that official TIES needs before the first tensor can be merged."""
    whole = WholeModel()
    method = METHODS[settings.method]
    if settings.semantics != "official" or not method.elects:
        return whole
    count = settings.num_experts

    def over_model(function: Callable[[str, Tensor | None, list[Tensor]], object]) -> None:
        for name in names:
            base, experts = load(name)
            if experts and base.is_floating_point():
                function(name, base, experts)
            progress(name)

    if method.keeps == "magnitude" and settings.density < 1 and len(names) == 1:
        base, experts = load(names[0])
        if base.is_floating_point():
            keep = min(int(base.numel() * settings.density) + 1, base.numel())
            whole.thresholds = [_bound(op, settings, names[0], expert, base, keep)[0] for expert in experts]
    elif method.keeps == "magnitude" and settings.density < 1:
        high, numel = [torch.zeros(2**16, dtype=torch.int64) for _ in range(count)], [0]

        def count_high(name: str, base: Tensor, experts: list[Expert]) -> None:
            numel[0] += base.numel()
            for counts, expert in zip(high, experts, strict=True):
                counts += _counts(op, settings, name, expert, base)

        over_model(count_high)
        keep = min(int(numel[0] * settings.density) + 1, numel[0])
        ranks = [rank(counts, keep) for counts in high]
        low = [torch.zeros(2**15, dtype=torch.int64) for _ in range(count)]

        def count_low(name: str, base: Tensor, experts: list[Expert]) -> None:
            for counts, expert, (prefix, _) in zip(low, experts, ranks, strict=True):
                counts += _kernels(op, settings, expert).count_magnitudes(expert, base, prefix).cpu()

        over_model(count_low)
        found = zip(ranks, low, strict=True)
        whole.thresholds = [prefix << LOW_BITS | rank(counts, keep - above)[0] for (prefix, above), counts in found]

    def zero_sign(signs: int) -> int:
        """``signs``: the sum of one tensor's, which may be all of the model."""
        return (signs > 0) - (signs < 0) if len(names) == 1 else of_model()

    @functools.cache
    def of_model() -> int:
        """One more pass, for the few models in which experts cancel out exactly."""
        signs = [0]

        def count_signs(name: str, base: Tensor, experts: list[Expert]) -> None:
            recipe = _recipe(op, settings, whole, name, base, experts, [1.0] * count)
            signs[0] += _kernels(op, settings, experts[0]).elected_signs(base, experts, recipe)

        over_model(count_signs)
        return (signs[0] > 0) - (signs[0] < 0)

    whole.zero_sign = zero_sign
    return whole


def merge_one(
    op: str,
    settings: Settings,
    whole: WholeModel,
    name: str,
    base: Tensor | None,
    experts: list[Expert],
    weights: list[float],
) -> Tensor:
    """One floating tensor, all of its models contiguous."""
    merge = functools.partial(_merge, op, settings)
    if settings.method == "slerp":
        pair = experts if len(experts) == 2 else [base, *experts]
        return merge(None, pair, _slerp(op, settings, name, pair))[0]
    if settings.method == "model_stock":
        return merge(base, experts, _model_stock(op, settings, name, base, experts))[0]
    method = METHODS[settings.method]
    by_rows = method.keeps == "rows" or (method.keeps == "window" and settings.semantics == "official")
    if by_rows or settings.method == "sce":
        parts = Parts(op, name, base, experts, _kernels(op, settings, base), merge)
        if settings.method == "sce":
            return sce(parts, settings.select_topk, settings.lambda_)
        recipe = _combination(settings, [Source() for _ in experts], weights)
        if method.keeps == "window":
            return breadcrumbs(parts, settings.density, settings.gamma, recipe)
        keys = [random_key(settings.seed, name, number) for number in range(len(experts))]
        return della(parts, settings.density, settings.epsilon, keys, recipe)
    linear = settings.method == "linear"
    recipe = _recipe(op, settings, whole, name, base, experts, weights)
    merged, undecided = merge(None if linear else base, experts, recipe)
    if undecided is not None:
        recipe.zero_sign = whole.zero_sign(undecided.signs)
        _decide_(op, settings, merged, undecided, base, experts, recipe)
    return merged


def _kernels(op: str, settings: Settings, tensor: Expert):
    """What counts and sums over whole tensors: on a GPU PyTorch's operations, beside the kernel that merges."""
    on_cpu = resolve(op, settings.backend, tensor.device.type) == "native" and tensor.device.type == "cpu"
    return native if on_cpu else reference


def _pass_over(op: str, settings: Settings, experts: list[Expert]) -> tuple[ModuleType, list[Expert]]:
    """The module whose ``merge`` and ``decide_`` run, and the experts as they take them."""
    # task vectors of values have kernels on the CPU alone
    has_values = any(isinstance(expert, PackedDelta) and expert.values is not None for expert in experts)
    backend = resolve(f"{op} of values" if has_values else op, settings.backend, experts[0].device.type)
    if backend == "triton":
        from moe_kernels.ops.merge import triton  # imported when it is first asked for

        return triton, [decompress(expert) if isinstance(expert, PackedDelta) else expert for expert in experts]
    return native if backend == "native" else reference, experts


def _merge(op: str, settings: Settings, base: Tensor | None, experts: list[Expert], recipe: Recipe):
    kernels, experts = _pass_over(op, settings, experts)
    return kernels.merge(base, experts, recipe)


def _decide_(op: str, settings: Settings, merged: Tensor, undecided: Undecided, base, experts, recipe: Recipe) -> None:
    kernels, experts = _pass_over(op, settings, experts)
    kernels.decide_(merged, undecided, base, experts, recipe)


def _counts(op: str, settings: Settings, name: str, expert: Tensor, base: Tensor | None) -> Tensor:
    counts = _kernels(op, settings, expert).count_magnitudes(expert, base, -1).cpu()
    if counts[INFINITY >> LOW_BITS :].any():
        remedy = "a difference beyond float32 counts as one"
        raise value_error(op, name or "experts", "finite", "NaN or an infinity", remedy)
    return counts


def _bound(op: str, settings: Settings, name: str, expert: Tensor, base: Tensor | None, keep: int) -> tuple[int, int]:
    """Bits and end index such that exactly the ``keep`` largest are above the bits, or just them and before the end."""
    numel = expert.numel()
    if keep <= 0:
        return INFINITY, 0
    if keep >= numel:
        return 0, END
    kernels = _kernels(op, settings, expert)
    try:
        found = threshold(kernels, expert, base, keep)
    except ValueError as error:
        raise value_error(op, name or "experts", "finite", error, "a difference beyond float32 counts as one") from None
    if found.wanted == found.ties:
        return found.bits, END
    return found.bits, kernels.end_of_ties(expert, base, found.bits, found.wanted)


def _recipe(
    op: str,
    settings: Settings,
    whole: WholeModel,
    name: str,
    base: Tensor | None,
    experts: list[Expert],
    weights: list[float],
) -> Recipe:
    """Of the methods whose choice of entries is one of thresholds and random numbers."""
    method, semantics = METHODS[settings.method], settings.semantics
    numel, density = (experts[0] if base is None else base).numel(), settings.density
    sources = [Source() for _ in experts]
    if method.keeps == "magnitude" and density < 1:
        for number, (source, expert) in enumerate(zip(sources, experts, strict=True)):
            if semantics == "official":
                source.lower = whole.thresholds[number]
            else:
                keep = int(density * numel)
                keep = max(1, keep) if semantics == "mergekit" and 0 < density else keep
                source.lower, source.lower_end = _bound(op, settings, name, expert, base, keep)
    elif method.keeps == "window" and density < 1:
        keep, top = int(density * numel), int(settings.gamma * numel)
        dropped = numel - keep - max(0, numel - keep - top)
        for source, expert in zip(sources, experts, strict=True):
            source.lower, source.lower_end = _bound(op, settings, name, expert, base, dropped + keep)
            if dropped > 0:
                source.upper, source.upper_end = _bound(op, settings, name, expert, base, dropped)
    elif method.keeps == "random" and density < 1:
        for number, source in enumerate(sources):
            source.keep_below, source.key = round(density * ALL), random_key(settings.seed, name, number)
        if semantics == "mergekit":
            sums = _kernels(op, settings, experts[0]).kept_magnitudes(base, experts, Recipe(sources)).tolist()
            _check_finite(op, name, [whole_sum for whole_sum, _ in sums])
            for source, (whole_sum, kept) in zip(sources, sums, strict=True):
                source.rescale = kept / whole_sum if whole_sum and kept else 1.0
        elif sources[0].keep_below > 0:  # else nothing is kept, and 0 / 0 is not to be asked for
            for source in sources:
                source.rescale = density
    return _combination(settings, sources, weights)


def _combination(settings: Settings, sources: list[Source], weights: list[float]) -> Recipe:
    """How the kept entries become one: weights, election, divisor."""
    method, semantics = METHODS[settings.method], settings.semantics
    normalize = method.normalizes if settings.normalize is None else settings.normalize
    recipe = Recipe(sources, lambda_=settings.lambda_)
    for source, weight in zip(sources, weights, strict=True):
        if semantics == "mergekit":
            source.before, source.divisor = weight, weight
        else:
            source.after = weight
    if method.elects:
        recipe.election = "sign_of_sum" if semantics == "official" else "sum_not_negative"
        if semantics != "mergekit":
            recipe.divisor = "count"
        elif normalize:
            recipe.divisor = "weights"
    elif normalize:
        total = math.fsum(weights)
        recipe.divisor, recipe.constant = "constant", total if abs(total) >= 1e-8 else 1.0
    return recipe


def _model_stock(op: str, settings: Settings, name: str, base: Tensor, experts: list[Expert]) -> Recipe:
    """``base + ratio * mean(t)``, ``ratio = N cos / (1 + (N - 1) cos)`` with the mean cosine between task vectors.

    A task vector of zero has the angle of none: its cosines are 0. mergekit takes the product of two norms for at least
    1e-6, which moves small tensors to the base.
    """
    count = len(experts)
    inner = torch.zeros(count, count, dtype=torch.float64)
    for part in _parts(base.numel()):
        t = torch.stack([(expert.view(-1)[part].double() - base.view(-1)[part].double()) for expert in experts])
        inner += (t @ t.T).cpu()
    _check_finite(op, name, inner.diagonal().tolist())
    norms = inner.diagonal().sqrt()
    cosines = []
    for i in range(count):
        for j in range(i + 1, count):
            product = float(norms[i] * norms[j])
            cosines.append(max(-1.0, min(1.0, float(inner[i, j]) / product)) if product else 0.0)
    cosine = math.fsum(cosines) / len(cosines)
    denominator = 1 + (count - 1) * cosine
    ratio = count * cosine / denominator if abs(denominator) >= 1e-6 else 0.0
    sources = [Source() for _ in experts]
    return Recipe(sources, divisor="constant", constant=float(count), lambda_=ratio * settings.lambda_)


def _slerp(op: str, settings: Settings, name: str, experts: list[Expert]) -> Recipe:
    """``sin((1 - t) a) / sin(a) * first + sin(t a) / sin(a) * second`` with the angle a between them; nearly parallel
    ones (cosine beyond 0.9995) are interpolated along the straight line."""
    inner = torch.zeros(2, 2, dtype=torch.float64)
    for part in _parts(experts[0].numel()):
        x = torch.stack([expert.view(-1)[part].double() for expert in experts])
        inner += (x @ x.T).cpu()
    _check_finite(op, name, inner.diagonal().tolist())
    product = math.sqrt(float(inner[0, 0])) * math.sqrt(float(inner[1, 1]))
    cosine = max(-1.0, min(1.0, float(inner[0, 1]) / product)) if product else 1.0
    t = settings.t
    if abs(cosine) > 0.9995:
        first, second = 1 - t, t
    else:
        angle = math.acos(cosine)
        first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return Recipe([Source(after=first), Source(after=second)])


def _check_finite(op: str, name: str, sums: list[float]) -> None:
    """Where one number of a sum decides over a whole tensor, NaN and infinities are refused."""
    if not all(map(math.isfinite, sums)):
        raise value_error(op, name or "experts", "finite", "NaN or an infinity")


def _parts(numel: int):
    step = 1 << 20
    return (slice(begin, begin + step) for begin in range(0, numel, step))
