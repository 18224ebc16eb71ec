"""What a public call costs over the kernel op that it calls, and what importing moe_kernels costs over importing torch.

Each public function is timed on inputs so small that the kernel is next to nothing, in turns with the op below it.
"""

import subprocess
import sys

import torch

from benchmarks.harness import Candidate, Cell, Cells, Context
from moe_kernels import Activation, _dispatch, expert_ffn, grouped_gemm, permute, plan_dispatch, route, unpermute
from moe_kernels.ops.expert_ffn import native as expert_ffn_native
from moe_kernels.ops.expert_ffn import reference as expert_ffn_reference
from moe_kernels.ops.grouped_gemm import native as grouped_gemm_native
from moe_kernels.ops.grouped_gemm import reference as grouped_gemm_reference
from moe_kernels.ops.permute import native as permute_native
from moe_kernels.ops.permute import reference as permute_reference
from moe_kernels.ops.route import native as route_native
from moe_kernels.ops.route import reference as route_reference

SUMMARY = "public call over its kernel op (us), import over torch's own (s)"
DEFAULTS = dict(shapes=["tiny"], dtypes=["fp32"], tokens=[1])
PROVIDER_NAMES = ["public_call", "kernel_op", "import_over_torch"]

_HIDDEN_SIZE, _INTERMEDIATE_SIZE, _NUM_EXPERTS, _TOP_K = 16, 16, 4, 2
_NUM_IMPORTS = 7


def cells(context: Context) -> Cells:
    for dtype in context.dtypes:
        for num_tokens in context.tokens:
            yield from _call_cells(context, dtype, num_tokens)
    if context.wants("import_over_torch"):
        yield _import_cell()


def _call_cells(context: Context, dtype: torch.dtype, num_tokens: int) -> Cells:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden_states, logits = random(num_tokens, _HIDDEN_SIZE), random(num_tokens, _NUM_EXPERTS)
    gate_up_proj = random(_NUM_EXPERTS, 2 * _INTERMEDIATE_SIZE, _HIDDEN_SIZE)
    down_proj = random(_NUM_EXPERTS, _HIDDEN_SIZE, _INTERMEDIATE_SIZE)
    topk_ids, topk_weights = route(logits, _TOP_K, renormalize=True)
    plan = plan_dispatch(topk_ids, _NUM_EXPERTS)
    rows = permute(hidden_states, plan)
    offsets = plan.expert_offsets
    activation = Activation()
    ffn = (hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj)
    routing = (logits, None, _TOP_K, 0, True, 1.0, 1, 1, 0, 0)
    out_features = gate_up_proj.shape[1]
    native = _dispatch.resolve("expert_ffn", "auto", "cpu") == "native"
    kernel_arguments = (None, None, *activation.kernel_arguments(), False, gate_up_proj.shape[1], False)

    # op -> public call, the op below it when native, and the reference function that stands in when not
    calls = {
        "route": (
            lambda i: route(logits, _TOP_K, renormalize=True),
            lambda i: route_native.route(*routing),
            lambda i: route_reference.route(*routing),
        ),
        "plan_dispatch": (
            lambda i: plan_dispatch(topk_ids, _NUM_EXPERTS),
            lambda i: permute_native.plan_dispatch(topk_ids, _NUM_EXPERTS),
            lambda i: permute_reference.plan_dispatch(topk_ids, _NUM_EXPERTS),
        ),
        "permute": (
            lambda i: permute(hidden_states, plan),
            lambda i: permute_native.permute(hidden_states, plan.source_rows),
            lambda i: permute_reference.permute(hidden_states, plan),
        ),
        "unpermute": (
            lambda i: unpermute(rows, plan, topk_weights),
            lambda i: permute_native.unpermute(rows, plan.permuted_rows, topk_weights),
            lambda i: permute_reference.unpermute(rows, plan, topk_weights),
        ),
        "grouped_gemm": (
            lambda i: grouped_gemm(rows, gate_up_proj, offsets),
            lambda i: grouped_gemm_native.grouped_gemm(rows, gate_up_proj, offsets, None, out_features),
            lambda i: grouped_gemm_reference.grouped_gemm(rows, gate_up_proj, offsets, None),
        ),
        "expert_ffn": (
            lambda i: expert_ffn(*ffn),
            lambda i: expert_ffn_native.expert_ffn(*ffn, *kernel_arguments),
            lambda i: expert_ffn_reference.expert_ffn(*ffn, None, None, activation, False),
        ),
    }
    for op, (public, kernel, reference) in calls.items():
        below = kernel if native else reference
        candidates = [
            Candidate("public_call", public, version="native" if native else "reference"),
            Candidate("kernel_op", below, version="native" if native else "reference"),
        ]
        yield Cell(f"call_overhead.{op}", "tiny", dtype, num_tokens, candidates, baseline="kernel_op")


def _import_cell() -> Cell:
    # torch is in first, so what is left is ours alone; a fresh process each time, files cached by the ones before
    code = "import torch, time; t = time.perf_counter(); import moe_kernels; print(time.perf_counter() - t)"

    def seconds() -> float:
        done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=True)
        return float(done.stdout)

    cell = Cell("call_overhead.import", "-", torch.float32, 0, [], baseline="import_over_torch")
    cell.measured = {"import_over_torch": lambda: [seconds() * 1e3 for _ in range(_NUM_IMPORTS)]}
    return cell
