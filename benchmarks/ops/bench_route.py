"""Routing: softmax over the experts, the top_k largest, renormalised."""

from functools import partial

import torch

from benchmarks.harness import Candidate, Cell, Cells, Check, Context, check
from benchmarks.inputs import generator
from benchmarks.providers.base import installed_version, module_missing
from benchmarks.providers.ours import our_backends
from benchmarks.shapes import SHAPES
from moe_kernels import route

SUMMARY = "routing (softmax, top-k, renormalise) of logits"
DEFAULTS = dict(shapes=["A", "B", "C"], dtypes=["bf16", "fp32"], tokens=[1, 64, 2048])
GPU_DEFAULTS = dict(shapes=["A", "deepseek-v3"], dtypes=["bf16"], tokens=[1, 64, 1024, 16384])
PROVIDER_NAMES = ["ours", "ours_triton", "moe_ops", "torch_softmax_topk", "torch_topk_only"]

_NUM_INPUTS = 4


def cells(context: Context) -> Cells:
    for shape_name in context.shapes:
        for dtype in context.dtypes:
            for num_tokens in context.tokens:
                yield _cell(context, shape_name, dtype, num_tokens)


def _cell(context: Context, shape_name: str, dtype: torch.dtype, num_tokens: int) -> Cell:
    shape = SHAPES[shape_name]
    top_k = shape.top_k
    random = generator(num_tokens)
    inputs = [torch.randn(num_tokens, shape.num_experts, generator=random).to(dtype) for _ in range(_NUM_INPUTS)]

    def ours(i: int, backend: str):
        return route(inputs[i % _NUM_INPUTS], top_k, renormalize=True, backend=backend)

    def softmax_topk(i: int):
        # what the routers of transformers do
        weights, ids = inputs[i % _NUM_INPUTS].float().softmax(1).topk(top_k, dim=1)
        return ids, weights / weights.sum(1, keepdim=True)

    def topk_only(i: int):
        return inputs[i % _NUM_INPUTS].topk(top_k, dim=1)

    def checked(backend: str) -> Check:
        ids, weights = ours(0, backend)
        expected_ids, expected = route(inputs[0].double(), top_k, renormalize=True, backend="reference")
        # ids may differ where two scores tie to float32's rounding, so it is the weights that are compared
        eager = route(inputs[0].float(), top_k, renormalize=True, backend="reference")[1]
        if ids.shape != expected_ids.shape:
            return Check(float("inf"), 0.0, f"ids of shape {list(ids.shape)}")
        return check(weights, expected, eager, "topk_weights")

    candidates = [
        *(
            Candidate(name, partial(ours, backend=backend), partial(checked, backend), True, backend)
            for name, backend in our_backends("route").items()
        ),
        Candidate("torch_softmax_topk", softmax_topk, version=torch.__version__),
        Candidate("torch_topk_only", topk_only, version=torch.__version__),
    ]
    if context.wants("moe_ops", False) and module_missing("moe_ops", "moe-ops") is None:
        import moe_ops

        fused = moe_ops.fused_topk_softmax
        version = installed_version("moe-ops")
        candidates.append(Candidate("moe_ops", lambda i: fused(inputs[i % _NUM_INPUTS], top_k), version=version))
    return Cell(
        op="route",
        shape=shape_name,
        dtype=dtype,
        num_tokens=num_tokens,
        candidates=[candidate for candidate in candidates if context.wants(candidate.name)],
        bytes=num_tokens * (shape.num_experts * dtype.itemsize + top_k * 8),
    )
