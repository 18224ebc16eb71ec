"""merge: each method in each of its meanings, against the library that it is named after or its equations."""

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import compress, decompress, merge, merge_tensors
from moe_kernels.ops.merge import native, parts, recipe, reference
from moe_kernels.ops.merge.methods import METHODS, SEMANTICS
from moe_kernels.ops.task_vector.reference import bits as reference_bits
from moe_kernels.testing import assert_close_to_reference
from tests.ops.helpers import DTYPES, SLOW, seeded, strided

OP = "merge"
GPU_KERNELS = ["native-simt", "native-ptx", "native-cuda", "triton-cpu", "triton-ptx", "triton-cuda"]
ALL = [(name, one) for name, method in METHODS.items() for one in SEMANTICS if one in method.semantics]
WEIGHTS = [1.0, 0.5, 2.0, -0.7, 0.3, 1.0, 1.5, 0.25]


def models(shape, count: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A base and fine-tunes of it; steps of 2^-20 for exact differences, so that few are equal but none is rounded."""
    generator = seeded(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64).mul(2**8).round() / 2**12
    change = [torch.randn(shape, generator=generator, dtype=torch.float64) * (i + 1) for i in range(count)]
    return base.to(dtype), [(base + (one * 2**10).round() / 2**18).to(dtype) for one in change]


def call(base, experts, method: str, semantics: str, **options):
    if METHODS[method].has_weights(semantics):
        options.setdefault("weights", WEIGHTS[: len(experts)])
    if method == "slerp":
        experts = experts[:1]
    return merge(base, experts, method=method, semantics=semantics, **{"density": 0.3, **options})


def trimmed_official(deltas: list[torch.Tensor], density: float) -> list[torch.Tensor]:
    """int(n density) + 1 entries of the flat vector, and what ties with the last."""
    kept = []
    for delta in deltas:
        n = delta.numel()
        bound = delta.abs().sort(descending=True).values[min(int(n * density), n - 1)]
        kept.append(delta * (delta.abs() >= bound))
    return kept


def official_ties(deltas: list[torch.Tensor], density: float) -> torch.Tensor:
    t = torch.stack(trimmed_official(deltas, density))
    sign = t.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    agree = torch.where(sign > 0, t > 0, t < 0)
    return (t * agree).sum(0) / agree.sum(0).clamp(min=1)


def mergekit_mean(t: torch.Tensor, weights: torch.Tensor, elects: bool, normalize: bool) -> torch.Tensor:
    weighted = t * weights[:, None]
    if not elects:
        return weighted.sum(0) / (weights.sum() if normalize else 1)
    plus = (weighted.sum(0) >= 0) * 2 - 1
    agree = weighted.sign() == plus
    divisor = (weights[:, None] * agree).sum(0)
    divisor[divisor == 0] = 1
    return (weighted * agree).sum(0) / (divisor if normalize else 1)


def top(delta: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """The entries of these ranks by magnitude; of equal ones the first are the larger."""
    order = delta.abs().argsort(dim=0, descending=True, stable=True)[first:last]
    return torch.zeros_like(delta).scatter(0, order, delta[order])


@pytest.mark.parametrize("method, semantics", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_give_the_bits_of_the_reference(backend, dtype, method, semantics):
    for shape in ((3, 5), (70, 90)):
        base, experts = models(shape, dtype=dtype)
        actual = call(base, experts, method, semantics, backend=backend)
        expected = call(base, experts, method, semantics, backend="reference")
        assert actual.shape == base.shape and actual.dtype == dtype
        if (method, semantics) in (("dare_linear", "mergekit"), ("dare_ties", "mergekit")):  # sums of two orders
            assert_close_to_reference(actual, expected.double(), expected)
        else:
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("density", [0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_ties_is_pefts(backend, density, count):
    utils = pytest.importorskip("peft.utils.merge_utils")
    for shape in ((1000,), (70, 90), (1,)):
        base, experts = models(shape, count)
        weights = torch.tensor(WEIGHTS[:count])
        options = dict(method="ties", semantics="peft", density=density, weights=weights.tolist())
        # trimmed here: topk's choice among equal magnitudes is its own
        deltas = [top((e - base).flatten(), 0, int(density * base.numel())).view(shape) for e in experts]
        assert torch.equal(merge(base, experts, backend=backend, **options), base + utils.ties(deltas, weights, 1.0))
    # whole vectors: PyTorch's own sums of what is left over run in another order
    base, experts = torch.zeros(1024), [torch.randn(1024, generator=seeded(i)) for i in range(count)]
    expected = utils.ties(experts, weights, density)
    assert torch.equal(merge(base, experts, backend=backend, **options), expected)


def test_magnitude_prune_and_task_arithmetic_are_pefts(backend):
    utils = pytest.importorskip("peft.utils.merge_utils")
    base, experts = models(999)
    base64, experts64 = base.double(), [expert.double() for expert in experts]
    deltas, weights = [e - base64 for e in experts64], torch.tensor(WEIGHTS[:3], dtype=torch.float64)
    options = dict(semantics="peft", weights=weights.tolist(), backend=backend)
    actual = merge(base64, experts64, method="task_arithmetic", **options)
    assert torch.allclose(actual, base64 + utils.task_arithmetic(deltas, weights), rtol=0, atol=1e-15)
    kept = [top(delta, 0, int(0.25 * 999)) for delta in deltas]
    actual = merge(base64, experts64, method="magnitude_prune", density=0.25, **options)
    assert torch.allclose(actual, base64 + utils.magnitude_prune(kept, weights, 1.0), rtol=0, atol=1e-15)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_official_ties(backend, density):
    base, experts = models(5000, 4)
    deltas = [expert - base for expert in experts]
    actual = merge(base, experts, density=density, lambda_=0.5, backend=backend)
    assert torch.equal(actual, base + 0.5 * official_ties(deltas, density))


def test_official_ties_trims_the_whole_model(backend):
    base, experts = models(6000)
    names = {"b": slice(0, 1000), "a": slice(1000, 1003), "c": slice(1003, 6000)}
    experts = [expert * torch.where(torch.arange(6000) < 1000, 1.0, 4.0) for expert in experts]
    expected = base + official_ties([expert - base for expert in experts], 0.1)
    split = [{name: model[part] for name, part in names.items()} for model in (base, *experts)]
    found = merge(split[0], split[1:], density=0.1, backend=backend)
    assert all(torch.equal(found[name], expected[part]) for name, part in names.items())


def test_one_place_where_libraries_differ(backend):
    """{1, -1}: official takes the sign that all signs of the model sum to, PEFT plus."""
    base = torch.zeros(3)
    experts = [torch.tensor([1.0, -2.0, -2.0]), torch.tensor([-1.0, -2.0, -1.0])]
    assert merge(base, experts, backend=backend).tolist() == [-1, -2, -1.5]
    assert merge(base, experts, semantics="peft", backend=backend).tolist() == [1, -2, -1.5]
    # weights after or before the election, and the divisor: [1, 1] of weight 10, [-2, 1] of weight 1
    base, experts = torch.zeros(2), [torch.tensor([1.0, 1.0]), torch.tensor([-2.0, 1.0])]
    assert merge(base, experts, semantics="peft", weights=[10, 1], backend=backend).tolist() == [-2.0, 5.5]
    assert merge(base, experts, semantics="mergekit", weights=[10, 1], backend=backend).tolist() == [1, 1]


@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "breadcrumbs", "breadcrumbs_ties"])
def test_mergekit(backend, method, normalize):
    base, experts = models(3000, dtype=torch.float64)
    weights = torch.tensor(WEIGHTS[:3], dtype=torch.float64)
    deltas = [expert - base for expert in experts]
    if method == "ties":
        deltas = [top(delta, 0, 600) for delta in deltas]
    elif method != "task_arithmetic":
        deltas = [top(delta, 60, 660) for delta in deltas]
    elects = method in ("ties", "breadcrumbs_ties")
    mixed = mergekit_mean(torch.stack(deltas), weights, elects, method == "ties" if normalize is None else normalize)
    options = dict(method=method, semantics="mergekit", density=0.2, gamma=0.02, normalize=normalize, lambda_=0.5)
    actual = merge(base, experts, weights=weights.tolist(), backend=backend, **options)
    assert torch.allclose(actual, base + 0.5 * mixed, rtol=0, atol=1e-15)


def test_mergekit_keeps_one_entry_of_ties_and_no_gamma_at_full_density(backend):
    base, experts = models(9, 1)
    kept = merge(base, experts, semantics="mergekit", density=0.01, backend=backend) != base
    assert int(kept.sum()) == 1
    assert torch.equal(merge(base, experts, method="breadcrumbs", semantics="mergekit", backend=backend), experts[0])
    # a gamma that is less than one element gave zeros
    few = merge(base, experts, method="breadcrumbs", semantics="mergekit", density=0.5, gamma=0.01, backend=backend)
    assert int((few != base).sum()) == 4


def test_official_breadcrumbs_go_by_rows(backend):
    base, experts = models((20, 50), 2)
    kept = [torch.stack([top(row, 5, 15) for row in expert - base]) for expert in experts]
    options = dict(method="breadcrumbs", density=0.2, gamma=0.1, lambda_=0.5)
    assert torch.equal(merge(base, experts, backend=backend, **options), base + 0.5 * (kept[0] + kept[1]))
    column = [expert[:, :1].contiguous() for expert in (base, *experts)]  # rows of one element
    assert torch.equal(merge(column[0], column[1:], backend=backend, **options), column[0])


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_dare(backend, semantics):
    base, experts = models(40_000, 1, dtype=torch.float64)
    actual = merge(base, experts, method="dare_linear", semantics=semantics, density=0.3, seed=5, backend=backend)
    t, kept = experts[0] - base, actual - base
    nonzero = t != 0
    share = float((kept != 0)[nonzero].double().mean())
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 40_000)
    ratio = (kept / t)[nonzero & (kept != 0)]
    if semantics == "mergekit":
        assert math.isclose(float(kept.abs().sum()), float(t.abs().sum()), rel_tol=1e-9)
        assert torch.allclose(ratio, ratio.mean())
    else:
        assert torch.allclose(ratio, torch.tensor(1 / 0.3, dtype=torch.float64))


def test_random_masks_depend_on_seed_name_expert_and_position_alone(backend, threads):
    base, experts = models((300, 70), 2)
    named = [{"x": model, "y": model.clone()} for model in (base, *experts)]
    options = dict(method="dare_linear", semantics="peft", density=0.5, backend=backend)
    found = merge(named[0], named[1:], seed=1, **options)
    order = merge(
        *[dict(reversed(named[0].items())), [dict(reversed(one.items())) for one in named[1:]]], seed=1, **options
    )
    assert all(torch.equal(found[name], order[name]) for name in found)
    alone = merge({"y": base}, [{"y": one} for one in experts], seed=1, **options)
    assert torch.equal(alone["y"], found["y"]) and not torch.equal(found["x"], found["y"])
    assert not torch.equal(found["x"], merge(named[0], named[1:], seed=2, **options)["x"])
    assert torch.equal(found["x"], merge(named[0], named[1:], seed=1, **{**options, "backend": "reference"})["x"])


def test_random_bits_are_philox():
    """Counter 0 and key 0 of the paper's known answers."""
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert reference.random_bits(0, 4, torch.device("cpu")).tolist() == expected
    # both halves of the key, 32 bits each
    ones = reference.random_bits(-1, 9, torch.device("cpu"))
    assert ones.shape == (9,) and 0 <= int(ones.min()) and int(ones.max()) < 2**32


def test_della(backend):
    base, experts = models((40, 500), 1, dtype=torch.float64)
    t = experts[0] - base
    options = dict(method="della_linear", semantics="mergekit", density=0.4, epsilon=0.2, backend=backend)
    kept = merge(base, experts, seed=3, **options) - base
    assert math.isclose(float(kept.abs().sum()), float(t.abs().sum()), rel_tol=1e-9)
    largest = t.abs().argsort(dim=1)[:, -100:]
    smallest = t.abs().argsort(dim=1)[:, :100]
    shares = [float((kept != 0).gather(1, which).double().mean()) for which in (smallest, largest)]
    # probabilities from 0.2 to 0.6 by rank: 0.24 and 0.56 on average in the fifths at the ends
    assert abs(shares[0] - 0.24) < 0.04 and abs(shares[1] - 0.56) < 0.04
    one = torch.ones(5, 1)
    assert merge(one * 0, [one], **options).isfinite().all()  # rows of one element have no ranks


def test_sce_weighs_small_task_vectors_too(backend):
    """mergekit gives 0.5 and 0.5 where mean squares sum to less than 1e-6."""
    signs = torch.randn(1000, generator=seeded(0)).sign()
    base = torch.zeros(1000)
    experts = [signs * 1e-4, signs * 3e-4]
    actual = merge(base, experts, method="sce", semantics="mergekit", backend=backend)
    assert torch.allclose(actual, signs * (0.1 * 1e-4 + 0.9 * 3e-4), rtol=1e-5, atol=0)
    experts = [torch.tensor([1.0, 5.0, 0, 2]), torch.tensor([1.0, -5.0, 0, 4])]
    some = merge(torch.zeros(4), experts, method="sce", semantics="mergekit", select_topk=0.5, backend=backend)
    assert some[0] == 0 and some[2] == 0 and some[1] != 0  # the larger half of the variances that are not zero


def test_model_stock(backend):
    """Of two vectors at 60 degrees: 2 cos / (1 + cos) = 2 / 3 of the mean; also for tiny tensors."""
    for scale in (1.0, 1e-5):
        one = torch.tensor([1.0, 0.0]) * scale
        other = torch.tensor([0.5, math.sqrt(0.75)]) * scale
        actual = merge(torch.zeros(2), [one, other], method="model_stock", backend=backend)
        assert torch.allclose(actual, 2 / 3 * (one + other) / 2, rtol=1e-5, atol=0)
    same = torch.ones(3)
    assert torch.equal(merge(same, [same, same], method="model_stock", backend=backend), same)


def test_slerp_and_linear(backend):
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    half = merge(None, [first, second], method="slerp", t=0.5, backend=backend)
    assert torch.allclose(half, math.sqrt(0.5) * (first + second))
    assert torch.equal(half, merge(first, [second], method="slerp", t=0.5, backend=backend))
    assert torch.equal(merge(None, [first, second], method="slerp", t=0.0, backend=backend), first)
    assert torch.equal(merge(None, [first, first], method="slerp", t=0.3, backend=backend), first)
    assert merge(None, [first, second], method="linear", weights=[1, 3], backend=backend).tolist() == [0.25, 1.5]
    total = merge(None, [first, second], method="linear", weights=[1, 3], normalize=False, backend=backend)
    assert total.tolist() == [1, 6]


@pytest.mark.parametrize("method, semantics", ALL)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (1, 1), (5, 1)], ids=str)
def test_small_shapes_and_densities(backend, method, semantics, shape):
    base, experts = models(shape)
    for density in (0.0, 1e-90, 0.5, 1.0):
        epsilon = 0.1 if density == 0.5 else 0.0
        out = call(base, experts, method, semantics, density=density, epsilon=epsilon, backend=backend)
        assert out.shape == base.shape and out.isfinite().all()
        if density == 0 and METHODS[method].keeps in ("random", "rows", "window"):
            assert torch.equal(out, base)  # PEFT gives NaN


def test_float16_sums_do_not_overflow(backend):
    base = torch.zeros(1 << 20, dtype=torch.float16)
    expert = torch.full((1 << 20,), 0.5, dtype=torch.float16)
    out = merge(base, [expert], method="dare_linear", semantics="mergekit", density=0.5, backend=backend)
    assert out.isfinite().all() and math.isclose(float(out.double().sum()), 2**19, rel_tol=1e-3)


def test_denormals_and_nan(backend):
    base = torch.tensor([1e-39, 0.0, float("nan"), 1.0], dtype=torch.bfloat16)
    expert = torch.tensor([3e-39, -2e-39, 1.0, float("inf")], dtype=torch.bfloat16)
    out = merge(base, [expert], method="task_arithmetic", backend=backend)
    assert torch.equal(out[:2], expert[:2]) and out[2].isnan() and out[3].isinf()
    assert merge(base, [expert], semantics="peft", backend=backend)[2].isnan()  # nothing is chosen at full density
    with pytest.raises(ValueError, match="merge: w must be finite"):
        merge({"w": base}, [{"w": expert}], density=0.5, backend=backend)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "method, semantics",
    [("dare_linear", "mergekit"), ("dare_ties", "mergekit"), ("della", "mergekit"), ("sce", "mergekit"),
     ("model_stock", "official"), ("slerp", "official")],
)  # fmt: skip
def test_one_nan_does_not_decide_over_a_tensor(backend, method, semantics, bad):
    """Of a sum it would make the whole tensor NaN, or a cosine of 1."""
    base, experts = models(500)
    experts[0][123] = bad
    with pytest.raises(ValueError, match="merge: w must be finite, got NaN or an infinity"):
        call({"w": base}, [{"w": expert} for expert in experts], method, semantics, backend=backend)


@pytest.mark.parametrize("size", [3_000_000])
def test_thresholds_of_large_tensors_are_exact(backend, threads, size):
    """Guessed from a sample, also where the sample tells nothing."""
    for order in ("random", "sorted", "few values"):
        base, (expert,) = models(size, 1)
        t = (expert - base).sort().values if order == "sorted" else expert - base
        t = t.sign() if order == "few values" else t
        out = merge(torch.zeros(size), [t], method="magnitude_prune", semantics="peft", density=0.2, backend=backend)
        assert torch.equal(out, top(t, 0, int(0.2 * size)))


def test_layer_tables(backend):
    """Layer swapping: the ends of one expert, the middle of the other."""
    named = [{f"layers.{i}": model for i in range(3)} for model in (torch.zeros(4), torch.ones(4), 2 * torch.ones(4))]
    found = merge(
        named[0],
        named[1:],
        method="task_arithmetic",
        weights=lambda name: [0.0, 1.0] if name == "layers.1" else [1.0, 0.0],
        backend=backend,
    )
    assert [found[name][0].item() for name in sorted(found)] == [1, 2, 1]


class Lazy(Mapping):
    """A checkpoint that makes a tensor when it is asked for it."""

    def __init__(self, seed: int):
        self.seed, self.loads = seed, []

    def __getitem__(self, name):
        self.loads.append(name)
        return models(100, 1, seed=int(name) + 100 * self.seed)[1][0]

    def __iter__(self):
        return iter(["0", "1", "2"])

    def __len__(self):
        return 3


def test_tensors_are_loaded_one_at_a_time():
    base, experts = Lazy(0), [Lazy(1), Lazy(2)]
    seen = []
    for name, tensor in merge_tensors(base, experts, method="ties", semantics="peft", density=0.5):
        seen.append(name)
        assert base.loads == experts[0].loads == seen and tensor.shape == (100,)
    passes = []
    names = list(merge_tensors(base, experts, density=0.5, names=["2"], progress=passes.append))
    assert [name for name, _ in names] == ["2"] and passes == ["0", "1", "2"] * 2 + ["2"]


def test_integers_are_passed_on(backend):
    named = [{"w": torch.ones(2), "ids": torch.arange(3)} for _ in range(3)]
    assert torch.equal(merge(named[0], named[1:], backend=backend)["ids"], torch.arange(3))
    named[2]["ids"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="merge: ids must be equal in all models"):
        merge(named[0], named[1:], backend=backend)


def test_strides(backend):
    base, experts = models((6, 8))
    found = merge(strided(base), [strided(expert) for expert in experts], density=0.5, backend=backend)
    assert torch.equal(found, merge(base, experts, density=0.5, backend=backend))


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([case for case in ALL if case[1] != "mergekit" or "dare" not in case[0]]),
    st.integers(0, 3000),
    st.integers(2, 4),
    st.floats(0, 1),
    st.integers(0, 2**31 - 1),
    st.sampled_from(DTYPES),
)
def test_any_size_density_and_dtype(case, size, count, density, seed, dtype):
    base, experts = models(size, count, dtype, seed)
    options = dict(density=density, epsilon=0.0, gamma=density / 3, select_topk=density, seed=seed)
    actual, expected = (call(base, experts, *case, backend=backend, **options) for backend in ("native", "reference"))
    assert torch.equal(actual, expected)


def test_bad_input():
    base, experts = models(10)
    cases = [
        (dict(method="soup"), "method must be one of linear, slerp"),
        (dict(semantics="mine"), "semantics must be one of official, peft, mergekit, got 'mine'"),
        (dict(method="sce"), "semantics must be 'mergekit' for method 'sce', got 'official'"),
        (dict(density=1.5), "density must be from 0 to 1"),
        (dict(lambda_=float("nan")), "lambda_ must be finite"),
        (dict(weights=[1.0]), "weights must be 3 numbers, one an expert, got 1"),
        (
            dict(weights=[1.0, 2.0, 1.0]),
            "weights must be 1 for official ties, which has none, got others",
        ),
        (dict(method="della", semantics="mergekit", density=0.05, epsilon=0.1), "epsilon must be such that"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            merge(base, experts, **options)
    with pytest.raises(ValueError, match="base must be given for method 'ties'"):
        merge(None, experts)
    with pytest.raises(ValueError, match="the number of experts must be at least 1"):
        merge({}, [])
    with pytest.raises(ValueError, match="the number of experts must be 2 for slerp, got 3"):
        merge(None, experts, method="slerp")
    with pytest.raises(ValueError, match="experts must be of shape"):
        merge(base, [experts[0], experts[1][:5]])
    with pytest.raises(TypeError, match="experts must be torch.float32 in all models"):
        merge(base, [experts[0], experts[1].half()])
    with pytest.raises(ValueError, match="of the same names, got not in all: b"):
        merge({"a": base}, [{"a": base, "b": base}])
    with pytest.raises(TypeError, match="experts must be a sequence"):
        merge(base, base)


def test_registration():
    base, experts = models(5000)
    kept = recipe.Recipe([recipe.Source(lower=0x3B000000) for _ in experts], election="sum_not_negative")
    sources = (base, experts, *native._sources(experts, kept)[1:])
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(native.merge_experts, (*sources, 1, 1, 1.0, 0, 1.0), test_utils=utilities)
    torch.library.opcheck(native.kept_magnitudes_op, sources)
    merged, ranges, _ = native.merge_experts(*sources, 1, 1, 1.0, 0, 1.0)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(native.merge_ranges, (merged, ranges, *sources, 1, 1, 1.0, 1, 1.0), test_utils=utilities)
    assert native.elected_signs(base, experts, kept) == reference.elected_signs(base, experts, kept)


def vectors_of(count: int, size: int, dtype: torch.dtype):
    """A base, task vectors of every kind, and each as a float32 difference."""
    generator = seeded(5)
    base = (torch.randn(size, generator=generator, dtype=torch.float64) * 0.02).to(dtype)
    dense = [torch.randn(size, generator=generator) * 1e-3 for _ in range(count)]
    packed = [
        compress(t, density, values=values)
        for t, density, values in zip(dense, (0.1, 0.5, 0.3), (None, None, torch.float16), strict=True)
    ]
    experts = [packed[0], decompress(packed[1]), packed[2]]
    return base, experts, [expert.dense(torch.float64) for expert in experts]


@pytest.mark.parametrize("size", [1, 63, 1024, 4097, 70_001])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        dict(method="task_arithmetic", semantics="peft", weights=[1.0, -0.5, 2.0], lambda_=0.7),
        dict(method="ties"),
        dict(method="ties", semantics="mergekit", weights=[1.0, 0.5, 2.0]),
        dict(method="dare_ties", semantics="mergekit", density=0.5, weights=[1.0, 0.5, 2.0]),
        dict(method="dare_linear", semantics="peft", density=0.3),
    ],
    ids=str,
)
def test_task_vectors_are_merged_as_they_lie(backend, dtype, size, options):
    base, experts, dense = vectors_of(3, size, dtype)
    found = merge(base, experts, **options, backend=backend)
    expected = merge(base, experts, **options, backend="reference")
    assert found.dtype == dtype and torch.equal(found, expected)
    # against whole tensors in float64, from which the differences come back as they were
    zeros = torch.zeros(size, dtype=torch.float64)
    whole = merge(zeros, dense, **options, backend="reference")
    assert_close_to_reference(found, base.double() + whole, expected, "merged")


def test_task_vectors_beside_whole_tensors(backend, threads):
    base, experts, dense = vectors_of(3, 70_001, torch.float32)
    mixed = [experts[0], base + dense[1].float(), experts[2]]
    for options in (dict(method="ties"), dict(method="dare_ties", semantics="mergekit", density=0.5)):
        assert torch.equal(
            merge(base, mixed, **options, backend=backend), merge(base, mixed, **options, backend="reference")
        )


def test_a_task_vector_may_lack_tensors(backend):
    base = {"w": torch.randn(5, 7), "half": torch.randn(70), "ids": torch.arange(3), "same": torch.tensor([-0.0])}
    one = {name: compress(torch.randn(base[name].shape), 0.5) for name in ("w", "half")}
    two = {"w": decompress(compress(torch.randn(5, 7), 0.5))}
    for method in ("ties", "task_arithmetic"):
        merged = merge(base, [one, two], method=method, backend=backend)
        assert set(merged) == set(base) and torch.equal(merged["ids"], base["ids"])
        assert torch.equal(merged["w"], merge(base["w"], [one["w"], two["w"]], method=method, backend="reference"))
        assert torch.equal(merged["half"], base["half"] + one["half"].dense())
        assert torch.equal(merged["same"].view(torch.int32), base["same"].view(torch.int32))


def test_what_task_vectors_cannot_be_merged_by():
    base, experts, _ = vectors_of(3, 100, torch.float32)
    for method in ("linear", "model_stock", "breadcrumbs", "slerp"):
        with pytest.raises(ValueError, match="must be one of task_arithmetic, ties, dare_linear, dare_ties for task"):
            merge(base, experts[: 1 if method == "slerp" else 3], method=method)
    with pytest.raises(ValueError, match="density must be 1 for task vectors, which are trimmed already, got 0.5"):
        merge(base, experts, density=0.5)
    with pytest.raises(ValueError, match="base must be given"):
        merge(None, experts)
    with pytest.raises(ValueError, match=r"of shape \[100\] like its task vector"):
        merge(base.view(10, 10), experts)
    with pytest.raises(ValueError, match="task vectors of the base's tensors, got others: other"):
        merge({"w": base}, [{"other": experts[0]}])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "method, semantics",
    [("sce", "mergekit"), ("della", "mergekit"), ("della_linear", "mergekit"), ("breadcrumbs", "official")],
)
def test_parts_of_a_tensor_are_the_whole(backend, monkeypatch, dtype, method, semantics):
    """In parts of 64 elements and in one; rounded values have equal variances and magnitudes."""
    base, experts = models((37, 30), 3, dtype)
    experts = [base + ((expert - base) * 2**7).round() / 2**7 for expert in experts]
    options = dict(method=method, semantics=semantics, select_topk=0.4, density=0.3, gamma=0.1, seed=3)
    whole = merge(base, experts, **options, backend=backend)
    monkeypatch.setattr(parts, "_ELEMENTS", 64)
    assert_close_to_reference(merge(base, experts, **options, backend=backend), whole.double(), whole, "parts")
    monkeypatch.setattr(parts, "_ELEMENTS", 1)
    assert_close_to_reference(merge(base, experts, **options, backend=backend), whole.double(), whole, "rows")


RECIPES = {
    "task_arithmetic": dict(method="task_arithmetic", semantics="peft", lambda_=0.7, weights=WEIGHTS[:3]),
    "linear": dict(method="linear", weights=WEIGHTS[:3]),
    "ties official": dict(method="ties", density=0.3),
    "ties peft": dict(method="ties", semantics="peft", density=0.3, weights=WEIGHTS[:3]),
    "ties mergekit": dict(method="ties", semantics="mergekit", density=0.3, weights=WEIGHTS[:3]),
    "dare_ties": dict(method="dare_ties", density=0.3),
    "dare_linear": dict(method="dare_linear", semantics="mergekit", density=0.6, weights=WEIGHTS[:3]),
    "breadcrumbs": dict(method="breadcrumbs", semantics="mergekit", density=0.4, gamma=0.1, weights=WEIGHTS[:3]),
}


@pytest.mark.on_gpus
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_kernels_give_the_bits_of_the_reference(backend, kernel_id, dtype, recipe):
    """A ragged last block; equal magnitudes and cancelling sums; NaN where a method lets it through."""
    size = 1100 if kernel_id in SLOW else 2500
    base, experts = models(size, 3, dtype)
    experts[1][:50], experts[2][:50] = 2 * base[:50] - experts[0][:50], base[:50]
    options = RECIPES[recipe]
    if recipe in ("task_arithmetic", "linear"):
        experts[0][7], experts[1][9] = float("nan"), float("inf")
    found = merge(base, experts, **options, backend=backend)
    expected = merge(base, experts, **options, backend="reference")
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(*(reference_bits(one.nan_to_num(0)) for one in (found, expected)))


@pytest.mark.on_gpus
def test_gpu_kernels_merge_task_vectors(backend, kernel_id):
    base, experts, _ = vectors_of(3, 1100 if kernel_id in SLOW else 4200, torch.bfloat16)
    mixed = [*experts[:2], base * 1.01]
    for options in (dict(method="ties"), dict(method="task_arithmetic", semantics="peft", weights=WEIGHTS[:3])):
        found = merge(base, mixed, **options, backend=backend)
        assert torch.equal(found, merge(base, mixed, **options, backend="reference"))


@pytest.mark.on_gpus
@pytest.mark.parametrize("count", [1, 11, 12, 20])
def test_gpu_kernels_merge_few_and_many(backend, count):
    """More experts than the CUDA kernel can keep in shared memory between its passes; at odd addresses."""
    base, experts = models(301, count)
    memory = torch.empty(301 * count + 1)
    experts = [memory[301 * k + 1 :][:301].copy_(expert) for k, expert in enumerate(experts)]
    for options in (dict(method="ties"), dict(method="dare_ties", density=0.5)):
        found = merge(base, experts, **options, backend=backend)
        assert torch.equal(found, merge(base, experts, **options, backend="reference"))
    assert merge(base[:0], [expert[:0] for expert in experts], method="ties", backend=backend).shape == (0,)


def test_few_undecided_elements_of_a_large_tensor(backend, threads):
    """Official TIES: sums of zero far apart, in two ranges of blocks of six, take the sign of the majority."""
    size = 400_000
    base, experts = models(size, 2)
    experts[0] += 0.01  # a majority
    where = torch.tensor([3, 65_535, 65_536, 333_333])
    experts[1][where] = 2 * base[where] - experts[0][where]
    for one in ({"w": base}, {"w": base, "other": base[:5]}):  # of one tensor, and of a model of two
        others = [{name: expert[: one[name].numel()] for name in one} for expert in experts]
        found = merge(one, others, backend=backend)
        expected = merge(one, others, backend="reference")
        assert all(torch.equal(found[name], expected[name]) for name in one)
        assert bool((found["w"][where] > base[where]).all())
