"""The expert FFN on quantised weights: ours, and ggml's formats of as many bits."""

import gc

import torch
from torch import Tensor

from benchmarks.harness import Candidate, Cell, Cells, Check, Context
from benchmarks.inputs import make_batches, make_layer, touched_experts
from benchmarks.ops.bench_expert_ffn import Oracle, no_memory
from benchmarks.providers import Batch, Layer, Run
from benchmarks.providers.ggml import Ggml
from benchmarks.providers.ours import Ours
from benchmarks.providers.ours_quantized import OursQuantized
from benchmarks.shapes import SHAPES
from moe_kernels import QuantizedWeights

SUMMARY = "expert FFN on quantised weights, beside ggml; the floor counts 4 bits a weight"
DEFAULTS = dict(shapes=["A", "B", "C"], dtypes=["bf16", "fp32"], tokens=[1, 4, 16, 64, 512])
PROVIDERS = (
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
PROVIDER_NAMES = [provider.name for provider in PROVIDERS]

#: ggml rounds activations to 8 bits as well: a relative error beyond this means another computation
_MOST_ERROR = 0.2


def _dequantised(weights: QuantizedWeights, expert: int, dtype: torch.dtype) -> Tensor:
    return QuantizedWeights.from_bytes(weights.data[expert : expert + 1]).dequantize(dtype)


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
            runs: dict[str, Run] = {}
            weights: dict[str, tuple[QuantizedWeights, QuantizedWeights]] = {}
            skipped = {}
            for provider in PROVIDERS:
                if not context.wants(provider.name):
                    continue
                reason = provider.missing() or provider.unsuited(layer) or no_memory(provider, layer)
                if reason is not None:
                    skipped[provider.name] = reason
                elif isinstance(provider, OursQuantized):
                    weights[provider.name] = provider.weights(layer)
                    runs[provider.name] = provider.run_on(*weights[provider.name])
                else:
                    runs[provider.name] = provider.prepare(layer)
            for num_tokens in context.tokens:
                yield _cell(layer, runs, weights, skipped, num_tokens)
            del layer, runs, weights
            gc.collect()


def _cell(layer: Layer, runs: dict[str, Run], weights: dict, skipped: dict[str, str], num_tokens: int) -> Cell:
    shape = layer.shape
    batches: list[Batch] = make_batches(shape, layer.dtype, num_tokens)
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
    versions = {provider.name: provider for provider in PROVIDERS}
    for name, run in runs.items():

        def checked(run=run, name=name) -> Check:
            result = run(batches[0])
            if name not in weights:
                return plain.check(result, name) if name == "ours" else _distance(result, plain)
            rounded = Oracle(layer, batches[0], [*map(_of_expert, weights[name])])
            return rounded.check(result, name)

        call = lambda i, run=run: run(batches[i % len(batches)])  # noqa: E731
        cell.candidates.append(Candidate(name, call, checked, name.startswith("ours"), versions[name].version()))
    return cell


def _of_expert(weights: QuantizedWeights):
    return lambda expert, dtype: _dequantised(weights, expert, dtype)
