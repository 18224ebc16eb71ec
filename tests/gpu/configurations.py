"""Every kernel configuration that the static gate compiles, with its limits.

What cannot be compiled here (no nvcc, no Triton) is left out; the tests say so.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from . import build, shipped, triton_on_ptx
from .static_gate import Configuration, Limits, from_cuda, from_triton

SOURCES = Path(__file__).parent / "sources"


def cuda_configurations() -> list[Configuration]:
    return [
        Configuration(
            "gemm (bench)", "gemm", 128, from_cuda(SOURCES / "gemm_sm80.cu", 2 * 2 * 64 * 40 * 2),
            # 16 products of 16 x 8 x 16 a warp and stage; each operand comes by asynchronous copies alone
            Limits(registers=128, min_occupancy=0.25, at_least={"tensor": 16, "async copy": 4}),
        ),
        Configuration(
            "gemm, tensor maps (bench)", "gemm", 256, from_cuda(SOURCES / "gemm_sm90.cu", 5 * 8192),
            Limits(registers=128, min_occupancy=0.25, at_least={"tensor": 4, "async copy": 3}), ("sm_90a",),
        ),
    ]  # fmt: skip


#: threads of a block, and 128-bit accesses in the variant that moves vectors
SHIPPED_KERNELS = {
    "permute": (256, 8), "unpermute": (256, 2), "unpermute_bwd": (256, 3),
    "plan_count": (256, 0), "plan_scan": (1024, 0), "plan_scatter": (256, 0),
    "route": (128, 0), "route_weights": (128, 0), "route_bwd": (128, 0),
    "apply_ternary": (256, 3), "count_touched": (256, 0), "scan_counts": (1024, 0), "apply_undoable": (512, 3),
    "collect_kept": (256, 0), "unapply_ternary": (512, 3), "decode_blocks": (256, 1), "verdict": (1024, 0),
    "merge": (256, 1), "sum_found": (1024, 0), "ternary_linear": (128, 0),
    "measure_logits": (128, 1), "total_logits": (128, 1), "fuse_logits": (128, 4), "finish_logits": (128, 4),
    "choose_tokens": (128, 4),
}  # fmt: skip
#: occupancy: what fuses keeps two numbers and a source's logit of 16 tokens a thread. Doubles move in other widths
LOGIT_KERNELS = {
    "measure_logits": 0.25, "total_logits": 0.25, "fuse_logits": 0.18, "finish_logits": 0.25, "choose_tokens": 0.18,
}  # fmt: skip

#: sums that a draw is looked up in are float64, once a row
SHIPPED_FP64 = {"choose_tokens": 256}


def shipped_configurations() -> list[Configuration]:
    """Every kernel of libmoe_kernels_cuda.so, as it lies there: nothing is compiled here."""
    return [(_sm90 if "4sm90" in key else _shipped)(key, name) for key, (_, name) in shipped.ptx().items()]


def _sm90(key: str, name: str) -> Configuration:
    """rows_gemm_sm90.cuh: products by wgmma of what tensor copies brought, and no others."""
    dtype, tokens, activates, gated = re.search(r"INS_4(\w\w16)ELi(\d+)ELb(\d)ELb(\d)E", key).groups()
    staging, stage = 8 * min(int(tokens), 64) * 32, (2 * 128 + int(tokens)) * 128
    shared = 1024 + (220 * 1024 - staging) // stage * stage + staging
    # the epilogues of gelu and gelu_tanh, beside 128 sums, keep up to two values in memory
    spilled = dict(spills=12, stack=8) if tokens == "128" and activates == "1" else {}
    limits = Limits(
        registers=168, min_occupancy=12 / 64, **spilled, at_least={"tensor": 8, "async copy": 3},
        at_most={"mma.sync": 0, "fp64": 0, "float atomic": 0, "local": 6 if spilled else 0},
    )  # fmt: skip
    shown = (
        f"rows_gemm {dtype} {tokens} tokens{' gated' if gated == '1' else ' activating' if activates == '1' else ''}"
    )
    return Configuration(shown, name, 384, lambda arch: (shipped.cubins(arch)[key][0], shared), limits, ("sm_90a",))


def _shipped(key: str, name: str) -> Configuration:
    kernel, arguments = re.search(r"GLOBAL__N_1\d+([a-z_]+)_kernel(?:I(.*?)EEv|E)", key).groups()
    threads, wide = SHIPPED_KERNELS[kernel]
    # Vec<unsigned, 4>, more than one element in a vector, or floats; task vectors have no variant that moves less
    vectors = {"permute": r"VecIjLi4E", "unpermute": r"Li[248]E$", "unpermute_bwd": r"Li[248]E$"}.get(
        kernel, "^f" if kernel in LOGIT_KERNELS else ""
    )
    moves_vectors = wide and re.search(vectors, arguments or "")
    # float64 serves gradient checks: it may be slow
    is_double = arguments is not None and arguments.startswith("d")
    limits = Limits(
        min_occupancy=0.1 if is_double else LOGIT_KERNELS.get(kernel, 0.25),
        at_least={"128-bit global": wide} if moves_vectors else {},
        at_most={"local": 0, "float atomic": 0} | ({} if is_double else {"fp64": SHIPPED_FP64.get(kernel, 0)}),
    )
    shown = f"{kernel} {arguments or ''}".replace("NS_", "").strip()
    return Configuration(shown, name, threads, lambda arch: (shipped.cubins(arch)[key][0], 0), limits)


def triton_configurations() -> list[Configuration]:
    from . import triton_kernels as kernels

    def grouped_gemm(capability: int) -> build.Compiled:
        pointers = dict(rows="*bf16", weights="*bf16", out="*bf16", offsets="*i32", columns="i32", depth="i32")
        return build.triton_compile(
            kernels.grouped_gemm, pointers, dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32), capability=capability,
            aligned=tuple(pointers),
        )  # fmt: skip

    def gather_rows(capability: int) -> build.Compiled:
        return build.triton_compile(
            kernels.gather_rows, dict(hidden_states="*bf16", source_rows="*i32", out="*bf16", hidden_size="i32"),
            dict(BLOCK=1024), capability=capability, aligned=("hidden_states", "out", "hidden_size"),
        )  # fmt: skip

    return [
        Configuration(
            "grouped_gemm 64x64x32 (bench, Triton)", "grouped_gemm", 128, from_triton(grouped_gemm),
            Limits(min_occupancy=0.25, at_least={"tensor": 1, "async copy": 1, "128-bit global": 4}),
        ),
        Configuration(
            "gather_rows (bench, Triton)", "gather_rows", 128, from_triton(gather_rows),
            Limits(registers=40, min_occupancy=0.9, at_least={"128-bit global": 2}),
        ),
    ]  # fmt: skip


#: 128-bit accesses of our Triton kernels
TRITON_KERNELS = {
    "plan": {"_plan_count_kernel": 0, "_plan_scan_kernel": 0, "_plan_offsets_kernel": 0, "_plan_scatter_kernel": 0},
    "permute": {"_permute_kernel": 2},
    "unpermute": {"_unpermute_kernel": 2},
    "unpermute_bwd": {"_unpermute_bwd_kernel": 3},
    "expert_ffn": {"_gate_up_kernel": 4, "_grouped_gemm_kernel": 8},
    "expert_ffn, few tokens": {"_gate_up_kernel": 1, "_grouped_gemm_kernel": 2},
    "expert_ffn saving": {"_gate_up_kernel": 12},
    "expert_ffn_bwd": {
        "_grad_act_kernel": 20,
        "_weight_grad_kernel": 8,
        "_row_weights_kernel": 0,
        "_grad_weights_kernel": 0,
        "_bias_grad_kernel": 0,
    },
    "apply_ternary": {"_apply_kernel": 2},
    "apply_ternary_undoable": {"_count_kernel": 0, "_apply_undoable_kernel": 2},
    "collect_kept": {"_collect_kernel": 0},
    "unapply_ternary": {"_unapply_kernel": 2},
    "merge": {"_merge_kernel": 0},  # 64 bits of bfloat16: with more of them a quarter of the occupancy
    "unpack_ternary": {"_unpack_kernel": 0},
    "ternary_linear": {"_ternary_linear_kernel": 1},
    "route": {"_route_kernel": 0},
    "route of groups": {"_route_kernel": 0},
    "route_weights": {"_route_weights_kernel": 0},
    "route_bwd": {"_route_bwd_kernel": 0},
    "routed_lora": {"_routed_lora_kernel": 4},
    "routed_lora, many tokens": {"_routed_lora_kernel": 4},
    "lora halves": {"_lora_shrink_kernel": 0, "_lora_expand_kernel": 7},  # shrink copies by cp.async
    "lora_factor_grad": {"_lora_factor_grad_kernel": 2},
    "lora_dropout": {"_lora_dropout_kernel": 1},
    "fuse_logits": {"_fuse_kernel": 4, "_finish_kernel": 4},
    "fuse_logits, one token": {"_fuse_kernel": 3, "_token_kernel": 0},  # one block: 4 logits a thread
    "fuse_logits, a mixture": {"_stats_kernel": 3, "_stats_total_kernel": 0, "_fuse_kernel": 4},
}


def _triton_launches(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The rooms' own launches in a layer of Qwen3-30B-A3B (groups: DeepSeek-V3), by name in TRITON_KERNELS."""
    from moe_kernels.ops.merge import recipe
    from moe_kernels.ops.merge import triton as merge
    from moe_kernels.ops.permute import triton as permute
    from moe_kernels.ops.route import triton as route
    from moe_kernels.ops.routed_lora import triton as routed_lora
    from moe_kernels.ops.task_vector import triton as task_vector
    from moe_kernels.ops.task_vector import unpack_triton
    from moe_kernels.ops.ternary_linear import triton as ternary_linear

    weight, planes = torch.zeros(8192, dtype=dtype), torch.ones(128, 2, dtype=torch.int64)
    undo = [torch.zeros(3).long(), torch.zeros(2, 16).long(), torch.zeros(16, dtype=dtype), torch.zeros(3).long()]

    ids, weights, source_rows = torch.zeros(16, 8, dtype=torch.int32), torch.ones(16, 8), torch.arange(128).int()
    many_ids = torch.zeros(64, 8, dtype=torch.int32)  # two tiles
    x, rows, logits = torch.zeros(16, 2048, dtype=dtype), torch.zeros(128, 2048, dtype=dtype), torch.zeros(16, 128)
    return {
        "plan": lambda: permute.plan_dispatch(many_ids, 128),
        "permute": lambda: permute.permute(x, source_rows),
        "unpermute": lambda: permute.unpermute(rows, source_rows.view(16, 8), weights),
        "unpermute_bwd": lambda: permute.unpermute_backward(x, rows, weights, source_rows, source_rows.view(16, 8)),
        "expert_ffn": lambda: _expert_ffn(1024, dtype, save=False),
        "expert_ffn, few tokens": lambda: _expert_ffn(16, dtype, save=False),
        "expert_ffn saving": lambda: _expert_ffn(1024, dtype, save=True),
        "expert_ffn_bwd": lambda: _expert_ffn(1024, dtype, backward=True),
        "apply_ternary": lambda: task_vector.apply_ternary(weight, [planes], [1.0]),
        "apply_ternary_undoable": lambda: task_vector.apply_ternary_undoable(weight, [planes], [1.0]),
        "collect_kept": lambda: task_vector._collect_kernel[(2,)](weight, undo[0], undo[3], undo[2], BLOCK=128),
        "unapply_ternary": lambda: task_vector.unapply_ternary(weight, [planes], [1.0], *undo),
        "merge": lambda: merge.merge(weight, [weight] * 8, recipe.Recipe([recipe.Source()] * 8, "sign_of_sum")),
        "unpack_ternary": lambda: unpack_triton._unpack_kernel[(2,)](
            torch.zeros(1024, dtype=torch.uint8), planes.int().view(-1), undo[0], 192, 512, 8192,
            HEADER_BYTES=128, BLOCK=4096, BITS=unpack_triton.BITS,
        ),
        "ternary_linear": lambda: ternary_linear.ternary_linear(
            x, x.new_zeros(2048, 2048), [torch.zeros(2**16, 2).long()] * 2, [1.0] * 2, ids[:, :1], None, None
        ),
        "route": lambda: route.route(logits.to(dtype), None, 8, 0, True, 1.0, 1, 1, 0, 0),
        "route of groups": lambda: route.route(
            torch.zeros(16, 256, dtype=dtype), torch.zeros(256), 8, route.SIGMOID, True, 2.5, 8, 4, route.TOP2_SUM, 0
        ),
        "route_weights": lambda: route.route_weights(logits.to(dtype), ids, 0, True, 1.0),
        "route_bwd": lambda: route.route_backward(weights, logits.to(dtype), ids, 0, True, 1.0, 0),
        "routed_lora": lambda: _routed_lora(64, dtype),
        "routed_lora, many tokens": lambda: _routed_lora(1024, dtype),
        "lora halves": lambda: _lora_halves(dtype),
        "lora_factor_grad": lambda: _lora_factor_grad(dtype),
        "lora_dropout": lambda: routed_lora.lora_dropout(x, 0.1, torch.tensor(1)),
        "fuse_logits": lambda: _fuse_logits(dtype, "log_probs"),
        "fuse_logits, one token": lambda: _fuse_logits(dtype, "sample"),
        "fuse_logits, a mixture": lambda: _fuse_logits(dtype, "log_probs", mode="mixture"),
    }  # fmt: skip


def _expert_ffn(num_tokens: int, dtype: torch.dtype, save: bool = True, backward: bool = False) -> None:
    """Experts of Qwen3-30B-A3B, one in sixteen of them."""
    from moe_kernels import Activation
    from moe_kernels.ops.expert_ffn import triton as expert_ffn

    ids, weights = torch.zeros(num_tokens, 8, dtype=torch.int32), torch.ones(num_tokens, 8)
    x, h = torch.empty(num_tokens, 2048, dtype=dtype), torch.empty(num_tokens * 8, 1536, dtype=dtype)
    experts = torch.empty(8, 1536, 2048, dtype=dtype), torch.empty(8, 2048, 768, dtype=dtype)
    activation = (*Activation().kernel_arguments(), False)
    if backward:
        asked = [True] * 6
        expert_ffn.expert_ffn_backward(x, x, ids, weights, *experts, None, h, *activation, *asked)
    else:
        expert_ffn.expert_ffn(x, ids, weights, *experts, None, None, *activation, 1536, save)


def _routed_lora(num_tokens: int, dtype: torch.dtype) -> None:
    """Eight adapters of rank 16 on a square layer, B as it lies in a pool: [num_adapters, rank, out]."""
    from moe_kernels.ops.routed_lora import triton as lora

    ids, x = torch.zeros(num_tokens, 1, dtype=torch.int32), torch.empty(num_tokens, 2048, dtype=dtype)
    a, ranks = torch.empty(8, 16, 2048, dtype=dtype), torch.full((8,), 16, dtype=torch.int32)
    lora.routed_lora(x, a, a, None, ranks, ids, torch.ones(num_tokens, 1), torch.ones(8), x, 16, True)


def _lora_halves(dtype: torch.dtype) -> None:
    from moe_kernels.ops.routed_lora import triton as lora

    ids, x, a = torch.zeros(16, 2).int(), torch.empty(16, 2048, dtype=dtype), torch.empty(8, 16, 2048, dtype=dtype)
    v = lora.lora_shrink(x, a, None, None, ids, 16)
    lora.lora_expand(v, a, None, None, ids, None, torch.ones(8), x)


def _lora_factor_grad(dtype: torch.dtype) -> None:
    from moe_kernels.ops.routed_lora import triton as lora

    ids, x = torch.zeros(64, 2).int(), torch.empty(64, 2048, dtype=dtype)
    lora.lora_factor_grad(torch.empty(64, 2, 16), x, None, None, ids, 8, None)


def _fuse_logits(dtype: torch.dtype, out: str, mode: str = "linear") -> None:
    """Three models of Qwen2.5's vocabulary."""
    from moe_kernels.ops.logit_fusion import triton as logit_fusion
    from moe_kernels.ops.logit_fusion.api import MODES, OUTS

    sources, ids = [torch.empty(2, 151_936, dtype=dtype)] * 3, torch.zeros(2).long()
    rule = (bool(MODES.index(mode)), 0, 0, [], [], [], OUTS.index(out))
    logit_fusion._fuse_logits(sources, None, torch.ones(2, 3), torch.ones(2), ids, 7, 7, 151_936, *rule)


#: threads of a block where they are not 128 (routes: 32); what tiles of 128 rows are multiplied by
TRITON_THREADS = {
    ("expert_ffn", "_gate_up_kernel"): 256, ("expert_ffn", "_grouped_gemm_kernel"): 256,
    ("expert_ffn saving", "_gate_up_kernel"): 256, ("expert_ffn_bwd", "_grad_act_kernel"): 256,
    ("expert_ffn_bwd", "_weight_grad_kernel"): 256, ("apply_ternary_undoable", "_count_kernel"): 256,
    ("apply_ternary_undoable", "_apply_undoable_kernel"): 512, ("unapply_ternary", "_unapply_kernel"): 512,
}  # fmt: skip
#: bytes that a thread may keep in memory after the loop: gate, up and what is made of them are more than 255 registers;
#: of adapters, strides and pointers that only an outer loop reads
TRITON_SPILLS = {
    "expert_ffn saving": 96, "expert_ffn_bwd": 16, "lora halves": 16,
}  # fmt: skip

#: sums that a draw is looked up in are float64, once a row
TRITON_FP64 = {"_token_kernel": 96}


def shipped_triton_configurations() -> list[Configuration]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for launch, call in _triton_launches(dtype).items():
            if launch == "plan" and dtype != torch.float32:
                continue  # integers
            if launch.startswith("expert_ffn") and dtype == torch.float32:
                continue  # no tensor cores: nothing to look for
            compiled = functools.cache(lambda capability, call=call: triton_on_ptx.compiled(capability, call))
            for name, wide in TRITON_KERNELS[launch].items():
                threads = TRITON_THREADS.get((launch, name), 32 if name.startswith("_route_") else 128)

                if launch == "routed_lora, many tokens" and dtype != torch.float32:
                    threads = 64  # of a tile of 64 rows

                def pick(capability: int, name=name, threads=threads, compiled=compiled) -> build.Compiled:
                    kernel = compiled(capability)[name]
                    assert kernel.block == threads, f"{name} is launched with {kernel.block} threads"
                    return kernel

                # the scatter's programs, one for 256 pairs, are too few to fill a GPU
                occupancy = 0.1 if name == "_plan_scatter_kernel" else 0.25
                if (
                    launch.startswith("expert_ffn") or "lora" in launch
                ) and wide:  # products: few blocks, whose stages hide the waiting
                    occupancy = 0.06
                limits = Limits(min_occupancy=occupancy, at_least={"128-bit global": wide} if wide else {})
                if launch in TRITON_SPILLS:
                    spills = TRITON_SPILLS[launch]
                    limits = replace(
                        limits,
                        spills=spills,
                        stack=spills,
                        at_most={"local": spills // 2, "fp64": 0, "float atomic": 0},
                    )
                if name in TRITON_FP64:
                    limits = replace(limits, at_most={**limits.at_most, "fp64": TRITON_FP64[name]})
                shown = f"{launch} {name} {str(dtype)[6:]} (Triton)"
                found.append(Configuration(shown, name, threads, from_triton(pick), limits))
    return found


CONFIGURATIONS = [
    *(cuda_configurations() if build.missing_nvcc() is None else []),
    *(shipped_configurations() if shipped.missing_reason() is None else []),
    *([*triton_configurations(), *shipped_triton_configurations()] if build.missing_triton() is None else []),
]
