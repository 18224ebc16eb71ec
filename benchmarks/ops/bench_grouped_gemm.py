"""Grouped matrix multiplication alone: the gate_up projection of rows that are in expert order already."""

import gc

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import READ_PROBE, Candidate, Cell, Cells, Check, Context, check
from benchmarks.inputs import make_batches, make_layer
from benchmarks.providers import Layer
from benchmarks.providers.base import installed_version, module_missing
from benchmarks.providers.ours import our_backends
from benchmarks.shapes import SHAPES
from moe_kernels import _dispatch, grouped_gemm, permute, plan_dispatch, prepack

SUMMARY = "grouped_gemm of the gate_up projection, beside F.grouped_mm and torch.mm for each expert"
DEFAULTS = dict(shapes=["A", "B", "C"], dtypes=["bf16", "fp32"], tokens=[1, 16, 512, 2048])
GPU_DEFAULTS = dict(
    shapes=["A", "gpt-oss-20b", "mixtral-8x7b", "deepseek-v3"], dtypes=["bf16"], tokens=[1, 16, 256, 4096, 16384]
)
PROVIDER_NAMES = ["ours", "ours_triton", "ours_prepacked", "moe_ops", "torch_grouped_mm", "torch_mm", READ_PROBE]

#: experts whose rows are compared with float64
_CHECKED_EXPERTS = 4


def cells(context: Context) -> Cells:
    for shape_name in context.shapes:
        shape = SHAPES[shape_name]
        for dtype in context.dtypes:
            layer = make_layer(shape, dtype, context.threads)
            packed = None
            reason = _dispatch.missing_reason("grouped_gemm", "native", "cpu")
            wants_packed = context.wants("ours_prepacked", context.device.type == "cpu")
            if reason is None and wants_packed:
                packed = prepack(layer.gate_up_proj)
            for num_tokens in context.tokens:
                cell = _cell(context, layer, packed, num_tokens)
                if reason is not None and wants_packed:
                    cell.skipped["ours_prepacked"] = f"prepack needs the native kernels: {reason}"
                yield cell
            del layer, packed
            gc.collect()


def _cell(context: Context, layer: Layer, packed, num_tokens: int) -> Cell:
    shape, dtype = layer.shape, layer.dtype
    expert_weights = layer.gate_up_proj.detach()
    problems: list[tuple[Tensor, Tensor, list[int]]] = []
    for batch in make_batches(shape, dtype, num_tokens):
        plan = plan_dispatch(batch.topk_ids_int32, shape.num_experts)
        problems.append((permute(batch.hidden_states, plan), plan.expert_offsets, plan.expert_offsets.tolist()))
    rows0, offsets0, bounds0 = problems[0]
    used = [[e for e in range(shape.num_experts) if bounds[e] < bounds[e + 1]] for _, _, bounds in problems]
    checked_experts = used[0][:: max(1, len(used[0]) // _CHECKED_EXPERTS)]

    def torch_mm(i: int) -> Tensor:
        rows, _, bounds = problems[i % len(problems)]
        out = rows.new_empty(rows.shape[0], expert_weights.shape[1])
        for expert, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if begin < end:
                torch.mm(rows[begin:end], expert_weights[expert].T, out=out[begin:end])
        return out

    def grouped_mm(i: int) -> Tensor:
        rows, offsets, _ = problems[i % len(problems)]
        return F.grouped_mm(rows, expert_weights.transpose(1, 2), offs=offsets[1:])

    def ours(weights, backend: str):
        def call(i: int) -> Tensor:
            rows, offsets, _ = problems[i % len(problems)]
            return grouped_gemm(rows, weights, offsets, backend=backend)

        return call

    def checker(call):
        def checked() -> Check:
            result = call(0)
            parts = []
            for expert in checked_experts:
                some = slice(bounds0[expert], bounds0[expert + 1])
                weight = expert_weights[expert]
                parts.append((result[some], rows0[some].double() @ weight.double().T, rows0[some] @ weight.T))
            return check(*(torch.cat(side) for side in zip(*parts, strict=True)))

        return checked

    pairs = num_tokens * shape.top_k
    out_features = expert_weights.shape[1]
    one_expert = expert_weights[0].numel() * dtype.itemsize
    read_bytes = sum(map(len, used)) / len(used) * one_expert
    cell = Cell(
        op="grouped_gemm",
        shape=shape.name,
        dtype=dtype,
        num_tokens=num_tokens,
        candidates=[],
        flops=2.0 * pairs * out_features * shape.hidden_size,
        bytes=read_bytes + pairs * (shape.hidden_size + out_features) * dtype.itemsize,
        probe_bytes=read_bytes,
    )
    backends = our_backends("grouped_gemm")
    calls = {name: (ours(expert_weights, backend), True, backend) for name, backend in backends.items()}
    if packed is not None:
        calls["ours_prepacked"] = (ours(packed, backends["ours"]), True, backends["ours"])
    if context.wants("moe_ops", False) and module_missing("moe_ops", "moe-ops") is None:
        import moe_ops

        def moe_ops_gemm(i: int) -> Tensor:
            rows, offsets, _ = problems[i % len(problems)]
            return moe_ops.grouped_gemm(rows, expert_weights, offsets)

        calls["moe_ops"] = (moe_ops_gemm, False, installed_version("moe-ops"))
    if hasattr(F, "grouped_mm"):
        calls["torch_grouped_mm"] = (grouped_mm, False, torch.__version__)
    else:
        cell.skipped["torch_grouped_mm"] = "torch.nn.functional.grouped_mm is not in this torch"
    calls["torch_mm"] = (torch_mm, False, torch.__version__)
    for name, (call, is_ours, version) in calls.items():
        if context.wants(name):
            cell.candidates.append(Candidate(name, call, checker(call), is_ours, version))
    if context.probe is not None and context.limits is not None and context.wants(READ_PROBE):
        readers = [
            context.probe.reader([expert_weights[e] for e in experts], context.threads, context.limits.variant)
            for experts in used
        ]
        cell.candidates.append(Candidate(READ_PROBE, lambda i: readers[i % len(readers)]()))
    return cell
