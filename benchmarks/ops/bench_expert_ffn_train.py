"""One training step of the expert FFN: forward, and gradients of the tokens, the routing weights and both weights."""

import gc
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.harness import Candidate, Cell, Cells, Check, Context, check, worst
from benchmarks.inputs import generator, make_batches, make_layer, touched_experts
from benchmarks.ops.bench_expert_ffn import no_memory, wrong_device
from benchmarks.providers import PROVIDERS, Batch, Layer, Run
from benchmarks.shapes import SHAPES
from moe_kernels import expert_ffn

SUMMARY = "expert FFN forward and backward"
DEFAULTS = dict(shapes=["A", "B", "C"], dtypes=["bf16", "fp32"], tokens=[512])
GPU_DEFAULTS = dict(shapes=["A", "gpt-oss-20b", "mixtral-8x7b"], dtypes=["bf16"], tokens=[1024, 8192])
PROVIDER_NAMES = [name for name, provider in PROVIDERS.items() if provider.trains]

#: tokens whose gradients are compared (a token's gradient depends on that token alone) …
_CHECKED_TOKENS = 8
#: … and experts whose weight gradients are (an expert's gradient depends on its tokens alone)
_CHECKED_EXPERTS = 2

_NAMES = ("out", "grad_hidden_states", "grad_topk_weights", "grad_gate_up_proj", "grad_down_proj")


def _step(run: Run, batch: Batch, weights: tuple[Tensor, Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
    out = run(batch)
    return out.detach(), *torch.autograd.grad(out, (batch.hidden_states, batch.topk_weights, *weights), grad_out)


class Oracle:
    """Output and gradients by autograd through the package's reference, on a few tokens and a few experts."""

    def __init__(self, layer: Layer, batch: Batch, grad_out: Tensor):
        self.tokens = torch.arange(min(_CHECKED_TOKENS, batch.topk_ids.shape[0]))
        touched = touched_experts(batch)
        self.experts = sorted({touched[0], touched[-1]})[:_CHECKED_EXPERTS]
        self.reference64 = self._results(layer, batch, grad_out, torch.float64)
        self.eager = self._results(layer, batch, grad_out, layer.dtype)

    def _results(self, layer: Layer, batch: Batch, grad_out: Tensor, dtype: torch.dtype) -> list[Tensor]:
        def gradients(rows: Tensor, expert: int) -> tuple[Tensor, ...]:
            one = slice(expert, expert + 1)
            leaves = (
                batch.hidden_states.detach()[rows].to(dtype).requires_grad_(),
                batch.topk_weights.detach()[rows].to(dtype).requires_grad_(),
                layer.gate_up_proj.detach()[one].to(dtype).requires_grad_(),
                layer.down_proj.detach()[one].to(dtype).requires_grad_(),
            )
            only = torch.where(batch.topk_ids[rows] == expert, 0, -1)
            out = expert_ffn(leaves[0], only, *leaves[1:], backend="reference")
            return out.detach(), *torch.autograd.grad(out, leaves, grad_out[rows].to(dtype))

        by_token = [0, 0, 0]
        for expert in batch.topk_ids[self.tokens].unique().tolist():
            by_token = [total + part for total, part in zip(by_token, gradients(self.tokens, expert), strict=False)]
        everyone = torch.arange(batch.topk_ids.shape[0])
        by_expert = [gradients(everyone, expert)[3:] for expert in self.experts]
        return [*by_token, *(torch.cat(parts) for parts in zip(*by_expert, strict=True))]

    def check(self, results: tuple[Tensor, ...]) -> Check:
        picked = [result[self.tokens] for result in results[:3]] + [result[self.experts] for result in results[3:]]
        return worst([check(*four) for four in zip(picked, self.reference64, self.eager, _NAMES, strict=True)])


def cells(context: Context) -> Cells:
    for shape_name in context.shapes:
        shape = SHAPES[shape_name]
        for dtype in context.dtypes:
            layer = make_layer(shape, dtype, context.threads, training=True)
            for num_tokens in context.tokens:
                yield _cell(context, layer, num_tokens)
            del layer
            gc.collect()


def _cell(context: Context, layer: Layer, num_tokens: int) -> Cell:
    shape = layer.shape
    plain = make_batches(shape, layer.dtype, num_tokens)[0]
    batch = replace(
        plain, hidden_states=plain.hidden_states.requires_grad_(), topk_weights=plain.topk_weights.requires_grad_()
    )
    grad_out = torch.randn(batch.hidden_states.shape, generator=generator(1)).to(layer.dtype)
    oracle = Oracle(layer, batch, grad_out)
    weights = (layer.gate_up_proj, layer.down_proj)
    touched_bytes = len(touched_experts(batch)) * layer.weight_bytes / shape.num_experts
    cell = Cell(
        op="expert_ffn_train",
        shape=shape.name,
        dtype=layer.dtype,
        num_tokens=num_tokens,
        candidates=[],
        training=True,
        flops=3 * shape.flops(num_tokens),
        # weights are read forward and backward; every expert's gradient is written, zeros where it has no token
        bytes=2 * touched_bytes + layer.weight_bytes + 4 * num_tokens * shape.hidden_size * layer.dtype.itemsize,
    )
    for name in PROVIDER_NAMES:
        provider = PROVIDERS[name]
        by_default = provider.default and provider.trains_by_default and context.device.type in provider.devices
        if not context.wants(name, by_default):
            continue
        reason = wrong_device(provider, context) or provider.missing()
        reason = reason or provider.unsuited(layer, num_tokens) or no_memory(provider, layer)
        if reason is not None:
            cell.skipped[name] = reason
            continue
        run = provider.prepare(layer)

        def step(i: int, run=run) -> tuple[Tensor, ...]:
            return _step(run, batch, weights, grad_out)

        cell.candidates.append(
            Candidate(name, step, lambda step=step: oracle.check(step(0)), provider.ours, provider.version(layer))
        )
    return cell
