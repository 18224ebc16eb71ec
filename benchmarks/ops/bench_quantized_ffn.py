"""The expert FFN on quantised weights: ours, and ggml's formats of as many bits."""

import gc

import torch
from torch import Tensor

from benchmarks.harness import Candidate, Cell, Cells, Check, Context
from benchmarks.inputs import make_batches, make_layer, touched_experts
from benchmarks.ops.bench_expert_ffn import Oracle, prepare
from benchmarks.providers import Layer, Run
from benchmarks.providers.ggml import Ggml
from benchmarks.providers.ours import Ours
from benchmarks.providers.ours_quantized import OursQuantized, QuantizedRun
from benchmarks.shapes import SHAPES

SUMMARY = "expert FFN on quantised weights, beside ggml; the floor counts 4 bits a weight"
DEFAULTS = dict(shapes=["A", "B", "C"], dtypes=["bf16", "fp32"], tokens=[1, 4, 16, 64, 512])
PROVIDERS = {
    provider.name: provider
    for provider in (
        Ours(),
        OursQuantized("int8"),
        OursQuantized("int8", 128),
        OursQuantized("int4", 32),
        OursQuantized("int4", 128),
        OursQuantized("fp8"),
        OursQuantized("mxfp4"),
        Ggml("q8_0", repacked=False),
        Ggml("q8_0", repacked=True),
        Ggml("q4_0", repacked=False),
        Ggml("q4_0", repacked=True),
    )
}
PROVIDER_NAMES = list(PROVIDERS)

#: ggml rounds activations to 8 bits as well: a relative error beyond this means another computation
_MOST_ERROR = 0.2


def _distance(result: Tensor, oracle: Oracle) -> Check:
    """Of a result of rounded weights from that of the weights as they were."""
    expected = oracle.reference64
    error = (result[oracle.rows].double() - expected).norm() / expected.norm()
    return Check(error.item(), _MOST_ERROR / 8)


@torch.no_grad()
def cells(context: Context) -> Cells:
    for shape_name in context.shapes:
        for dtype in context.dtypes:
            layer = make_layer(SHAPES[shape_name], dtype, context.threads)
            runs, skipped = prepare(context, layer, PROVIDERS)
            for num_tokens in context.tokens:
                yield _cell(layer, runs, skipped, num_tokens)
            del layer, runs
            gc.collect()


def _cell(layer: Layer, runs: dict[str, Run], skipped: dict[str, str], num_tokens: int) -> Cell:
    shape = layer.shape
    batches = make_batches(shape, layer.dtype, num_tokens)
    touched = sum(len(touched_experts(batch)) for batch in batches) / len(batches)
    cell = Cell(
        op="quantized_ffn",
        shape=shape.name,
        dtype=layer.dtype,
        num_tokens=num_tokens,
        candidates=[],
        flops=shape.flops(num_tokens),
        bytes=touched / shape.num_experts * shape.weight_bytes(1) / 2,
        skipped=dict(skipped),
    )
    plain = Oracle(layer, batches[0])
    for name, run in runs.items():
        provider = PROVIDERS[name]

        def checked(run=run, provider=provider) -> Check:
            result = run(batches[0])
            if not provider.ours:
                return _distance(result, plain)
            oracle = Oracle(layer, batches[0], run.of_expert()) if isinstance(run, QuantizedRun) else plain
            return oracle.check(result, provider.name)

        call = lambda i, run=run: run(batches[i % len(batches)])  # noqa: E731
        cell.candidates.append(Candidate(name, call, checked, provider.ours, provider.version()))
    return cell
