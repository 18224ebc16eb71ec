"""Task vectors of one weight: compressed, added, taken back, merged, beside other ways and a copy of as many bytes.

``--tokens`` is the number of task vectors that are added or merged at once. Peers: ComPEFT's recipe (its repository
writes dense tensors back and packs nothing), a dense int8 vector, index_add of positions, a sparse CSR tensor, PEFT.
The patch is what a step of 3e-6 on float32 weights does to their copies in the dtype; torch keeps positions and values.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import MEMCPY, Candidate, Cell, Cells, Check, Context
from benchmarks.providers.base import installed_version, module_missing
from moe_kernels import (
    PackedDelta,
    TernaryDelta,
    apply_,
    apply_patch_,
    compress,
    decompress,
    make_patch,
    merge,
    unapply_,
)

SUMMARY = "compress, apply_, unapply_, TIES of task vectors; --tokens: how many are added or merged at once"
DEFAULTS = dict(shapes=["16M"], dtypes=["bf16", "fp32"], tokens=[1, 8])
PROVIDER_NAMES = [
    "ours", "ours_packed", "ours_values", "compeft", "torch_int8", "torch_index_add", "torch_csr", "torch_index_copy",
    "peft", MEMCPY,
]  # fmt: skip

_SHAPES = {"16M": (4096, 4096), "toy": (64, 80)}
_DENSITY = 0.05
_COEFFICIENT = 1e-3


def cells(context: Context) -> Cells:
    for shape_name in context.shapes:
        if shape_name not in _SHAPES:
            raise ValueError(f"task_vector: --shape must be of {', '.join(_SHAPES)}, got {shape_name}")
        generator = torch.Generator().manual_seed(0)
        most = max(context.tokens)
        dense = [torch.randn(_SHAPES[shape_name], generator=generator) for _ in range(most)]
        packed = [compress(delta, _DENSITY) for delta in dense]
        for dtype in context.dtypes:
            weight = (torch.randn(_SHAPES[shape_name], generator=generator) * 0.02).to(dtype)
            if dtype == context.dtypes[0]:
                yield _compress_cell(context, shape_name, dtype, dense[0])
                if most > 1:
                    yield _ties_cell(context, shape_name, [_COEFFICIENT * delta for delta in dense])
            yield from _patch_cells(context, shape_name, dtype, generator)
            for count in context.tokens:
                yield _apply_cell(context, shape_name, weight, packed[:count])
                yield _undo_cell(context, shape_name, weight, packed[:count])


def _cell(context: Context, op: str, shape: str, dtype, count: int, num_bytes: int, *candidates: Candidate) -> Cell:
    wanted = [candidate for candidate in candidates if context.wants(candidate.name)]
    if context.probe is not None and context.wants(MEMCPY):
        copier = context.probe.copier(num_bytes // 2, context.threads)
        wanted.append(Candidate(MEMCPY, lambda i: copier()))
    return Cell(op, shape, dtype, count, wanted, bytes=num_bytes, copies=True, probe_bytes=num_bytes)


def _same(actual: Tensor, expected: Tensor) -> Check:
    if torch.equal(actual, expected):
        return Check(0.0, 0.0)
    return Check(float("inf"), 0.0, "not the bits of the reference")


def _compress_cell(context: Context, shape: str, dtype: torch.dtype, delta: Tensor) -> Cell:
    """Of float32 differences. ComPEFT's code: threshold by kthvalue, standard deviation, signs times both."""
    keep = round(_DENSITY * delta.numel())

    def compeft(i: int) -> Tensor:
        magnitudes = delta.abs().flatten()
        threshold = magnitudes.kthvalue(delta.numel() - keep).values
        mask = magnitudes >= threshold
        return delta.flatten().sign() * mask * delta.std()

    def checked() -> Check:
        few = delta.flatten()[: 1 << 16].clone()
        return _same(
            decompress(compress(few, _DENSITY)).planes, decompress(compress(few, _DENSITY, backend="reference")).planes
        )

    return _cell(
        context, "compress", shape, dtype, 1, delta.numel() * 4,
        Candidate("ours", lambda i: compress(delta, _DENSITY), checked, True, "native"),
        Candidate("compeft", compeft, version=torch.__version__),
    )  # fmt: skip


def _apply_cell(context: Context, shape: str, weight: Tensor, packed: list[PackedDelta]) -> Cell:
    planes = [decompress(delta) for delta in packed]
    signs = [delta.signs() for delta in planes]
    values = [_COEFFICIENT * delta.scale for delta in planes]
    expected = weight.clone()
    apply_(expected, planes, _COEFFICIENT, backend="reference")
    scratch = weight.clone()
    flat = scratch.view(-1)

    def ours(deltas: list[TernaryDelta | PackedDelta], **options) -> Candidate:
        def checked() -> Check:
            fresh = weight.clone()
            apply_(fresh, deltas, _COEFFICIENT, **options)
            return _same(fresh, expected)

        name = "ours_packed" if deltas is packed else "ours"
        return Candidate(name, lambda i: apply_(scratch, deltas, _COEFFICIENT), checked, True, "native")

    positions = [(one.flatten() > 0).nonzero().flatten() for one in signs]
    negatives = [(one.flatten() < 0).nonzero().flatten() for one in signs]

    def int8(i: int) -> None:
        for one, value in zip(signs, values, strict=True):
            scratch.add_(one.to(scratch.dtype), alpha=value)

    def index_add(i: int) -> None:
        for plus, minus, value in zip(positions, negatives, values, strict=True):
            flat[plus] += value
            flat[minus] -= value

    def sparse() -> Callable[[int], None] | None:
        if weight.dtype != torch.float32:
            return None
        matrices = [(one * value).to_sparse_csr() for one, value in zip(signs, values, strict=True)]
        return lambda i: [scratch.add_(matrix) for matrix in matrices]

    csr = sparse()
    moved = 2 * weight.numel() * weight.element_size() + sum(delta.nbytes for delta in planes)
    return _cell(
        context, "apply", shape, weight.dtype, len(packed), moved,
        ours(planes),
        ours(packed),
        *([_ours_values(weight)] if len(packed) == 1 else []),
        Candidate("torch_int8", int8, version=torch.__version__),
        Candidate("torch_index_add", index_add, version=torch.__version__),
        *([Candidate("torch_csr", csr, version=torch.__version__)] if csr else []),
    )  # fmt: skip


def _ours_values(weight: Tensor) -> Candidate:
    """As many entries with their values in bfloat16."""
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    kept = compress(change, _DENSITY, values=torch.bfloat16)
    scratch = weight.clone()

    def checked() -> Check:
        few, some = weight.view(-1)[: 1 << 16], compress(change.view(-1)[: 1 << 16], _DENSITY, values=torch.bfloat16)
        actual, expected = few.clone(), few.clone()
        apply_(actual, some, _COEFFICIENT)
        apply_(expected, some, _COEFFICIENT, backend="reference")
        return _same(actual, expected)

    return Candidate("ours_values", lambda i: apply_(scratch, kept, _COEFFICIENT), checked, True, "native")


def _patch_cells(context: Context, shape: str, dtype: torch.dtype, generator: torch.Generator) -> Cells:
    trained = torch.randn(_SHAPES[shape], generator=generator) * 0.02
    step = 3e-6 * torch.randn(trained.shape, generator=generator)
    base, weight = trained.to(dtype), (trained + step).to(dtype)
    patch, scratch = make_patch(weight, base), base.clone()

    def applied() -> Check:
        fresh = base.clone()
        apply_patch_(fresh, patch)
        return _same(fresh, weight)

    def torch_find(i: int) -> tuple[Tensor, Tensor]:
        positions = (weight.view(-1) != base.view(-1)).nonzero()[:, 0]
        return positions, weight.view(-1)[positions]

    positions, values = torch_find(0)
    size = base.numel() * base.element_size()
    yield _cell(
        context, "make_patch", shape, dtype, 1, 2 * size,
        Candidate("ours", lambda i: make_patch(weight, base), applied, True, "native"),
        Candidate("torch_index_copy", torch_find, version=torch.__version__),
    )  # fmt: skip
    yield _cell(
        context, "apply_patch", shape, dtype, 1, 2 * size + patch.nbytes,
        Candidate("ours", lambda i: apply_patch_(scratch, patch), applied, True, "native"),
        Candidate("torch_index_copy", lambda i: scratch.view(-1).index_copy_(0, positions, values),
                  version=torch.__version__),
    )  # fmt: skip


def _undo_cell(context: Context, shape: str, weight: Tensor, packed: list[PackedDelta]) -> Cell:
    """Added with an undo, then taken back: all of a switch from one expert to the base."""
    planes = [decompress(delta) for delta in packed]
    scratch = weight.clone()

    def there_and_back(i: int) -> Tensor:
        unapply_(scratch, apply_(scratch, planes, _COEFFICIENT, undo=True))
        return scratch

    moved = 2 * (2 * weight.numel() * weight.element_size() + sum(delta.nbytes for delta in planes))
    return _cell(
        context, "apply_and_undo", shape, weight.dtype, len(packed), moved,
        Candidate("ours", there_and_back, lambda: _same(there_and_back(0), weight), True, "native"),
    )  # fmt: skip


def _ties_cell(context: Context, shape: str, deltas: list[Tensor]) -> Cell:
    """TIES as PEFT means it, of float32 weights at 20 %; thresholds, election and mean, from and to whole weights."""
    base = torch.randn(deltas[0].shape, generator=torch.Generator().manual_seed(1)) * 0.02
    experts = [base + delta for delta in deltas]
    weights = [1.0] * len(experts)

    def ours(i: int, backend: str = "auto") -> Tensor:
        return merge(base, experts, method="ties", semantics="peft", density=0.2, backend=backend)

    def checked() -> Check:
        few = [expert.view(-1)[: 1 << 16].clone() for expert in (base, *experts)]
        options = dict(method="ties", semantics="peft", density=0.2)
        return _same(merge(few[0], few[1:], **options), merge(few[0], few[1:], **options, backend="reference"))

    candidates = [Candidate("ours", ours, checked, True, "native")]
    if not module_missing("peft", "peft"):
        from peft.utils.merge_utils import ties

        def peft(i: int) -> Tensor:
            return base + ties([expert - base for expert in experts], torch.tensor(weights), 0.2)

        candidates.append(Candidate("peft", peft, version=installed_version("peft")))
    moved = (len(experts) + 2) * base.numel() * base.element_size()
    return _cell(context, "ties", shape, torch.float32, len(experts), moved, *candidates)
