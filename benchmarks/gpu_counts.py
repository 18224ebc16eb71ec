"""Counts what GPU kernels do, without a GPU: ``python benchmarks/gpu_counts.py --shape A --tokens 16 512``.

Our CUDA and Triton kernels and other people's Triton kernels run on the same inputs in the PTX interpreter of
``tests/gpu/ptx``, and the results are compared with the reference. Per call:

launches         kernels; the torch ops that a peer runs beside its kernels (fills, copies, sums) are not counted at all
instructions     issued by warps
read, write      32-byte sectors asked for by warp instructions; / floor: over what must move if each byte moves once
memory           distinct sectors: what DRAM moves when the caches are perfect
conflicts        shared-memory wavefronts beyond one for each phase

Task vectors (--op task_vector), of 256 x 1024 elements: one or eight of 20 % density are added to a weight in bfloat16,
and decoded from packed bytes; eight weights are merged into one; tokens meet a weight and one vector. Floors: planes or
packed bytes read, planes written, all weights read and written.

Adapters (--op routed_lora), eight of rank 16 on a layer of 1024 x 1024 with a base, adapters drawn at random for each
token. Floor: input, base, output, and each adapter that a token names, once.

Fused logits (--op logit_fusion), of three sources: one row of Llama 2's vocabulary and one of Qwen2.5's. Floor:
each source read and the result written, once.

What lies above the floor in ours: permute reads a token once for each of its rows, top_k times in all, of which DRAM
serves one (memory) and L2 the others; a plan of more than one tile (2048 pairs) reads the ids twice and keeps a table
of tiles by experts; conflicts are the plan's counters, which lie where the experts are.
Log-probabilities are written as they are beside their block's largest, then read and written once more; a mixture reads
its sources for their sums first; a filter of the result fuses twice.
The decoder asks for a sector of fields as often as codes that share it are in different steps; Triton's for an octet a
thread, and for 4096 elements whatever a block holds.

Peers take part where they can be imported: ``pip install --no-deps --target DIR liger-kernel moe-ops`` and ``DIR`` on
PYTHONPATH. An autotuner takes the configuration that issues the fewest instructions; Liger's is off unless
LIGER_FUSED_MOE_AUTOTUNE=1 (it tries for minutes here).
"""

import argparse
import csv
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent)] + [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]

os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.harness import check, commit  # noqa: E402
from benchmarks.providers.base import installed_version  # noqa: E402
from benchmarks.shapes import SHAPES, LayerShape  # noqa: E402
from moe_kernels import (  # noqa: E402
    TokenFilter,
    apply_,
    compress,
    decompress,
    fuse_logits,
    merge,
    permute,
    plan_dispatch,
    route,
    routed_lora,
    ternary_linear,
    unpermute,
)
from tests.gpu import ptx_ops, triton_on_ptx  # noqa: E402


@dataclass
class Row:
    date: str
    commit: str
    op: str
    shape: str
    dtype: str
    tokens: int
    provider: str
    version: str
    launches: int
    instructions: int
    read_sectors: int
    write_sectors: int
    sectors_over_floor: float
    memory_over_floor: float
    conflicts: int
    barriers: int
    result: str


@dataclass
class Cell:
    """One op on one input: who computes it, and the bytes that anybody has to move."""

    op: str
    floor_bytes: int
    calls: dict[str, Callable[[], object]]
    is_right: Callable[[str, object], bool]


def _import(name: str):
    try:
        __import__(name)
        return sys.modules[name]
    except Exception as error:  # whatever a peer does when it is imported is its own affair
        print(f"{name} takes no part: {error}", file=sys.stderr)
        return None


def cells(shape: LayerShape, num_tokens: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_tokens, shape.num_experts, generator=generator)
    topk_ids, weights = route(logits, shape.top_k, renormalize=True)
    x = torch.randn(num_tokens, shape.hidden_size, generator=generator).to(dtype)
    plan = plan_dispatch(topk_ids, shape.num_experts)
    rows, num_pairs, size = permute(x, plan), topk_ids.numel(), dtype.itemsize
    moe_ops, liger = _import("moe_ops.permute_ops"), _import("liger_kernel.ops.fused_moe")
    ours = {"ours CUDA": "native", "ours Triton": "triton"}
    plan_bytes = 4 * (3 * num_pairs + shape.num_experts + 1)
    row_bytes, token_bytes = num_pairs * shape.hidden_size * size, num_tokens * shape.hidden_size * size

    def same_plan(name, result) -> bool:
        offsets, source_rows = (result[1], result[2]) if name == "Liger" else result[:2]
        return torch.equal(offsets, plan.expert_offsets) and torch.equal(source_rows, plan.source_rows)

    calls = {name: lambda b=b: plan_dispatch(topk_ids, shape.num_experts, backend=b) for name, b in ours.items()}
    if liger:
        calls["Liger"] = lambda: liger.compute_routing_metadata(topk_ids, shape.num_experts)
    yield Cell("plan", plan_bytes, calls, same_plan)

    def same_rows(name, result) -> bool:
        if name != "moe-ops":
            return torch.equal(result, rows)
        moved, row_of = result[0], result[1].view(shape.top_k, num_tokens).T
        return torch.equal(moved[row_of.long()], x[:, None].expand(-1, shape.top_k, -1))

    def plan_and_permute(backend: str) -> Tensor:
        return permute(x, plan_dispatch(topk_ids, shape.num_experts, backend=backend), backend=backend)

    calls = {name: lambda b=b: plan_and_permute(b) for name, b in ours.items()}
    if moe_ops:
        calls["moe-ops"] = lambda: moe_ops.permute(x, topk_ids, E=shape.num_experts)
    yield Cell("plan + permute", plan_bytes + 4 * num_pairs + token_bytes + row_bytes, calls, same_rows)

    expected = unpermute(rows.double(), plan, weights.double(), backend="reference")
    eager = unpermute(rows, plan, weights, backend="reference")
    calls = {name: lambda b=b: unpermute(rows, plan, weights, backend=b) for name, b in ours.items()}
    if moe_ops:
        row_of = plan.permuted_rows.T.reshape(-1).contiguous()
        from moe_ops.unpermute_ops import unpermute_forward

        calls["moe-ops"] = lambda: unpermute_forward(rows, row_of, weights, num_tokens, shape.top_k)
    if liger:
        flat = (weights.reshape(-1), plan.permuted_rows.reshape(-1), num_tokens, shape.top_k, shape.hidden_size)
        calls["Liger"] = lambda: liger._token_aggregation(rows, *flat)
    right = lambda name, out: not check(out, expected, eager).wrong  # noqa: E731
    yield Cell("unpermute", row_bytes + token_bytes + 8 * num_pairs, calls, right)

    def same_choice(name, result) -> bool:
        ids, picked = (result[1], result[0]) if name == "moe-ops" else result
        return torch.equal(ids, topk_ids) and not check(picked, weights.double(), weights).wrong

    calls = {name: lambda b=b: route(logits, shape.top_k, renormalize=True, backend=b) for name, b in ours.items()}
    if moe_ops:
        from moe_ops.fused_topk_softmax_ops import fused_topk_softmax

        calls["moe-ops"] = lambda: fused_topk_softmax(logits, shape.top_k)
    yield Cell("route", 4 * logits.numel() + 8 * num_pairs, calls, same_choice)


def task_vector_cells(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    shape, coefficients = (256, 1024), [1.0, -0.5, 2.0, 0.3, 1.0, -1.0, 0.7, 1.5]
    weight = (torch.randn(shape, generator=generator) * 0.02).to(dtype)
    differences = [torch.randn(shape, generator=generator) * 1e-3 for _ in coefficients]
    packed = [compress(difference, 0.2) for difference in differences]
    planes = decompress(packed[0]).nbytes
    weights = 2 * weight.numel() * dtype.itemsize
    ours = {"ours CUDA": "native", "ours Triton": "triton"}

    def applied(deltas: list, backend: str) -> Tensor:
        changed = weight.clone()
        apply_(changed, deltas, coefficients[: len(deltas)], backend=backend)
        return changed

    for what, vectors, bytes_each in (
        ("apply_ 1 vector", [decompress(packed[0])], planes),
        ("apply_ 8 vectors", [decompress(one) for one in packed], planes),
    ):
        expected = applied(vectors, "reference")
        calls = {name: lambda b=b, v=vectors: applied(v, b) for name, b in ours.items()}
        yield Cell(what, weights + len(vectors) * bytes_each, calls, lambda _, out, e=expected: torch.equal(out, e))
    for density in (0.05, 0.2, 1.0):
        one = compress(differences[0], density)
        expected = decompress(one, backend="reference").planes
        calls = {name: lambda b=b, one=one: decompress(one, backend=b).planes for name, b in ours.items()}
        right = lambda _, out, e=expected: torch.equal(out, e)  # noqa: E731
        yield Cell(f"decompress {density:.0%}", one.nbytes + planes, calls, right)

    experts = [weight + (difference * 4).to(dtype) for difference in differences]
    for what, options in (
        ("merge ties", dict(method="ties", semantics="mergekit", density=0.2)),
        ("merge linear", dict(method="linear")),
    ):
        expected = merge(weight, experts, **options, backend="reference")
        calls = {name: lambda b=b, o=options: merge(weight, experts, **o, backend=b) for name, b in ours.items()}
        models = len(experts) + (what == "merge ties")
        right = lambda _, out, e=expected: torch.equal(out, e)  # noqa: E731
        yield Cell(what, (models + 1) * weights // 2, calls, right)
    delta = decompress(packed[0])
    for num_tokens in (1, 16):
        x = torch.randn(num_tokens, shape[1], generator=generator).to(dtype)
        calls = {name: lambda b=b, x=x: ternary_linear(x, weight, delta, backend=b) for name, b in ours.items()}
        expected = ternary_linear(x.double(), weight.double(), delta)
        eager = ternary_linear(x, weight, delta, backend="reference")
        right = lambda _, out, e=expected, r=eager: not check(out, e, r).wrong  # noqa: E731
        floor = weights // 2 + planes + num_tokens * (shape[0] + shape[1]) * dtype.itemsize
        yield Cell(f"ternary_linear {num_tokens} tokens", floor, calls, right)


def lora_cells(num_tokens: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    num_adapters, rank, size = 8, 16, 1024

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    x, base = normal(num_tokens, size), normal(num_tokens, size)
    a, rows_of_b = normal(num_adapters, rank, size) * size**-0.5, normal(num_adapters, rank, size)
    for top_k in (1, 2):
        ids = torch.rand(num_tokens, num_adapters, generator=generator).argsort(1)[:, :top_k].int()
        weights = torch.rand(num_tokens, top_k, generator=generator)

        def op(backend: str, to: torch.dtype, ids=ids, weights=weights) -> Tensor:
            tensors = [tensor.to(to) for tensor in (x, a, rows_of_b.transpose(1, 2), base)]
            return routed_lora(*tensors[:3], ids, weights, scaling=2.0, base=tensors[3], backend=backend)

        expected, eager = op("reference", torch.float64), op("reference", dtype)
        floor = (3 * num_tokens + 2 * len(ids.unique()) * rank) * size * dtype.itemsize + 8 * ids.numel()
        yield Cell(
            f"routed_lora top {top_k}", floor, {"ours Triton": lambda op=op: op("triton", dtype)},
            lambda _, out, expected=expected, eager=eager: not check(out, expected, eager).wrong,
        )  # fmt: skip


def logit_cells(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    for vocab_size in (32_000, 151_936):
        sources = [(3 * torch.randn(1, vocab_size, generator=generator)).to(dtype) for _ in range(3)]
        draw, min_p = dict(out="sample", request_ids=torch.arange(1), seed=0), TokenFilter(min_p=0.1)
        for what, arguments in (
            ("log_probs", {}),
            ("logits", dict(out="logits")),
            ("argmax", dict(out="argmax")),
            ("sample", draw),
            ("sample, masked", dict(mask=min_p) | draw),
            ("sample, filtered", dict(keep=min_p) | draw),
            ("sample, mixture", dict(mode="mixture") | draw),
        ):
            weights = [0.5, 0.3, 0.2] if "mode" in arguments else [1.0, 0.7, -0.7]

            def fused(backend, inputs=sources, weights=weights, arguments=arguments):
                return fuse_logits(inputs, weights, **arguments, backend=backend)

            eager = fused("reference")
            exact = eager if eager.dtype == torch.int64 else fused("reference", [source.double() for source in sources])

            def right(_, out, exact=exact, eager=eager):
                return torch.equal(out, exact) if exact.dtype == torch.int64 else not check(out, exact, eager).wrong

            floor_bytes = sum(source.nbytes for source in sources) + eager.nbytes
            calls = {"ours CUDA": lambda f=fused: f("native"), "ours Triton": lambda f=fused: f("triton")}
            yield Cell(f"{what} {vocab_size}", floor_bytes, calls, right)


VERSIONS = {"moe-ops": "moe-ops", "Liger": "liger-kernel"}


def count(cell: Cell, shape: str, num_tokens: int, dtype: torch.dtype):
    for name, call in cell.calls.items():
        call()  # an autotuner tries its configurations now
        with ptx_ops.counting() as launches:
            result = call()
        sums = {key: sum(getattr(launched.counters, key) for launched in launches)
                for key in ("instructions", "read_sectors", "write_sectors", "sectors", "unique_sectors",
                            "bank_conflicts", "barriers")}  # fmt: skip
        over_floor = {key: round(32 * sums[key] / cell.floor_bytes, 3) for key in ("sectors", "unique_sectors")}
        version = installed_version(VERSIONS[name]) if name in VERSIONS else ""
        yield Row(
            date.today().isoformat(), commit(), cell.op, shape, str(dtype)[6:], num_tokens, name, version,
            len(launches), sums["instructions"], sums["read_sectors"], sums["write_sectors"], over_floor["sectors"],
            over_floor["unique_sectors"], sums["bank_conflicts"], sums["barriers"],
            "right" if cell.is_right(name, result) else "wrong",
        )  # fmt: skip


def main() -> int:
    """Returns 1 where one of our own results was wrong, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="moe", choices=["moe", "task_vector", "routed_lora", "logit_fusion"])
    parser.add_argument("--shape", default="A", choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 512])
    parser.add_argument("--csv", type=Path, default=_HERE / "results" / "gpu_counts.csv")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    options = parser.parse_args()
    for reason in (ptx_ops.missing_reason(), triton_on_ptx.missing_reason()):
        if reason:
            parser.error(reason)
    shape, dtype, rows = SHAPES[options.shape], torch.bfloat16, []
    shown = [field.name for field in fields(Row)][2:]
    print(" | ".join(shown))
    of_op = {  # name of the shape, what is counted
        "moe": (shape.name, lambda num_tokens: cells(shape, num_tokens, dtype)),
        "task_vector": ("256x1024", lambda _: task_vector_cells(dtype)),
        "logit_fusion": ("3 sources", lambda _: logit_cells(dtype)),
        "routed_lora": ("8x16x1024", lambda num_tokens: lora_cells(num_tokens, dtype)),
    }
    shape_name, cells_of = of_op[options.op]
    for num_tokens in options.tokens if options.op in ("moe", "routed_lora") else [0]:
        inputs = list(cells_of(num_tokens))  # inputs are made by the CPU kernels
        with pytest.MonkeyPatch.context() as patch:
            ptx_ops.redirect(patch)
            triton_on_ptx.redirect(patch)
            for cell in inputs:
                for row in count(cell, shape_name, num_tokens, dtype):
                    rows.append(row)
                    print(" | ".join(str(getattr(row, name)) for name in shown), flush=True)
    if not options.no_csv:
        is_new = not options.csv.exists()
        with options.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    return int(any(row.result == "wrong" and row.provider.startswith("ours") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
