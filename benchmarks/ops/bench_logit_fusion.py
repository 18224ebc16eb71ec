"""Fusing three rows of logits: log-probabilities, a drawn token, a solved weight, beside torch and a copy of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import MEMCPY, Candidate, Cell, Cells, Check, Context, check
from moe_kernels import _dispatch, fuse_logits, solve_tilt, tilt_stats

SUMMARY = "fuse_logits of a base and a tuned pair: log-probabilities, one drawn token, a weight solved for each row"
DEFAULTS = dict(shapes=["mixtral-8x7b", "A"], dtypes=["fp32", "bf16"], tokens=[1, 8, 64])
PROVIDER_NAMES = [
    "ours",
    "torch_eager",
    "torch_compile",
    "torch_multinomial",
    "torch_cumsum",
    "ours_grid",
    "torch_grid",
    MEMCPY,
]

#: vocab_size in the config.json of the models behind the shapes
_VOCAB_SIZES = {"mixtral-8x7b": 32_000, "A": 151_936, "toy": 600}
_WEIGHTS = [1.0, 0.7, -0.7]
_NUM_INPUTS = 2

Sources = list[Tensor]


def cells(context: Context) -> Cells:
    for shape_name in context.shapes:
        if shape_name not in _VOCAB_SIZES:
            raise ValueError(f"logit_fusion: --shape must be of {', '.join(_VOCAB_SIZES)}, got {shape_name}")
        for dtype in context.dtypes:
            for num_tokens in context.tokens:
                generator = torch.Generator().manual_seed(num_tokens)
                size = (num_tokens, _VOCAB_SIZES[shape_name])
                inputs = [
                    [3 * torch.randn(size, generator=generator).to(dtype) for _ in _WEIGHTS] for _ in range(_NUM_INPUTS)
                ]
                yield _log_probs_cell(context, shape_name, dtype, inputs)
                yield _sample_cell(context, shape_name, dtype, inputs)
                yield _solve_cell(context, shape_name, dtype, inputs)


def _cell(context: Context, op: str, shape_name: str, inputs: list[Sources], written: int, *candidates) -> Cell:
    first = inputs[0][0]
    read = len(_WEIGHTS) * first.numel() * first.element_size()
    candidates = [candidate for candidate in candidates if context.wants(candidate.name)]
    if context.probe is not None and context.wants(MEMCPY):
        copy = context.probe.copier(read, context.threads)
        candidates.append(Candidate(MEMCPY, lambda i: copy()))
    return Cell(
        op, shape_name, first.dtype, first.shape[0], candidates, bytes=read + written, copies=True, probe_bytes=2 * read
    )


def _on(inputs: list[Sources], function: Callable[[Sources], object]) -> Callable[[int], object]:
    return lambda i: function(inputs[i % len(inputs)])


def _eager_log_probs(sources: Sources) -> Tensor:
    """Emulated fine-tuning as its papers write it, in log-probabilities."""
    base, tuned, untuned = (source.float().log_softmax(1) for source in sources)
    return (base + _WEIGHTS[1] * (tuned - untuned)).log_softmax(1)


def _log_probs_cell(context: Context, shape_name: str, dtype: torch.dtype, inputs: list[Sources]) -> Cell:
    def ours(sources: Sources, backend: str = "auto") -> Tensor:
        return fuse_logits(sources, _WEIGHTS, backend=backend)

    def checked(function: Callable[[Sources], Tensor]) -> Callable[[], Check]:
        def compare() -> Check:
            some = [source[:4] for source in inputs[0]]
            expected = ours([source.double() for source in some], "reference")
            return check(function(some), expected, ours(some, "reference"), "log_probs")

        return compare

    candidates = [
        Candidate("ours", _on(inputs, ours), checked(ours), True, _dispatch.resolve("fuse_logits", "auto", "cpu")),
        Candidate("torch_eager", _on(inputs, _eager_log_probs), checked(_eager_log_probs), version=torch.__version__),
    ]
    # compiles anew for each shape: half a minute a cell, so only when asked for
    if context.wants("torch_compile", default=False):
        compiled = torch.compile(_eager_log_probs, dynamic=False)
        compiled(inputs[0])
        candidates.append(Candidate("torch_compile", _on(inputs, compiled), version=torch.__version__))
    return _cell(context, "fused_log_probs", shape_name, inputs, 4 * inputs[0][0].numel(), *candidates)


def _sample_cell(context: Context, shape_name: str, dtype: torch.dtype, inputs: list[Sources]) -> Cell:
    num_tokens = inputs[0][0].shape[0]
    request_ids = torch.arange(num_tokens)

    def ours(sources: Sources) -> Tensor:
        return fuse_logits(sources, _WEIGHTS, out="sample", request_ids=request_ids, seed=0)

    def probs(sources: Sources) -> Tensor:
        # proxy tuning's chain, in the logits' own dtype as its code has it
        base, tuned, untuned = sources
        return (base + _WEIGHTS[1] * (tuned - untuned)).softmax(1)

    def multinomial(sources: Sources) -> Tensor:
        return torch.multinomial(probs(sources), 1)

    def cumsum(sources: Sources) -> Tensor:
        cumulative = probs(sources).float().cumsum(1)
        return torch.searchsorted(cumulative, torch.rand(num_tokens, 1) * cumulative[:, -1:])

    def checked() -> Check:
        expected = fuse_logits(
            [source.double() for source in inputs[0]],
            _WEIGHTS,
            out="sample",
            request_ids=request_ids,
            seed=0,
            backend="reference",
        )
        # in float32 a uniform within a rounding of the boundary of two tokens falls on the other side
        share = (ours(inputs[0]) != expected).double().mean().item()
        return Check(share, 0.05, "" if share <= 0.05 else f"{share:.0%} of the tokens are not the reference's")

    candidates = [
        Candidate("ours", _on(inputs, ours), checked, True, _dispatch.resolve("fuse_logits", "auto", "cpu")),
        Candidate("torch_multinomial", _on(inputs, multinomial), version=torch.__version__),
        Candidate("torch_cumsum", _on(inputs, cumsum), version=torch.__version__),
    ]
    return _cell(context, "fused_sample", shape_name, inputs, 8 * num_tokens, *candidates)


def _eager_grid(sources: Sources) -> Tensor:
    """Dynamic Logits Fusion's search as its authors give it: 21 points, the first of the smallest."""
    base, tuned, untuned = (source.float().log_softmax(1) for source in sources)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(1)

    wanted = kl(tuned, untuned), kl(untuned, tuned)
    costs = []
    for step in range(21):
        tilted = (base + 0.1 * step * (tuned - untuned)).log_softmax(1)
        costs.append((kl(tilted, base) - wanted[0]).square() + (kl(base, tilted) - wanted[1]).square())
    return torch.stack(costs).argmin(0) * 0.1


def _solve_cell(context: Context, shape_name: str, dtype: torch.dtype, inputs: list[Sources]) -> Cell:
    def solve(sources: Sources, grid: int | None = None, backend: str = "auto") -> Tensor:
        base, tuned, untuned = sources
        stats = tilt_stats(untuned, (tuned, untuned), [0.0, 1.0], backend=backend)
        wanted = stats.mean[:, 1] - stats.log_partition[:, 1], stats.log_partition[:, 1] - stats.mean[:, 0]
        return solve_tilt(base, (tuned, untuned), "match", wanted, grid=grid, backend=backend).alpha

    def on_grid(sources: Sources) -> Tensor:
        return solve(sources, 21)

    def checked(grid: int | None) -> Callable[[], Check]:
        def compare() -> Check:
            some = [source[:8] for source in inputs[0]]
            expected = solve([source.double() for source in some], grid, "reference")
            return check(solve(some, grid), expected, solve(some, grid, "reference"), "alpha")

        return compare

    backend = _dispatch.resolve("solve_tilt", "auto", "cpu")
    candidates = [
        Candidate("ours", _on(inputs, solve), checked(None), True, backend),
        Candidate("ours_grid", _on(inputs, on_grid), checked(21), True, backend),
        Candidate("torch_grid", _on(inputs, _eager_grid), version=torch.__version__),
    ]
    return _cell(context, "solved_weight", shape_name, inputs, 8 * inputs[0][0].shape[0], *candidates)
