"""Token permutation: the plan (a sort by expert), the gather into expert order, the weighted sum back."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import MEMCPY, Candidate, Cell, Cells, Check, Context, check
from benchmarks.inputs import generator, make_batches
from benchmarks.providers.base import installed_version, module_missing
from benchmarks.providers.ours import our_backends
from benchmarks.shapes import SHAPES
from moe_kernels import permute, plan_dispatch, unpermute

SUMMARY = "plan_dispatch, permute and unpermute, beside torch's ways and memcpy"
DEFAULTS = dict(shapes=["A"], dtypes=["bf16", "fp32"], tokens=[16, 512, 2048])
GPU_DEFAULTS = dict(shapes=["A", "deepseek-v3"], dtypes=["bf16"], tokens=[16, 256, 4096, 16384])
PROVIDER_NAMES = [
    "ours", "ours_triton", "moe_ops", "torch_argsort", "torch_one_hot", "torch_index", "torch_index_select_out",
    "torch_gather_sum", "torch_index_add", MEMCPY,
]  # fmt: skip


def _exact(result: Tensor, expected: Tensor, name: str) -> Check:
    """For moves and integers: any difference is an error."""
    if torch.equal(result, expected):
        return Check(0.0, 0.0)
    return Check(float("inf"), 0.0, f"{name} differs from the reference")


def cells(context: Context) -> Cells:
    for shape_name in context.shapes:
        for num_tokens in context.tokens:
            for dtype in context.dtypes:
                if dtype == context.dtypes[0]:  # the plan has no dtype
                    yield _plan_cell(context, shape_name, dtype, num_tokens)
                yield _permute_cell(context, shape_name, dtype, num_tokens)
                yield _unpermute_cell(context, shape_name, dtype, num_tokens)


def _cell(context: Context, op: str, shape_name: str, dtype: torch.dtype, num_tokens: int, num_bytes: float) -> Cell:
    return Cell(op, shape_name, dtype, num_tokens, [], bytes=num_bytes, copies=True, probe_bytes=num_bytes)


def _add(cell: Cell, context: Context, *candidates: Candidate) -> Cell:
    cell.candidates = [candidate for candidate in candidates if context.wants(candidate.name)]
    return cell


def _ours(op: str, call: Callable[[int, str], object], checked: Callable[[str], Check]) -> list[Candidate]:
    """Candidates of our op on each of its backends, which ``call`` and ``checked`` take last."""
    return [
        Candidate(name, partial(call, backend=backend), partial(checked, backend), True, backend)
        for name, backend in our_backends(op).items()
    ]


def _moe_ops(context: Context, num_experts: int, call: Callable[[object], Callable[[int], object]]) -> list[Candidate]:
    """moe-ops where it is asked for and can: its histogram wants a power of two; ``call`` takes the module."""
    if not context.wants("moe_ops", False) or module_missing("moe_ops", "moe-ops") or num_experts & (num_experts - 1):
        return []
    import moe_ops

    return [Candidate("moe_ops", call(moe_ops), version=installed_version("moe-ops"))]


def _plan_cell(context: Context, shape_name: str, dtype: torch.dtype, num_tokens: int) -> Cell:
    shape = SHAPES[shape_name]
    batches = make_batches(shape, dtype, num_tokens)
    ids_of = [batch.topk_ids_int32 for batch in batches]
    num_experts = shape.num_experts

    def ours(i: int, backend: str):
        return plan_dispatch(ids_of[i % len(ids_of)], num_experts, backend=backend)

    def argsort(i: int):
        # the same three results as ours
        ids = ids_of[i % len(ids_of)].reshape(-1)
        order = ids.argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return torch.bincount(ids, minlength=num_experts).cumsum(0), order // shape.top_k, back

    def one_hot(i: int):
        # transformers' eager experts find their tokens like this
        mask = torch.nn.functional.one_hot(batches[i % len(batches)].topk_ids, num_experts + 1).permute(2, 1, 0)
        return mask.sum((-1, -2)).nonzero()

    def checked(backend: str) -> Check:
        actual, expected = ours(0, backend), plan_dispatch(ids_of[0], num_experts, backend="reference")
        return _exact(*(torch.cat([x.flatten() for x in plan]) for plan in (actual, expected)), "plan")

    cell = _cell(context, "plan_dispatch", shape_name, dtype, num_tokens, 3 * 4 * ids_of[0].numel())
    return _add(
        cell,
        context,
        *_ours("plan_dispatch", ours, checked),
        Candidate("torch_argsort", argsort, version=torch.__version__),
        Candidate("torch_one_hot", one_hot, version=torch.__version__),
    )


def _memcpy(context: Context, num_bytes: int) -> list[Candidate]:
    """A copy that moves as many bytes as the op does, into a buffer that is there already."""
    if context.probe is None:
        return []
    copy = context.probe.copier(num_bytes // 2, context.threads)
    return [Candidate(MEMCPY, lambda i: copy())]


def _permute_cell(context: Context, shape_name: str, dtype: torch.dtype, num_tokens: int) -> Cell:
    shape = SHAPES[shape_name]
    batch = make_batches(shape, dtype, num_tokens)[0]
    hidden_states = batch.hidden_states
    plan = plan_dispatch(batch.topk_ids_int32, shape.num_experts)
    token = plan.source_rows.long()
    buffer = hidden_states.new_empty(token.numel(), shape.hidden_size)
    moved = (hidden_states.numel() + buffer.numel()) * dtype.itemsize
    expected = hidden_states[token]

    def ours(i: int, backend: str) -> Tensor:
        return permute(hidden_states, plan, backend=backend)

    return _add(
        _cell(context, "permute", shape_name, dtype, num_tokens, moved),
        context,
        *_ours("permute", ours, lambda backend: _exact(ours(0, backend), expected, "rows")),
        # makes the plan as well
        *_moe_ops(
            context,
            shape.num_experts,
            lambda moe_ops: lambda i: moe_ops.permute(hidden_states, batch.topk_ids_int32, 0, shape.num_experts),
        ),
        Candidate("torch_index", lambda i: hidden_states[token], version=torch.__version__),
        Candidate(
            "torch_index_select_out",
            lambda i: torch.index_select(hidden_states, 0, token, out=buffer),
            version=torch.__version__,
        ),
        *_memcpy(context, moved),
    )


def _unpermute_cell(context: Context, shape_name: str, dtype: torch.dtype, num_tokens: int) -> Cell:
    shape = SHAPES[shape_name]
    batch = make_batches(shape, dtype, num_tokens)[0]
    plan = plan_dispatch(batch.topk_ids_int32, shape.num_experts)
    rows = torch.randn(plan.source_rows.numel(), shape.hidden_size, generator=generator(2)).to(dtype)
    back, token = plan.permuted_rows.long(), plan.source_rows.long()
    weights = batch.topk_weights
    weight_of_row = weights.reshape(-1)[back.reshape(-1).argsort(), None]
    moved = (rows.numel() + batch.hidden_states.numel()) * dtype.itemsize

    def gather_sum(i: int) -> Tensor:
        # transformers' grouped_mm ends like this
        return (rows[back] * weights[..., None]).sum(1)

    def index_add(i: int) -> Tensor:
        return torch.zeros_like(batch.hidden_states).index_add_(0, token, rows * weight_of_row)

    def ours(i: int, backend: str) -> Tensor:
        return unpermute(rows, plan, weights, backend=backend)

    row_id_map = plan.permuted_rows.T.contiguous().view(-1)

    def checked(result: Tensor) -> Check:
        some = torch.arange(min(num_tokens, 64))
        expected = (rows[back[some]].double() * weights[some, :, None].double()).sum(1)
        eager = (rows[back[some]] * weights[some, :, None]).sum(1)
        return check(result[some], expected, eager, "out")

    return _add(
        _cell(context, "unpermute", shape_name, dtype, num_tokens, moved),
        context,
        *_ours("unpermute", ours, lambda backend: checked(ours(0, backend))),
        *_moe_ops(
            context,
            shape.num_experts,
            lambda moe_ops: lambda i: moe_ops.unpermute(rows, row_id_map, weights, num_tokens, shape.top_k),
        ),
        Candidate("torch_gather_sum", gather_sum, lambda: checked(gather_sum(0)), version=torch.__version__),
        Candidate("torch_index_add", index_add, lambda: checked(index_add(0)), version=torch.__version__),
        *_memcpy(context, moved),
    )
