"""Solved weights: sums along a tilt, roots and the smallest misfit against bisection, grids and authors' arithmetic."""

import math

import pytest
import torch
from torch import Tensor

from moe_kernels import solve_tilt, tilt_stats
from moe_kernels.ops.logit_fusion import copyright_protecting_fusion, dynamic_fusion, native
from moe_kernels.ops.logit_fusion.tilt import STATUSES, TARGETS
from moe_kernels.testing import assert_close_to_reference
from tests.ops.helpers import DTYPES, check

OP = "solve_tilt"
INF, NAN = math.inf, math.nan
SOLVED, AT_LOW, AT_HIGH, BROKEN = range(len(STATUSES))


def rows(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Logits of a large model, and of a small one before and after tuning."""
    base, untuned = 3 * torch.randn(num_rows, vocab_size), 3 * torch.randn(num_rows, vocab_size)
    tuned = untuned + torch.randn(num_rows, vocab_size)
    return [tensor.to(dtype) for tensor in (base, tuned, untuned)]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax(p) || softmax(q)) of each row, as it is written in papers."""
    p, q = p.double().log_softmax(1), q.double().log_softmax(1)
    return (p.exp() * (p - q)).sum(1)


# vocabularies: one token, below a vector, one past a block, several blocks
@pytest.mark.parametrize("vocab_size", [1, 7, 513, 4000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stats(backend, dtype, vocab_size):
    def op(base, tuned, untuned, backend):
        return torch.stack(tilt_stats(base, (tuned, untuned), [0.0, 0.5, 1.0, 2.0], backend=backend))

    check(op, rows(9, vocab_size, dtype), backend, backward=False)
    check(
        lambda base, direction, backend: torch.stack(tilt_stats(base, direction, [-1.0, 0.3], backend=backend)),
        rows(9, vocab_size, dtype)[:2],
        backend,
        backward=False,
    )


# what models and samplers write for "never": it weighs nothing, and its direction counts nothing
@pytest.mark.with_reference
@pytest.mark.parametrize("never", [-1e18, -1e30, torch.finfo(torch.float32).min])
def test_tokens_that_are_masked_with_a_finite_number_count_nothing(backend, never):
    sources = rows(4, 600, torch.float32)
    masked = [source.clone() for source in sources]
    for source in masked[:2]:
        source[:, 590:] = never
    sources = [source[:, :590] for source in sources]
    pair = (torch.full((4,), 0.2), torch.full((4,), 0.3))
    for options in ({"target": "kl", "values": 0.1}, {"target": "match", "values": pair, "grid": 21}):
        actual = solve_tilt(masked[0], tuple(masked[1:]), backend=backend, **options).alpha
        expected = solve_tilt(sources[0], tuple(sources[1:]), backend=backend, **options).alpha
        torch.testing.assert_close(actual, expected)
    actual, expected = (tilt_stats(a, (b, c), [0.0, 0.5], backend=backend) for a, b, c in (masked, sources))
    for ours, without in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, without)


@pytest.mark.with_reference
def test_stats_are_what_papers_write(backend):
    base, tuned, untuned = rows(5, 300)
    alpha = torch.rand(5, 3, dtype=torch.float64)
    stats = tilt_stats(base, (tuned, untuned), alpha, backend=backend)
    start = tilt_stats(base, (tuned, untuned), [0.0], backend=backend)
    for j in range(3):
        tilted = base + alpha[:, j : j + 1] * (tuned - untuned)
        forward = alpha[:, j] * stats.mean[:, j] - stats.log_partition[:, j]
        backward = stats.log_partition[:, j] - alpha[:, j] * start.mean[:, 0]
        assert_close_to_reference(forward, kl(tilted, base), forward)
        assert_close_to_reference(backward, kl(base, tilted), backward)


def wanted(target: str, base: Tensor, tuned: Tensor, untuned: Tensor) -> Tensor | tuple[Tensor, Tensor] | float:
    far = kl(tuned, untuned), kl(untuned, tuned)
    return {"kl": far[0], "reverse_kl": far[1], "jeffreys": far[0] + far[1], "symmetry": 0.0, "match": far}[target]


@pytest.mark.parametrize("vocab_size", [2, 600, 1300])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_solution(backend, dtype, target, vocab_size):
    tensors = rows(20, vocab_size, dtype)
    values = wanted(target, *tensors)

    def op(base, tuned, untuned, backend):
        return solve_tilt(base, (tuned, untuned), target, values, backend=backend).alpha

    check(op, tensors, backend, backward=False)
    solution = solve_tilt(tensors[0], tuple(tensors[1:]), target, values, backend=backend)
    expected = solve_tilt(tensors[0], tuple(tensors[1:]), target, values, backend="reference")
    assert torch.equal(solution.status, expected.status)
    assert vocab_size == 2 or (solution.status == SOLVED).any()
    assert solution.num_sweeps.median() <= 40


@pytest.mark.with_reference
@pytest.mark.parametrize("target", ["kl", "reverse_kl", "jeffreys", "symmetry"])
def test_a_root_is_one(backend, target):
    base, tuned, untuned = rows(20, 500)
    values = wanted(target, base, tuned, untuned)
    solution = solve_tilt(base, (tuned, untuned), target, values, bounds=(0.0, 50.0), backend=backend)
    assert (solution.status == SOLVED).all()
    tilted = base + solution.alpha[:, None] * (tuned - untuned)
    forward, backward = kl(tilted, base), kl(base, tilted)
    reached = {
        "kl": forward,
        "reverse_kl": backward,
        "jeffreys": forward + backward,
        "symmetry": 1 + forward - kl(tilted, base + tuned - untuned),  # not 0: the bound on errors is relative
    }[target]
    assert_close_to_reference(reached, 1 + torch.zeros(20).double() if target == "symmetry" else values, reached)


# a flat bottom: the misfit says more than alpha does
@pytest.mark.with_reference
def test_match_is_below_every_point_of_a_fine_grid(backend):
    base, tuned, untuned = rows(12, 400)
    far = wanted("match", base, tuned, untuned)
    solution = solve_tilt(base, (tuned, untuned), "match", far, backend=backend)
    misfits = torch.stack([misfit(base, tuned - untuned, alpha, far) for alpha in torch.linspace(0, 2, 2001).double()])
    reached = misfit(base, tuned - untuned, solution.alpha[:, None], far)
    assert_close_to_reference(torch.minimum(reached, misfits.amin(0)), reached, reached)
    assert_close_to_reference(solution.residual, reached, reached)


def misfit(base: Tensor, direction: Tensor, alpha: Tensor, far: tuple[Tensor, Tensor]) -> Tensor:
    tilted = base.double() + alpha * direction.double()
    return (kl(tilted, base) - far[0]).square() + (kl(base, tilted) - far[1]).square()


def authors_search(base: Tensor, tuned: Tensor, untuned: Tensor) -> Tensor:
    """Dynamic Logits Fusion's pseudo-code: 0.0, 0.1, ... 2.0, the first of the smallest."""
    best, alpha = (
        torch.full((base.shape[0],), INF, dtype=torch.float64),
        torch.zeros(base.shape[0], dtype=torch.float64),
    )
    direction = tuned.double() - untuned.double()
    for step in range(21):
        cost = misfit(base, direction, torch.tensor(0.1 * step), (kl(tuned, untuned), kl(untuned, tuned)))
        alpha = torch.where(cost < best, 0.1 * step, alpha)
        best = torch.minimum(cost, best)
    return alpha


@pytest.mark.with_reference
@pytest.mark.parametrize("dtype", DTYPES)
def test_grid_is_the_authors_to_the_bit(backend, dtype):
    base, tuned, untuned = rows(60, 3000, dtype)
    far = wanted("match", base, tuned, untuned)
    solution = solve_tilt(base, (tuned, untuned), "match", far, grid=21, backend=backend)
    assert torch.equal(solution.alpha, authors_search(base, tuned, untuned))
    assert solution.alpha.unique().numel() > 3


def test_grid_where_powers_leave_the_range(backend):
    base, tuned, untuned = rows(8, 700, torch.float32)
    base[:, ::7] -= 150  # far below at first, near the top at last
    tuned[:, ::7] += 74
    far = wanted("match", base, tuned, untuned)
    solutions = [
        solve_tilt(base, (tuned, untuned), "match", far, grid=21, backend=which) for which in (backend, "reference")
    ]
    assert torch.equal(solutions[0].alpha, solutions[1].alpha)


def test_dynamic_fusion_is_the_authors(backend):
    base, tuned, untuned = rows(10, 900)
    alpha = authors_search(base, tuned, untuned)[:, None]
    expected = (base.log_softmax(1) + alpha * (tuned.log_softmax(1) - untuned.log_softmax(1))).log_softmax(1)
    actual = dynamic_fusion(base, [(tuned, untuned)], grid=21, backend=backend)
    assert_close_to_reference(actual, expected, expected)


def test_several_tasks_search_one_expert_at_a_time(backend):
    base, tuned, untuned = rows(10, 900)
    other = untuned + 0.5 * torch.randn(10, 900)
    pairs = [(tuned, untuned), (other, untuned)]
    points = (0.1 * torch.arange(21)).double()
    costs = torch.stack(
        [sum(misfit(base, other - untuned, alpha, (kl(t, u), kl(u, t))) for t, u in pairs) for alpha in points]
    )
    alpha = points[costs.argmin(0)][:, None]
    expected = (base + alpha * (other - untuned)).log_softmax(1)
    actual = dynamic_fusion(base, pairs, expert=1, grid=21, backend=backend)
    assert_close_to_reference(actual, expected, expected)


@pytest.mark.parametrize("paths", [(0.0, 0.0), (-3.0, -5.0), (-20.0, -12.0)])
def test_copyright_protecting_fusion(backend, paths):
    first, second, _ = rows(6, 500)

    def objective(fused: Tensor) -> Tensor:
        return torch.maximum(kl(fused, first) - paths[0], kl(fused, second) - paths[1])

    # the authors' grid over both exponents, and a fine one over the exponents whose sum is one
    ticks = torch.linspace(0, 10, 18).double()
    grid = [objective(a * first + b * second) for a in ticks for b in ticks]
    line = [objective((1 - a) * first + a * second) for a in torch.linspace(0, 1, 501).double()]
    fused = copyright_protecting_fusion(first, second, first_path=paths[0], second_path=paths[1], backend=backend)
    reached = objective(fused)
    for others in (grid, line):
        assert_close_to_reference(torch.minimum(reached, torch.stack(others).amin(0)), reached, reached)


# a solved weight at a bound is zero, and zero times -inf is nothing: the token must stay out all the same
@pytest.mark.with_reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("out", ["probs", "sample"])
def test_a_token_that_one_model_rules_out_never_comes_out(backend, dtype, out):
    first, second, untuned = rows(4, 30, dtype)
    arguments = dict(out=out, request_ids=torch.arange(4), seed=0, backend=backend)
    for ruling, other in ((first, second), (second, first)):
        ruling = ruling.clone()
        ruling[:, 7], other = -INF, other.clone()
        other[:, 7] = 50.0
        for models in ((ruling, other), (other, ruling)):
            for path in (-1e6, 1e6):  # far enough to give one model all the weight
                fused = copyright_protecting_fusion(*models, first_path=path, **arguments)
                assert (fused[:, 7] == 0).all() if out == "probs" else (fused != 7).all()
    base, tuned = 0 * first, untuned.clone()  # tuning changed nothing else: alpha is 0
    base[:, 7], tuned[:, 7] = 50.0, -INF
    fused = dynamic_fusion(base, [(tuned, untuned)], **arguments)
    assert (fused[:, 7] == 0).all() if out == "probs" else (fused != 7).all()


@pytest.mark.with_reference
def test_vocab_is_how_many_tokens_take_part(backend):
    base, tuned, untuned = rows(4, 700)
    wide = torch.nn.functional.pad(base, (0, 400), value=3.0)
    arguments = {"backend": backend}
    cut = base[:, :600], (tuned[:, :600], untuned[:, :600])
    ours, expected = (
        tilt_stats(*sources, [0.5], **arguments, **more)
        for sources, more in (((wide, (tuned, untuned)), {"vocab": 600}), (cut, {}))
    )
    assert torch.equal(ours.variance, expected.variance)
    ours = solve_tilt(wide, (tuned, untuned), "kl", 0.1, vocab=600, **arguments).alpha
    assert torch.equal(ours, solve_tilt(*cut, "kl", 0.1, **arguments).alpha)
    ours = dynamic_fusion(wide, [(tuned, untuned)], vocab=600, **arguments)
    assert torch.equal(ours, dynamic_fusion(cut[0], [cut[1]], **arguments))
    ours = copyright_protecting_fusion(wide, tuned, vocab=600, **arguments)
    assert torch.equal(ours, copyright_protecting_fusion(cut[0], cut[1][0], **arguments))


@pytest.mark.with_reference
def test_bounds_and_rows_without_an_answer(backend):
    base, tuned, untuned = rows(7, 50)
    tuned[1] = untuned[1] + 4  # a constant: no divergence at all
    base[2, 3], tuned[3, 3], untuned[4] = NAN, INF, -INF
    base[5, :10], tuned[5, 5:15] = -INF, -INF
    values = torch.full((7,), 0.05, dtype=torch.float64)
    values[6] = 0.0
    solution = solve_tilt(base, (tuned, untuned), "kl", values, backend=backend)
    assert solution.status.tolist() == [SOLVED, AT_HIGH, BROKEN, BROKEN, BROKEN, SOLVED, AT_LOW]
    assert solution.alpha.isnan().tolist() == [False, False, True, True, True, False, False]
    assert solution.alpha[1] == 2 and solution.alpha[6] == 0
    # what is at -inf anywhere takes part nowhere
    alone = solve_tilt(base[5:6, 15:], (tuned[5:6, 15:], untuned[5:6, 15:]), "kl", 0.05, backend=backend)
    assert_close_to_reference(solution.alpha[5:6], alone.alpha, alone.alpha)
    for target in TARGETS:
        pair = (0.05, 0.05) if target == "match" else 0.05
        assert solve_tilt(base[:0], tuned[:0], target, pair, backend=backend).alpha.shape == (0,)


def test_constants_cancel(backend):
    base, tuned, untuned = rows(5, 600)
    far = wanted("match", base, tuned, untuned)
    expected = solve_tilt(base, (tuned, untuned), "match", far, backend=backend).alpha
    moved = solve_tilt(base + 7, (tuned - 3, untuned + 11), "match", far, backend=backend).alpha
    assert_close_to_reference(moved, expected, expected)


def test_a_row_has_the_same_bits_in_any_batch(backend, threads):
    base, tuned, untuned = rows(7, 1300, torch.float32)
    tuned = tuned.bfloat16()
    far = wanted("match", base, tuned, untuned)
    for grid in (None, 21):
        whole = solve_tilt(base, (tuned, untuned), "match", far, grid=grid, backend=backend)
        for row in range(7):
            one = slice(row, row + 1)
            alone = solve_tilt(
                base[one],
                (tuned[one], untuned[one]),
                "match",
                (far[0][one], far[1][one]),
                grid=grid,
                backend=backend,
            )
            for actual, expected in zip(alone, whole, strict=True):
                assert torch.equal(actual, expected[one])


def test_registration(backend):
    sources = rows(3, 40, torch.float32)
    values = torch.full((3, 2), 0.1, dtype=torch.float64)
    torch.library.opcheck(native.tilt_stats, (sources, values))
    for target, grid in ((0, 0), (4, 0), (4, 5)):
        torch.library.opcheck(native.solve_tilt, (sources, values, target, 0.0, 2.0, grid))


def test_compile(backend):
    base, tuned, untuned = rows(4, 60, torch.float32)

    def solve(base, tuned, untuned):
        return solve_tilt(base, (tuned, untuned), "match", (0.2, 0.2), backend=backend).alpha

    compiled = torch.compile(solve, fullgraph=True, dynamic=True)
    for num_rows in (2, 4):
        tensors = [tensor[:num_rows] for tensor in (base, tuned, untuned)]
        assert torch.equal(compiled(*tensors), solve(*tensors))


def test_bad_input():
    a, b = torch.randn(2, 10), torch.randn(2, 10)
    for call, message in [
        (lambda: solve_tilt(a, b, "chernoff"), "target must be one of kl, reverse_kl, jeffreys, symmetry, match"),
        (lambda: solve_tilt(a, b, "kl", 1.0, bounds=(-1.0, 1.0)), "bounds must be finite and rising, from at least 0"),
        (lambda: solve_tilt(a, b, "symmetry", bounds=(1.0, 1.0)), "bounds must be finite and rising, got"),
        (lambda: solve_tilt(a, b, "kl", 1.0, grid=21), "grid must be at least 2, for target='match', got 21"),
        (
            lambda: solve_tilt(a, b, "match", 1.0),
            r"values must be a pair \(kl, reverse\) for target='match', got float",
        ),
        (lambda: solve_tilt(a, b, "kl", (1.0, 1.0)), "values must be a number or a tensor for target='kl', got tuple"),
        (lambda: solve_tilt(a, b, "kl", torch.ones(3)), r"values must be of shape \[num_rows=2\], got \[3\]"),
        (lambda: solve_tilt(a, (a, b, a), "kl", 1.0), "direction must be a tensor or a pair"),
        (
            lambda: solve_tilt(a, torch.randn(2, 400), "kl", 1.0),
            "base must be at most 256 tokens short of .* give vocab=",
        ),
        (lambda: solve_tilt(a, b, "kl", 1.0, vocab=11), r"vocab must be in \[1, 10\], the vocabulary of base, got 11"),
        (lambda: tilt_stats(a, b[:1], [1.0]), r"direction must be of shape \[num_rows=2, vocab_size >= 1\]"),
        (lambda: tilt_stats(a, b, 1.0), r"alpha must be of shape \[num_alphas\] or \[num_rows=2, num_alphas\]"),
        (lambda: dynamic_fusion(a, [(a, b)], expert=1), r"expert must be in \[0, 1\), the number of pairs, got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="direction must be a float, and float64 like all others or none"):
        tilt_stats(a, b.double(), [1.0])


@pytest.mark.with_reference
def test_no_gradient_goes_through_the_solution(backend):
    base, direction = (torch.randn(3, 40, requires_grad=True) for _ in range(2))
    values = torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True)
    assert not solve_tilt(base, direction, "kl", values, backend=backend).alpha.requires_grad
    alpha = torch.ones(1, dtype=torch.float64, requires_grad=True)
    assert not tilt_stats(base, direction, alpha, backend=backend).mean.requires_grad
