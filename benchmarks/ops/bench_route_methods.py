"""Ways of routing beside the chains of torch ops that do the same, and beside our own top-k routing."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Candidate, Cell, Cells, Check, Context, check
from benchmarks.shapes import SHAPES
from moe_kernels import _dispatch, plan_dispatch, route, route_expert_choice, route_top_p

SUMMARY = "top-k with its dispatch plan, top-p, expert choice: each beside torch's chain and beside top-k"
DEFAULTS = dict(shapes=["A"], dtypes=["bf16", "fp32"], tokens=[64, 2048])
PROVIDER_NAMES = ["ours", "ours_top_k", "torch_chain"]

_NUM_INPUTS = 4
_TOP_P = 0.4

Method = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], int]


def cells(context: Context) -> Cells:
    for shape_name in context.shapes:
        for dtype in context.dtypes:
            for num_tokens in context.tokens:
                for name in _METHODS:
                    yield _cell(context, name, shape_name, dtype, num_tokens)


def _top_k_and_plan(num_tokens: int, num_experts: int, top_k: int) -> Method:
    def ours(logits: Tensor, backend: str = "auto") -> Tensor:
        ids, weights = route(logits, top_k, renormalize=True, backend=backend)
        plan_dispatch(ids, num_experts, backend=backend)
        return weights

    def chain(logits: Tensor) -> Tensor:
        weights, ids = logits.float().softmax(1).topk(top_k, dim=1)
        ids.flatten().sort(stable=True)
        torch.bincount(ids.flatten(), minlength=num_experts).cumsum(0)
        return weights / weights.sum(1, keepdim=True)

    return ours, chain, lambda logits: ours(logits, "reference"), top_k


def _top_p(num_tokens: int, num_experts: int, top_k: int) -> Method:
    def chain(logits: Tensor) -> Tensor:
        probs, _ = logits.float().softmax(1).sort(dim=1, descending=True)
        return probs.masked_fill(probs.cumsum(1) - probs > _TOP_P, 0)

    def ours(logits: Tensor, backend: str = "auto") -> Tensor:
        return route_top_p(logits, _TOP_P, backend=backend)[1]

    return ours, chain, lambda logits: ours(logits, "reference"), num_experts


def _expert_choice(num_tokens: int, num_experts: int, top_k: int) -> Method:
    capacity = max(num_tokens * top_k // num_experts, 1)

    def chain(logits: Tensor) -> Tensor:
        return logits.float().softmax(1).topk(capacity, dim=0).values

    def ours(logits: Tensor, backend: str = "auto") -> Tensor:
        return route_expert_choice(logits, capacity, backend=backend)[1]

    return ours, chain, lambda logits: ours(logits, "reference"), num_experts


_METHODS: dict[str, Callable[[int, int, int], Method]] = {
    "top_k_and_plan": _top_k_and_plan,
    "top_p": _top_p,
    "expert_choice": _expert_choice,
}


def _cell(context: Context, name: str, shape_name: str, dtype: torch.dtype, num_tokens: int) -> Cell:
    shape = SHAPES[shape_name]
    ours, chain, reference, width = _METHODS[name](num_tokens, shape.num_experts, shape.top_k)
    generator = torch.Generator().manual_seed(num_tokens)
    inputs = [torch.randn(num_tokens, shape.num_experts, generator=generator).to(dtype) for _ in range(_NUM_INPUTS)]

    def checked() -> Check:
        return check(ours(inputs[0]), reference(inputs[0].double()), reference(inputs[0]), name)

    def on_inputs(function: Callable[[Tensor], object]) -> Callable[[int], object]:
        return lambda i: function(inputs[i % _NUM_INPUTS])

    candidates = [
        Candidate("ours", on_inputs(ours), checked, True, _dispatch.resolve("route", "auto", "cpu")),
        Candidate("ours_top_k", on_inputs(lambda logits: route(logits, shape.top_k, renormalize=True))),
        Candidate("torch_chain", on_inputs(chain), version=torch.__version__),
    ]
    return Cell(
        op=f"route_{name}",
        shape=shape_name,
        dtype=dtype,
        num_tokens=num_tokens,
        candidates=[candidate for candidate in candidates if context.wants(candidate.name)],
        bytes=num_tokens * (shape.num_experts * dtype.itemsize + width * 8),
    )
