"""A linear layer whose tokens each add a task vector to its weight, beside the layer alone and dense ways to do it.

Token t has task vector t mod 4, of 5 % density. ``base`` is our product with the weight alone, ``torch_base`` that of
PyTorch. ``torch_dense`` keeps every vector as a matrix of the weight's dtype and multiplies by it too; ``torch_merged``
keeps a whole weight for each vector (4 times the memory) and ``torch_unpacked`` makes matrices of the signs from int8
first, as BitDelta's CPU path does from bits. ``odd`` has rows that do not begin with a word of the planes.
"""

import torch
from torch import Tensor, nn

from benchmarks.harness import Candidate, Cell, Cells, Check, Context, check
from moe_kernels import _dispatch, compress, decompress, ternary_linear

SUMMARY = "ternary_linear beside the linear layer alone, and dense ways to serve task vectors"
DEFAULTS = dict(shapes=["square", "odd"], dtypes=["bf16", "fp32"], tokens=[1, 4, 16, 64])
PROVIDER_NAMES = ["ours", "base", "torch_base", "torch_dense", "torch_merged", "torch_unpacked"]

#: out_features, in_features
_SHAPES = {"square": (4096, 4096), "odd": (4096, 4040), "toy": (48, 70)}
_VECTORS = 4
_COEFFICIENT = 1e-3


class _Inputs:
    def __init__(self, shape: str, dtype: torch.dtype, num_tokens: int):
        if shape not in _SHAPES:
            raise ValueError(f"ternary_linear: --shape must be of {', '.join(_SHAPES)}, got {shape}")
        generator = torch.Generator().manual_seed(0)
        out, size = _SHAPES[shape]
        self.weight = (torch.randn(out, size, generator=generator) * size**-0.5).to(dtype)
        self.x = torch.randn(num_tokens, size, generator=generator).to(dtype)
        self.ids = torch.arange(num_tokens) % _VECTORS
        changes = [torch.randn(out, size, generator=generator) for _ in range(_VECTORS)]
        self.deltas = [decompress(compress(change, 0.05)) for change in changes]
        self.used = self.ids.unique().tolist()
        self.steps = [_COEFFICIENT * delta.scale for delta in self.deltas]
        self.signs = [delta.signs() for delta in self.deltas]
        self.dense = [signs.to(dtype) for signs in self.signs]
        pairs = zip(self.dense, self.steps, strict=True)
        self.merged = [(self.weight.float() + step * dense.float()).to(dtype) for dense, step in pairs]


def _each(i: _Inputs, product) -> Tensor:
    """product(rows, vector) of the tokens of each vector, one vector after the other."""
    out = i.x.new_empty(len(i.x), len(i.weight))
    for vector in i.used:
        out[vector::_VECTORS] = product(i.x[vector::_VECTORS], vector)
    return out


def _dense(i: _Inputs) -> Tensor:
    return i.x @ i.weight.T + _each(i, lambda rows, vector: rows @ i.dense[vector].T * i.steps[vector])


def _merged(i: _Inputs) -> Tensor:
    return _each(i, lambda rows, vector: rows @ i.merged[vector].T)


def _unpacked(i: _Inputs) -> Tensor:
    return i.x @ i.weight.T + _each(i, lambda rows, vector: rows @ i.signs[vector].to(rows.dtype).T * i.steps[vector])


def cells(context: Context) -> Cells:
    for shape in context.shapes:
        for dtype in context.dtypes:
            for num_tokens in context.tokens:
                yield _cell(context, shape, dtype, num_tokens)


def _cell(context: Context, shape: str, dtype: torch.dtype, num_tokens: int) -> Cell:
    inputs = _Inputs(shape, dtype, num_tokens)

    def ours(backend: str = "auto") -> Tensor:
        return ternary_linear(
            inputs.x, inputs.weight, inputs.deltas, inputs.ids, coefficients=_COEFFICIENT, backend=backend
        )

    reference64 = torch.stack(
        [
            (inputs.weight.double() + inputs.steps[e] * inputs.signs[e]) @ x.double()
            for x, e in zip(inputs.x, inputs.ids.tolist(), strict=True)
        ]
    )
    eager = _dense(inputs)

    def checked(call) -> Check:
        return check(call(), reference64, eager, "out")

    candidates = [
        Candidate(
            "ours", lambda _: ours(), lambda: checked(ours), True, _dispatch.resolve("ternary_linear", "auto", "cpu")
        ),
        Candidate("base", lambda _: ternary_linear(inputs.x, inputs.weight, [])),
        Candidate("torch_base", lambda _: nn.functional.linear(inputs.x, inputs.weight), version=torch.__version__),
    ]
    for name, way in {"torch_dense": _dense, "torch_merged": _merged, "torch_unpacked": _unpacked}.items():
        candidates.append(
            Candidate(name, lambda _, way=way: way(inputs), lambda way=way: checked(lambda: way(inputs)),
                      version=torch.__version__)
        )  # fmt: skip
    numel = inputs.weight.numel()
    return Cell(
        "ternary_linear", shape, dtype, num_tokens,
        [candidate for candidate in candidates if context.wants(candidate.name)],
        flops=2 * num_tokens * numel,
        bytes=numel * (dtype.itemsize + len(inputs.used) / 4) + num_tokens * sum(inputs.weight.shape) * dtype.itemsize,
    )  # fmt: skip
