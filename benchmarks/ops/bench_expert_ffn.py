"""The expert FFN, forward: the op that everything else is there for."""

import gc
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.harness import READ_PROBE, Candidate, Cell, Cells, Check, Context, check
from benchmarks.inputs import available_bytes, fingerprint, make_batches, make_layer, touched_experts
from benchmarks.providers import PROVIDERS, Batch, Layer, Provider, Run
from benchmarks.shapes import SHAPES
from benchmarks.timing import describe
from moe_kernels import expert_ffn

SUMMARY = "expert FFN forward, every provider"
DEFAULTS = dict(shapes=["A", "B", "C"], dtypes=["bf16", "fp32"], tokens=[1, 4, 16, 64, 512, 2048])
#: a model's every layer between one token and a long prompt
GPU_DEFAULTS = dict(
    shapes=["A", "gpt-oss-20b", "mixtral-8x7b", "deepseek-v3"],
    dtypes=["bf16"],
    tokens=[1, 4, 16, 64, 256, 1024, 4096, 16384],
)
PROVIDER_NAMES = [READ_PROBE, *PROVIDERS]

#: [1, out, in] of an expert in a dtype
ExpertWeights = Callable[[int, torch.dtype], Tensor]
#: rows of the output that are compared; each row of a result stands alone
_CHECKED_ROWS = 32
#: left free beside the providers' private copies, for activations
_SPARE_BYTES = 2 << 30


class Oracle:
    """The package's reference in float64 and in the layer's own dtype, on some rows of a batch.

    Expert by expert: all weights in float64 would be four times their size in bfloat16. ``weights`` are two
    functions of (expert, dtype) for what the kernel reads instead of the layer's weights.
    """

    def __init__(self, layer: Layer, batch: Batch, weights: Sequence[ExpertWeights] = ()):
        self.weights = weights or [
            lambda expert, dtype, stack=stack: stack[expert : expert + 1].to(dtype)
            for stack in (layer.gate_up_proj, layer.down_proj)
        ]
        num_tokens = batch.hidden_states.shape[0]
        step = max(1, math.ceil(num_tokens / _CHECKED_ROWS))
        self.rows = torch.arange(0, num_tokens, step)
        self.reference64 = self._reference(layer, batch, torch.float64)
        self.eager = self._reference(layer, batch, layer.dtype)

    def _reference(self, layer: Layer, batch: Batch, dtype: torch.dtype) -> Tensor:
        hidden_states = batch.hidden_states[self.rows].to(dtype)
        topk_ids, topk_weights = batch.topk_ids[self.rows], batch.topk_weights[self.rows].to(dtype)
        out = torch.zeros_like(hidden_states)
        for expert in topk_ids.unique().tolist():
            only = torch.where(topk_ids == expert, 0, -1)
            weights = [of_expert(expert, dtype) for of_expert in self.weights]
            out += expert_ffn(hidden_states, only, topk_weights, *weights, backend="reference")
        return out

    def check(self, result: Tensor, name: str) -> Check:
        return check(result[self.rows], self.reference64, self.eager, name)


def no_memory(provider: Provider, layer: Layer) -> str | None:
    """Why the provider's private copies do not fit, or None."""
    available = available_bytes()
    needed = provider.copies * layer.weight_bytes
    if available is not None and needed and needed + _SPARE_BYTES > available:
        return f"its copies of the weights take {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
    return None


def wrong_device(provider: Provider, context: Context) -> str | None:
    """Why the provider cannot run on the run's device, or None."""
    device = context.device.type
    return None if device in provider.devices else f"runs on {' and '.join(provider.devices)}, not on {device}"


def prepare(
    context: Context, layer: Layer, providers: dict[str, Provider] = PROVIDERS
) -> tuple[dict[str, Run], dict[str, str]]:
    """Functions of all providers that can run this layer, and why the others cannot."""
    ready: dict[str, Run] = {}
    skipped: dict[str, str] = {}
    for name, provider in providers.items():
        if not context.wants(name, provider.default and context.device.type in provider.devices):
            continue
        reason = (
            wrong_device(provider, context)
            or provider.missing()
            or provider.unsuited(layer)
            or no_memory(provider, layer)
        )
        if reason is None:
            try:
                ready[name] = provider.prepare(layer)
            except Exception as error:  # a peer built for another torch fails in ways of its own
                reason = describe(error)
        if reason is not None:
            skipped[name] = reason
    return ready, skipped


@torch.no_grad()
def cells(context: Context) -> Cells:
    for shape_name in context.shapes:
        shape = SHAPES[shape_name]
        for dtype in context.dtypes:
            layer = make_layer(shape, dtype, context.threads)
            ready, skipped = prepare(context, layer)
            untouched = fingerprint(layer)
            for num_tokens in context.tokens:
                yield _cell(context, layer, ready, skipped, num_tokens, untouched)
            del layer, ready
            gc.collect()  # the private copies go before the next layer's are made


def _cell(
    context: Context, layer: Layer, ready: dict[str, Run], skipped: dict[str, str], num_tokens: int, untouched: int
) -> Cell:
    shape = layer.shape
    batches = make_batches(shape, layer.dtype, num_tokens)
    oracle = Oracle(layer, batches[0])
    touched = [touched_experts(batch) for batch in batches]
    one_expert = layer.weight_bytes / shape.num_experts
    read_bytes = sum(map(len, touched)) / len(touched) * one_expert
    cell = Cell(
        op="expert_ffn",
        shape=shape.name,
        dtype=layer.dtype,
        num_tokens=num_tokens,
        candidates=[],
        flops=shape.flops(num_tokens),
        bytes=read_bytes + 2 * num_tokens * shape.hidden_size * layer.dtype.itemsize,
        probe_bytes=read_bytes,
        skipped=dict(skipped),
    )
    for name, run in ready.items():
        provider = PROVIDERS[name]
        reason = provider.unsuited(layer, num_tokens)
        if reason is not None:
            cell.skipped[name] = reason
            continue

        def checked(run=run, name=name) -> Check:
            result = oracle.check(run(batches[0]), name)
            if fingerprint(layer) != untouched:
                raise SystemExit(f"{name} wrote into the weights that all providers share; nothing after it counts")
            return result

        cell.candidates.append(
            Candidate(
                name,
                lambda i, run=run: run(batches[i % len(batches)]),
                checked,
                provider.ours,
                provider.version(layer),
            )
        )
    if context.probe is not None and context.limits is not None and context.wants(READ_PROBE):
        readers = []
        for experts in touched:
            pieces = [weights.detach()[e] for e in experts for weights in (layer.gate_up_proj, layer.down_proj)]
            readers.append(context.probe.reader(pieces, context.threads, context.limits.variant))
        cell.candidates.append(Candidate(READ_PROBE, lambda i: readers[i % len(readers)]()))
    return cell
