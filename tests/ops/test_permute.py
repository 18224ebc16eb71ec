"""plan_dispatch, permute, unpermute: forward, backward, edges, registration, compile."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moe_kernels import DispatchPlan, permute, plan_dispatch, unpermute
from moe_kernels.ops.permute import native
from moe_kernels.testing import random_routing
from tests.ops.helpers import DTYPES, SLOW, check, seeded, strided

OP = "permute"
KERNELS = ["native-cpu", "native-simt", "native-ptx", "native-cuda", "triton-cpu", "triton-ptx", "triton-cuda"]

# (num_tokens, num_experts, top_k): an empty expert, one token, all to one expert, more experts than pairs, two tiles of
# the GPU's sort; then more experts than it takes at once, in one tile and in two
ROUTINGS = [(37, 5, 2), (1, 4, 3), (20, 1, 1), (3, 64, 2), (700, 9, 4), (40, 2600, 3), (600, 1100, 4)]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_plan_equals_reference(backend, routing, id_dtype):
    topk_ids, _ = random_routing(*routing, skip=0.2)
    num_experts = routing[1]
    for ids in (topk_ids.to(id_dtype), strided(topk_ids.to(id_dtype))):
        for actual, expected in zip(
            plan_dispatch(ids, num_experts, backend=backend),
            plan_dispatch(ids, num_experts, backend="reference"),
            strict=True,
        ):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("num_tokens", [0, 2048, 2049])
def test_plan_where_tiles_end(backend, num_tokens):
    topk_ids = torch.randint(-1, 4, (num_tokens, 1), dtype=torch.int32)
    for actual, expected in zip(
        plan_dispatch(topk_ids, 3, backend=backend), plan_dispatch(topk_ids, 3, backend="reference"), strict=True
    ):
        assert torch.equal(actual, expected)


@given(
    ids=st.lists(st.lists(st.integers(-3, 9), min_size=3, max_size=3), max_size=30),
    num_experts=st.integers(0, 8),
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_plan_is_a_stable_sort(backend, ids, num_experts):
    topk_ids = torch.tensor(ids, dtype=torch.int32).reshape(-1, 3)
    plan = plan_dispatch(topk_ids, num_experts, backend=backend)
    pairs = [(e, i) for i, e in enumerate(topk_ids.flatten().tolist()) if 0 <= e < num_experts]
    expected = [i // 3 for _, i in sorted(pairs)]
    assert plan.source_rows.tolist() == expected + [-1] * (topk_ids.numel() - len(expected))
    counts = torch.tensor([e for e, _ in pairs], dtype=torch.int64).bincount(minlength=num_experts)
    assert plan.expert_offsets.diff().tolist() == counts.tolist()[:num_experts]
    for pair, row in enumerate(plan.permuted_rows.flatten().tolist()):
        assert row == -1 or plan.source_rows[row] == pair // 3


# hidden sizes: below, at and above four AVX-512 vectors of float32, one odd byte count, and a row that takes the GPU's
# blocks more than one round in every dtype
@pytest.mark.parametrize("hidden_size", [1, 63, 64, 65, 257, 5120])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(backend, kernel_id, dtype, hidden_size):
    num_tokens = 9 if kernel_id in SLOW else 37
    topk_ids, topk_weights = random_routing(num_tokens, 5, 3, skip=0.2)
    plan = plan_dispatch(topk_ids, 5)
    x = torch.randn(num_tokens, hidden_size, dtype=dtype)
    rows = torch.randn(num_tokens * 3, hidden_size, dtype=dtype)
    check(lambda x, backend: permute(x, plan, backend=backend), [x], backend)
    check(lambda rows, backend: unpermute(rows, plan, backend=backend), [rows], backend)
    check(lambda rows, w, backend: unpermute(rows, plan, w, backend=backend), [rows, topk_weights.to(dtype)], backend)
    if dtype != torch.float64:
        check(lambda rows, w, backend: unpermute(rows, plan, w, backend=backend), [rows, topk_weights], backend)


def test_permute_moves_bits(backend):
    topk_ids, _ = random_routing(50, 6, 2)
    plan = plan_dispatch(topk_ids, 6)
    x = torch.randn(50, 40).bfloat16()
    assert torch.equal(permute(x, plan, backend=backend), x[plan.source_rows.long()])


def test_gradcheck(backend, kernel_id):
    if kernel_id.endswith("ptx"):
        pytest.skip("a hundred launches; test_forward_and_backward has the gradients")
    topk_ids, topk_weights = random_routing(4, 3, 2, skip=0.3)
    plan = plan_dispatch(topk_ids, 3)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    weights = topk_weights.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: unpermute(permute(x, plan, backend=backend), plan, w, backend=backend), (x, weights)
    )


@pytest.mark.parametrize(("num_tokens", "top_k", "hidden_size"), [(0, 2, 8), (3, 0, 8), (3, 2, 0)])
@pytest.mark.with_reference
def test_empty(backend, num_tokens, top_k, hidden_size):
    plan = plan_dispatch(torch.zeros(num_tokens, top_k, dtype=torch.int32), 4, backend=backend)
    assert plan.expert_offsets.tolist() == [0] + [num_tokens * top_k] * 4
    x = torch.randn(num_tokens, hidden_size, requires_grad=True)
    out = unpermute(permute(x, plan, backend=backend), plan, torch.ones(num_tokens, top_k), backend=backend)
    assert out.shape == x.shape
    out.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, float(top_k)))


def test_skipped_pairs_are_zero_even_beside_nan(backend):
    plan = plan_dispatch(torch.tensor([[0, -1], [7, 7]], dtype=torch.int32), 2)
    x = torch.tensor([[1.0], [torch.nan]])
    rows = permute(x, plan, backend=backend)
    assert rows.flatten().tolist() == [1, 0, 0, 0]
    weights = torch.full((2, 2), torch.nan)
    weights[0, 0] = 3
    assert unpermute(rows + torch.tensor([[0.0], [torch.nan], [1], [1]]), plan, weights, backend=backend).tolist() == [
        [3.0],
        [0.0],
    ]


def test_strides(backend):
    topk_ids, topk_weights = random_routing(9, 4, 2)
    plan = plan_dispatch(topk_ids, 4)
    x, rows = torch.randn(9, 10), torch.randn(18, 10)
    assert torch.equal(permute(strided(x), plan, backend=backend), permute(x, plan, backend=backend))
    assert torch.equal(
        unpermute(strided(rows), plan, strided(topk_weights), backend=backend),
        unpermute(rows, plan, topk_weights, backend=backend),
    )
    expanded = torch.randn(1, 10).expand(9, 10)
    assert torch.equal(permute(expanded, plan, backend=backend), expanded[plan.source_rows.long()])


def test_rows_at_odd_addresses(backend):
    topk_ids, topk_weights = random_routing(9, 4, 2, skip=0.2)
    plan = plan_dispatch(topk_ids, 4)
    x = torch.randn(9 * 40 + 1).bfloat16()[1:].view(9, 40)  # two bytes behind a multiple of 16
    rows = permute(x, plan, backend=backend)
    assert torch.equal(rows, permute(x.clone(), plan, backend=backend))
    odd = torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view(18, 40)
    expected = unpermute(rows, plan, topk_weights, backend=backend)
    assert torch.equal(unpermute(odd, plan, topk_weights, backend=backend), expected)


def test_same_bits_for_any_threads_and_neighbours(backend):
    topk_ids, topk_weights = random_routing(64, 5, 3)
    rows = torch.randn(64 * 3, 130).bfloat16()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        plan = plan_dispatch(topk_ids, 5)
        results.append(unpermute(rows, plan, topk_weights, backend=backend))
    assert torch.equal(*results)
    first = plan_dispatch(topk_ids[:1], 5)
    alone = rows[plan.permuted_rows[0].long()][first.permuted_rows[0].argsort()]
    assert torch.equal(unpermute(alone, first, topk_weights[:1], backend=backend), results[0][:1])


def test_bad_input():
    ids = torch.zeros(3, 2, dtype=torch.int32)
    plan = plan_dispatch(ids, 4)
    with pytest.raises(TypeError, match="plan_dispatch: topk_ids must be one of torch.int32, torch.int64"):
        plan_dispatch(ids.float(), 4)
    with pytest.raises(ValueError, match="num_experts must be in"):
        plan_dispatch(ids, -1)
    with pytest.raises(ValueError, match=r"num_tokens \* top_k must be below 2\*\*31"):
        plan_dispatch(torch.zeros(1, 1, dtype=torch.int32).expand(2**16, 2**15), 4)
    with pytest.raises(ValueError, match=r"permute: hidden_states must be of shape \[num_tokens=3, hidden_size\]"):
        permute(torch.randn(4, 2), plan)
    with pytest.raises(ValueError, match="unpermute: rows must be of shape"):
        unpermute(torch.randn(5, 2), plan)
    with pytest.raises(ValueError, match="unpermute: topk_weights must be of shape"):
        unpermute(torch.randn(6, 2), plan, torch.ones(3, 1))
    with pytest.raises(TypeError, match=r"permute: hidden_states must be a torch.Tensor, got list"):
        permute([1.0], plan)
    with pytest.raises(ValueError, match="unpermute: permuted_rows must be on cpu like rows, got meta"):
        unpermute(torch.randn(6, 2), plan._replace(permuted_rows=plan.permuted_rows.to("meta")))


def test_a_plan_of_other_tokens_reads_nothing(backend, raises_in_kernel):
    plan = plan_dispatch(torch.zeros(3, 2, dtype=torch.int32), 4)
    if not raises_in_kernel:
        past = DispatchPlan(plan.expert_offsets, torch.full((6,), 7, dtype=torch.int32), plan.permuted_rows)
        assert not permute(torch.randn(3, 2), past, backend=backend).any()
        past = past._replace(permuted_rows=torch.full_like(plan.permuted_rows, 99))
        assert not unpermute(torch.randn(6, 2), past, backend=backend).any()
        rows, weights = torch.randn(6, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
        unpermute(rows, past, weights, backend=backend).sum().backward()
        assert not rows.grad.any() and not weights.grad.any()
        return
    with pytest.raises(RuntimeError, match="source_rows must be below num_tokens=3, got 7"):
        native.permute(torch.randn(3, 2), torch.full((6,), 7, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="permuted_rows must be below num_permuted=6, got 99"):
        native.unpermute(torch.randn(6, 2), torch.full_like(plan.permuted_rows, 99), None)


@pytest.mark.with_reference
@pytest.mark.parametrize("topk_ids", [[[1, -1], [0, 1], [-1, -1]], [[-1, 9]], []], ids=["some", "none", "no tokens"])
def test_a_plan_cut_to_its_rows(backend, topk_ids):
    topk_ids = torch.tensor(topk_ids, dtype=torch.int32).view(-1, 2)
    plan = plan_dispatch(topk_ids, 3)
    cut = plan.cut(int(plan.expert_offsets[-1]))
    results = []
    for used in (plan, cut):
        x = torch.randn(len(topk_ids), 6, generator=seeded(0)).requires_grad_()
        rows = permute(x, used, backend=backend)
        out = unpermute(rows * 2, used, backend=backend)
        out.square().sum().backward()
        results.append((rows[: len(cut.source_rows)], out, x.grad))
    assert len(rows) == int((topk_ids >= 0).logical_and(topk_ids < 3).sum())
    for whole, of_cut in zip(*results, strict=True):
        assert torch.equal(whole, of_cut)
    if len(cut.source_rows) < topk_ids.numel():
        with pytest.raises(ValueError, match="one row for each of plan.permuted_rows"):
            unpermute(rows, cut, torch.ones(topk_ids.shape), backend=backend)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend, use_reentrant):
    topk_ids, topk_weights = random_routing(9, 4, 2)
    plan = plan_dispatch(topk_ids, 4)
    results = []
    for recompute in (False, True):
        rows, weights = torch.randn(18, 6, generator=seeded(0)), topk_weights.clone()
        rows.requires_grad_(), weights.requires_grad_()
        op = lambda rows, weights: unpermute(rows.sin(), plan, weights, backend=backend)  # noqa: E731
        out = checkpoint(op, rows, weights, use_reentrant=use_reentrant) if recompute else op(rows, weights)
        out.square().sum().backward()
        results.append((out, rows.grad, weights.grad))
    for recomputed, plain in zip(*results, strict=True):
        assert torch.equal(recomputed, plain)


def test_two_pairs_on_one_row_are_refused(backend, raises_in_kernel):
    if not raises_in_kernel:
        pytest.skip("a GPU has nobody to tell")
    rows = torch.randn(2, 3, requires_grad=True)
    plan = DispatchPlan(torch.tensor([0, 2]), torch.tensor([0, 0]), torch.tensor([[0, 0]]))
    plan = DispatchPlan(*(tensor.int() for tensor in plan))
    out = unpermute(rows, plan, torch.ones(1, 2), backend=backend)
    with pytest.raises(RuntimeError, match="permuted_rows must be below num_permuted=2 and each its own, got 0"):
        out.sum().backward()


def test_many_experts_for_a_token(backend):
    topk_ids, topk_weights = random_routing(3, 80, 70, skip=0.1)
    plan, rows = plan_dispatch(topk_ids, 80), torch.randn(210, 24)
    check(lambda rows, w, backend: unpermute(rows, plan, w, backend=backend), [rows, topk_weights], backend)


def test_registration(backend):
    if backend != "native":
        pytest.skip("not a registered op")
    topk_ids, topk_weights = random_routing(5, 4, 2, skip=0.2)
    plan = plan_dispatch(topk_ids, 4)
    rows = torch.randn(10, 6)
    torch.library.opcheck(native.plan_dispatch, (topk_ids, 4))
    torch.library.opcheck(native.permute, (torch.randn(5, 6), plan.source_rows))
    torch.library.opcheck(native.unpermute, (rows, plan.permuted_rows, topk_weights))
    torch.library.opcheck(
        native.unpermute_backward, (torch.randn(5, 6), rows, topk_weights, plan.source_rows, plan.permuted_rows)
    )


def test_compile(backend, kernel_id):
    if kernel_id in SLOW:
        pytest.skip("an interpreter cannot be traced")

    def layer(x, topk_ids, topk_weights):
        plan = plan_dispatch(topk_ids, 4, backend=backend)
        return unpermute(permute(x, plan, backend=backend) * 2, plan, topk_weights, backend=backend)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for num_tokens in (5, 11):
        topk_ids, topk_weights = random_routing(num_tokens, 4, 2, skip=0.2)
        x = torch.randn(num_tokens, 6, requires_grad=True)
        expected = layer(x, topk_ids, topk_weights)
        actual = compiled(x, topk_ids, topk_weights)
        assert torch.equal(actual, expected)
        assert torch.equal(torch.autograd.grad(actual.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
