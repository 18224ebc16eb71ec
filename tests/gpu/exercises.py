"""Short runs of the rooms' ops against the reference, made so that a changed kernel shows: ragged sizes, rows that are
further apart than they are long, ties, skipped pairs, more slots and experts than a kernel takes at once.
"""

from collections.abc import Callable

import torch

from moe_kernels import (
    Activation,
    PackedDelta,
    TernaryDelta,
    TokenFilter,
    apply_,
    compress,
    decompress,
    expert_ffn,
    fuse_logits,
    grouped_gemm,
    merge,
    permute,
    plan_dispatch,
    route,
    route_weights,
    routed_lora,
    ternary_linear,
    unapply_,
    unpermute,
)
from moe_kernels.ops.task_vector.reference import bits, pack_ternary
from moe_kernels.testing import random_routing
from tests.ops.helpers import check, check_exact, strided

from .ptx import Fault


def exercise_plan(backend: str, num_tokens: int, num_experts: int, top_k: int) -> None:
    topk_ids = strided(random_routing(num_tokens, num_experts, top_k, skip=0.2)[0].long())
    topk_ids[0, 0] = 1 - 2**32  # its lower half would be an expert
    results = [plan_dispatch(topk_ids, num_experts, backend=name) for name in (backend, "reference")]
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def exercise_permute(backend: str) -> None:
    topk_ids, weights = random_routing(9, 50, 40, skip=0.2)  # 40: the CUDA backward takes 32 at once
    plan = plan_dispatch(topk_ids, 50, backend="reference")
    x, rows = torch.randn(9, 272)[:, :264], torch.randn(360, 272)[:, :264]
    assert torch.equal(permute(x, plan, backend=backend), permute(x, plan, backend="reference"))
    check(lambda rows, w, backend: unpermute(rows, plan, w, backend=backend), [rows, weights], backend)


def exercise_route(backend: str) -> None:
    arguments = dict(top_k=3, renormalize=True, num_groups=4, topk_groups=2, group_score="top2_sum")
    logits = strided(torch.randn(5, 60).round())  # with ties
    ids, _ = route(logits, **arguments, backend=backend)
    assert torch.equal(ids, route(logits, **arguments, backend="reference")[0])
    check(lambda x, backend: route(x, **arguments, backend=backend)[1], [logits], backend)
    check(lambda x, backend: route_weights(x, ids, backend=backend), [logits], backend)


def exercise_task_vector(backend: str) -> None:
    # two blocks, the second ragged; the weights of one group in five are of random bits, and most of them are kept
    size, coefficients = 4096 + 203, [1.0, -0.7]
    signs = [torch.randn(size) * (torch.rand(size) < density) for density in (0.3, 0.7)]
    deltas = [TernaryDelta.from_signs(sign, scale) for sign, scale in zip(signs, (1e-3, 3e-4), strict=True)]
    for dtype in (torch.float32, torch.bfloat16):
        anything = torch.randint(-(2**62), 2**62, (size,)).to(bits(torch.empty(0, dtype=dtype)).dtype).view(dtype)
        before = torch.where(torch.arange(size) // 64 % 5 == 0, anything, (torch.randn(size) * 0.02).to(dtype))
        expected, weight = before.clone(), before.clone()
        apply_(expected, deltas, coefficients, backend="reference")
        apply_(weight, deltas, coefficients, backend=backend)
        assert torch.equal(bits(weight), bits(expected)), "apply_"
        weight = before.clone()
        undo = apply_(weight, deltas, coefficients, undo=True, backend=backend)
        assert torch.equal(bits(weight), bits(expected)), "apply_ with undo"
        # what the CPU keeps
        planes, values = [delta.planes for delta in deltas], list(undo.values)
        parts = torch.ops.moe_kernels.apply_ternary_undoable(before.clone(), planes, values)
        for i, (part, of_cpu) in enumerate(zip(undo.parts, parts, strict=True)):
            part, of_cpu = (bits(x) if x.is_floating_point() else x for x in (part, of_cpu))
            assert torch.equal(part, of_cpu), f"the undo's tensor {i}"
        unapply_(weight, undo, backend=backend)
        assert torch.equal(bits(weight), bits(before)), "unapply_"


#: block of exercise_decode, its field (the lowest bit in the descriptor and how many), what comes in
COUNT, MODE, K = (34, 15), (49, 3), (52, 4)
DAMAGES = [
    (0, (0, 34), 2**33), (0, COUNT, 300), (2, COUNT, 2000), (4, COUNT, 0x7FFF), (0, K, 11), (1, K, 12), (4, K, 7),
    (5, MODE, 1), (3, MODE, 4), (1, MODE, 5), (0, (56, 7), 1),
]  # fmt: skip


def exercise_decode(backend: str) -> None:
    """Blocks of all modes and ragged ones; then descriptors that say something else, under a header that agrees."""

    def packed_of(signs: torch.Tensor) -> PackedDelta:
        planes = TernaryDelta.from_signs(signs).planes
        return PackedDelta.from_header(pack_ternary(planes, list(signs.shape), 1.0, 0.0, 0))

    def planes_of(packed: PackedDelta) -> torch.Tensor | None:
        try:
            return decompress(packed, backend=backend).planes
        except ValueError as error:
            assert "damaged" in str(error)
            return None

    def random_signs(size: int, *densities: float) -> torch.Tensor:
        return torch.cat([torch.randn(size) * (torch.rand(size) < density) for density in densities])

    whole = random_signs(4096, 0.05, 0.4, 0.55, 1.0, 0.9, 0.0, 0.1)
    whole[3 * 4096 - 1] = 0  # a bitmap is then as short as Rice codes of the zeros, and comes first
    for signs in (whole, *(random_signs(1000, density) for density in (0.05, 0.55, 0.9, 1.0))):
        planes = planes_of(packed_of(signs))
        assert planes is not None and torch.equal(planes, TernaryDelta.from_signs(signs).planes), "planes"
    data = packed_of(whole).data
    for block, (shift, bits_of_field), value in DAMAGES:
        damaged = data.clone()
        word, nnz = damaged[128 + 8 * block :][:8].view(torch.int64), damaged[48:56].view(torch.int64)
        if shift == 34:
            nnz += value - (word >> 34 & 0x7FFF)
        word &= ~(2**bits_of_field - 1 << shift)
        word |= value << shift
        assert planes_of(PackedDelta.from_header(damaged)) is None, f"block {block}: {value} at {shift}, unnoticed"
    damaged = data.clone()
    damaged[48:56].view(torch.int64).add_(1)
    assert planes_of(PackedDelta.from_header(damaged)) is None, "the header's count, unnoticed"
    many = packed_of(torch.zeros(40 * 4096)).data  # more blocks than a warp's lanes
    many[128 + 8 * 35 + 7] = 1
    try:
        decompress(PackedDelta.from_header(many), backend=backend)
        said = "nothing"
    except ValueError as error:
        said = str(error)
    assert "block 35 of" in said, f"a damaged block of another warp: {said}"


def exercise_many_blocks(backend: str) -> None:
    """More blocks than the CUDA scan takes at once; nearly all of them are empty, which costs nothing."""
    size = 4096 * 4097
    planes = torch.zeros(size // 64, 2, dtype=torch.int64)
    planes[::9973, 0] = -1
    delta, weight = TernaryDelta(planes, (size,), 1e-3), torch.full((size,), 0.02).bfloat16()
    expected = weight.clone()
    apply_(expected, delta, backend="reference")
    undo = apply_(weight, delta, undo=True, backend=backend)
    assert torch.equal(weight, expected), "apply_"
    assert undo.parts[0][-1] == undo.parts[1].shape[1] == len(planes[::9973])


def exercise_grouped_gemm(backend: str) -> None:
    # an empty expert, and one of two tiles of 32 rows; the last row ends with the tensor, or two rows are nobody's
    for counts, num_rows in (([3, 0, 37, 2], 42), ([1, 2, 0, 1], 6)):
        offsets = torch.tensor([0, *counts]).cumsum(0).int()
        tensors = [torch.randn(num_rows, 41), torch.randn(4, 150, 41), torch.randn(4, 150)]
        check(lambda r, w, b, backend, o=offsets: grouped_gemm(r, w, o, b, backend=backend), tensors, backend)


def exercise_expert_ffn(backend: str) -> None:
    ids, topk_weights = random_routing(19, 4, 2, skip=0.2)
    # float32: at a clamp's boundary a rounding of bfloat16 moves a gradient in every implementation
    x, gate_up, down, gate_up_bias, down_bias = (
        torch.randn(size) for size in ((19, 41), (4, 140, 41), (4, 41, 70), (4, 140), (4, 41))
    )

    def op(x, w, gate_up, down, gate_up_bias, down_bias, backend):
        biases = dict(gate_up_bias=gate_up_bias, down_bias=down_bias)
        activation = Activation(limit=2.0, up_offset=1.0)
        return expert_ffn(x, ids, w, gate_up, down, **biases, activation=activation, interleaved=True, backend=backend)

    check(op, [x, topk_weights, gate_up, down, gate_up_bias, down_bias], backend)


def exercise_merge(backend: str) -> None:
    size = 1100
    base, *experts = ((torch.randn(size) * 2**8).round() / 2**12 for _ in range(4))
    experts[1][:50], experts[2][:50] = 2 * base[:50] - experts[0][:50], base[:50]  # sums of zero
    delta = TernaryDelta.from_signs(torch.randn(size), 0.01)
    for options in (
        dict(method="ties", density=0.4),
        dict(method="ties", semantics="peft", density=0.4, weights=[1.0, 0.5, 2.0]),
        dict(method="dare_linear", semantics="peft", density=0.3, lambda_=0.7, weights=[0.1, 0.7, 0.3]),
        dict(method="breadcrumbs", semantics="mergekit", density=0.4, gamma=0.2),
    ):
        found, expected = (merge(base, experts, **options, backend=name) for name in (backend, "reference"))
        assert torch.equal(found, expected), options["method"]
    many = [(torch.randn(70) * 2**4).round() for _ in range(13)]  # more than the CUDA kernel keeps
    found, expected = (
        merge(many[0], many[1:], method="ties", density=0.5, backend=name) for name in (backend, "reference")
    )
    assert torch.equal(found, expected), "many experts"
    options = dict(method="task_arithmetic", semantics="peft", weights=[0.5, 0.3])
    found, expected = (merge(base, [delta, experts[0]], **options, backend=name) for name in (backend, "reference"))
    assert torch.equal(found, expected), "task vectors"


def exercise_ternary_linear(backend: str) -> None:
    # nine deltas take two launches; rows of 70 begin at any bit; a delta twice, one token without
    deltas = [TernaryDelta.from_signs(torch.randn(37, 70) * (torch.rand(37, 70) < 0.5), 0.5 + i) for i in range(9)]
    ids = torch.tensor([[0, 8], [3, 3], [-1, 9], [1, -1], [7, 2]])
    dtype = torch.bfloat16 if backend == "native" else torch.float32  # the CUDA kernel is for 16 bits
    weights = [torch.randn(5, 2), torch.randn(37, 70).to(dtype), torch.randn(37).to(dtype)]

    def op(x, a, w, bias, backend):
        with torch.no_grad():
            return ternary_linear(x, w, deltas, ids, a, bias=bias, backend=backend)

    check(op, [torch.randn(5, 70).to(dtype), *weights], backend, backward=False)
    # whose products are not finite does not reach those beside it, and gets nothing from a delta that it has not
    x = torch.randn(5, 70).to(dtype)
    x[0, 69], x[2, 3] = float("nan"), float("inf")
    with torch.no_grad():
        out = ternary_linear(x, weights[1].abs(), deltas, ids, backend=backend)
    assert bool(out[[1, 3, 4]].isfinite().all()) and bool(out[0].isnan().all()), "what is no number spreads"
    assert bool((out[2] == float("inf")).all()), "a product with a delta that is not the token's"


def exercise_unpack(backend: str) -> None:
    """Every mode of block, the last one ragged; then a block that ends too early."""
    signs = [torch.zeros(4096) for _ in range(4)]
    signs[0][::20], signs[1][1::2], signs[3][:] = torch.randn(205), torch.randn(2048), torch.randn(4096)
    signs[2] = torch.where(torch.arange(4096) % 20 == 0, 0, torch.randn(4096))
    packed = compress(torch.cat([*signs, (torch.randn(300) * (torch.rand(300) < 0.1))]), 1.0)
    expected = decompress(packed, backend="reference").planes
    assert _planes_of(packed.data, backend) == expected.tolist(), "planes"
    payload = int(packed.data[40:48].view(torch.int64))
    for at, octets in ((128 + 6, [int(packed.data[128 + 6]) % 16 + 11 * 16]), (payload, [255, 255])):
        damaged = packed.data.clone()  # k of the first block; its first gaps: the last positions leave it
        damaged[at : at + len(octets)] = torch.tensor(octets, dtype=torch.uint8)
        assert _planes_of(damaged, backend) is None, "a damaged block was not found"


def _planes_of(data: torch.Tensor, backend: str) -> list | None:
    try:
        return decompress(PackedDelta.from_header(data), backend=backend).planes.tolist()
    except ValueError:
        return None


def _integers(*sizes: int) -> torch.Tensor:
    """-1, 0 and 1, with strides: every sum is exact, and every gradient must be."""
    return strided(torch.randint(-1, 2, sizes).float())


def _adapter_ids(num_tokens: int, num_adapters: int, top_k: int) -> torch.Tensor:
    """A fifth of them -1, with strides."""
    ids = torch.randint(0, num_adapters, (num_tokens, top_k))
    return strided(torch.where(torch.rand(num_tokens, top_k) < 0.2, -1, ids))


def exercise_routed_lora(backend: str) -> None:
    """Adapters of two steps of rows, of one and of none, packed and stacked; tiles of tokens, blocks of columns."""
    starts, ranks = torch.tensor([21, 1, 0, 20]).int(), torch.tensor([5, 18, 0, 1]).int()
    for num_tokens, top_k in ((19, 3), (59, 1), (67, 1)):
        ids, x, base = _adapter_ids(num_tokens, 4, top_k), _integers(num_tokens, 41), _integers(num_tokens, 150)
        if top_k == 1:  # more than a tile of one adapter's
            ids[15:55] = 0
        table = dict(rank_starts=starts, max_rank=18) if top_k > 1 else {}
        a, b = (_integers(26, 41), _integers(26, 150)) if table else (_integers(4, 18, 41), _integers(4, 150, 18))
        w, s = _integers(num_tokens, top_k), torch.tensor([1.0, -2.0, 3.0, 2.0])

        def op(x, a, b, w, s, base, backend, ids=ids, table=table):
            return routed_lora(x, a, b, ids, w, scaling=s, base=base, ranks=ranks, **table, backend=backend)

        check_exact(op, [x, a, b, w, s, base], backend)
        none = ranks.long()[ids].where(ids >= 0, 0).amax(1) == 0
        out = op(x, a, b, w, s, torch.full_like(base, -0.0), backend=backend)
        assert out[none].signbit().all() and none.any(), "the base's bits"
        outside = torch.where(ids >= 0, ids, torch.tensor([4, 2**32, 1 - 2**32])[torch.randint(0, 3, ids.shape)])
        assert torch.equal(op(x, a, b, w, s, base, backend=backend, ids=outside), op(x, a, b, w, s, base, "reference"))
        # what is infinite stays with the tokens that ask for it
        infinite = b.clone()
        infinite[21 if table else 0] = torch.inf
        others = (ids != 0).all(1)
        out = op(x, a, infinite, w, s, base, backend=backend).isfinite()
        assert out[others].all() and not out[~others].all(), "an adapter's infinity"
        infinite = x.clone()
        infinite[~none.logical_or(torch.arange(num_tokens) > 9)] = torch.inf
        weights = torch.ones_like(w)
        weights[:10] = torch.inf
        out = op(infinite, a.abs() + 1, b.abs() + 1, weights, s.abs(), base, backend=backend)
        assert torch.equal(out.isfinite(), infinite.isfinite()[:, :1].expand_as(out)), "a token's infinity"
        assert not out.isnan().any(), "rows that are not there times infinity"
        weights = torch.ones_like(w).requires_grad_()
        op(infinite, a.abs() + 1, b.abs() + 1, weights, s.abs(), base, backend=backend).sum().backward()
        assert not weights.grad.isnan().any(), "products that are not there, saved"


def exercise_lora_halves(backend: str) -> None:
    """Two launches with an activation between them; an adapter of more rows than are multiplied at a time."""
    ids, ranks = _adapter_ids(19, 3, 2), torch.tensor([70, 3, 1]).int()
    tensors = [_integers(19, 41), _integers(3, 70, 41), _integers(3, 150, 70), _integers(19, 2), _integers(19, 150)]

    def op(x, a, b, w, base, backend):
        arguments = dict(scaling=2.0, ranks=ranks, base=base, activation="relu")
        return routed_lora(x, a, b, ids, w, **arguments, backend=backend)

    check_exact(op, tensors, backend)


def exercise_lora_parts(backend: str) -> None:
    """Products that 16 bits do not hold: of two large ones the last bits are left; infinities."""
    for dtype, large in ((torch.bfloat16, (float(0x810000), 512.0, 3.0)), (torch.float16, (0x401 * 32.0, 1.5))):
        x, a = torch.tensor([large] * 3).to(dtype), torch.ones(1, 2, len(large), dtype=dtype)
        a[0, 1, 1:], b = 0, torch.tensor([[[1.0, -1.0]]], dtype=dtype)
        for ids in (torch.tensor([[0]] * 3), torch.tensor([[-1, 0]] * 3)):
            left = torch.tensor(sum(large[1:])).to(dtype)
            assert (routed_lora(x, a, b, ids, backend=backend) == left).all(), "bits of a product"
            out = routed_lora(torch.full_like(x, -torch.inf), torch.ones_like(a), b.abs(), ids, backend=backend)
            assert (out == -torch.inf).all(), "infinity"


def exercise_lora_dropout(backend: str) -> None:
    """Rows of several blocks, of which half is dropped: twice an integer is left."""
    ids = _adapter_ids(7, 3, 1)
    tensors = [_integers(7, 1101), _integers(3, 4, 1101), _integers(3, 30, 4)]
    for seed in (-3, 2**40 + 5):
        check_exact(
            lambda x, a, b, backend, seed=seed: routed_lora(x, a, b, ids, dropout=0.5, seed=seed, backend=backend),
            tensors,
            backend,
        )


#: three sources each: every rule of weights, and what has to be known of whole rows before they are fused
WEIGHED_SOURCES = (
    dict(weights=[1.0, 0.7, -0.7], temperature=0.8),
    dict(weights=[0.5, 1.0, -1.0], anchor=1, neg_inf="zero"),
)
BOUNDED_SOURCES = (
    dict(weights=[0.3, 0.0, 0.2], mode="mixture", anchor=2, mask=TokenFilter(min_p=0.1), temperature=1.3),
    dict(weights=[1.5, 0.0, -0.5], anchor=2, mask=TokenFilter(min_p=0.1), neg_inf="zero"),
    dict(weights=[-0.5, 1.5, 0.5], anchor=1, floor=TokenFilter(min_p=0.1), neg_inf="floor"),
    dict(weights=[-0.5, 1.5, 0.5], anchor=1, neg_inf="floor"),
    dict(weights=[0.5, 1.0, -1.0], keep=TokenFilter(min_p=0.2)),
)


def exercise_logit_fusion(backend: str, fusions: tuple, results: tuple) -> None:
    """Rows of two tiles that end within a vector, also of memory that goes on; -inf in each source, NaN in what is not
    read."""
    vocab_size, ids = 2101, torch.tensor([-7, 2**40])
    for fusion in fusions:
        arguments, weights = dict(fusion), fusion["weights"]
        del arguments["weights"]
        sources = [3 * torch.randn(2, vocab_size, dtype=torch.float64) for _ in weights]
        for source, weight, constant in zip(sources, weights, (20, 0, -20), strict=True):
            source += constant
            source[torch.rand(2, vocab_size) < 0.2] = -torch.inf
            source += torch.nan if weight == 0 else 0
        for out in results:

            def op(*tensors, backend, weights=weights, arguments=arguments, out=out):
                with torch.no_grad():
                    return fuse_logits(tensors, weights, **arguments, out=out, backend=backend)

            floats = [source.float() for source in sources]
            floats[0] = torch.nn.functional.pad(floats[0], (0, 3))[:, :vocab_size]
            check(op, floats, backend, backward=False)
        arguments |= dict(request_ids=ids, seed=2**32 - 3, step=9)
        for out in ("argmax", "sample"):
            found, expected = (
                fuse_logits(sources, weights, **arguments, out=out, backend=name).tolist()
                for name in (backend, "reference")
            )
            assert found == expected, out


def exercise_logit_rows(backend: str) -> None:
    """What is exact; rows that are further apart than they are long, broken, empty, of one token, or not there."""
    large = 1e4 * torch.randn(3, 2, 600)
    exact = sum(weight * source.double() for weight, source in zip((1.5, 0.75, -1.25), large.unbind(), strict=True))
    assert torch.equal(fuse_logits(large.unbind(), [1.5, 0.75, -1.25], out="logits", backend=backend), exact.float())
    vocab_size = 1100
    row = torch.randn(1, 4 * vocab_size).round().clamp(max=1)  # nine blocks, with ties
    rows = torch.tensor([[0, 0], [0, 1], [-1, 0]])
    fused = fuse_logits(row, [1.0, -0.5], rows=rows, out="logits", backend=backend)
    assert fused.isnan().all(1).tolist() == [False, True, True] and torch.equal(fused[0], row[0] * 0.5)
    # a row of which a tile each is a program's, and one program's in Triton; the shim takes minutes for as many threads
    many = 1400 if backend == "triton" else 3
    for out in ("argmax", "log_probs"):
        alone, together = (fuse_logits([row.expand(n, -1)], [1.0], out=out, backend=backend) for n in (1, many))
        assert torch.equal(together, alone.expand(together.shape)), "a row beside others"
    assert fuse_logits([row], [1.0], out="argmax", backend=backend).item() == row.argmax().item(), "ties"
    wide = torch.full((4, 2 * vocab_size), torch.nan)[:, :vocab_size].fill_(-torch.inf)
    wide[0, 1050], wide[2, 3], wide[3, 1050], wide[3, 7] = 5.0, torch.inf, torch.nan, 1.0
    arguments = dict(temperature=torch.tensor([0.5, 1.0, 1.0, 1.0]), backend=backend)
    draw = dict(request_ids=torch.arange(4), seed=1)
    assert fuse_logits([wide], [2.0], out="sample", **draw, **arguments).tolist() == [1050, -1, -1, -1]
    probs = fuse_logits([wide], [2.0], out="probs", **arguments)
    assert probs.isnan().all(1).tolist() == [False, False, True, True] and probs[:2].sum(1).tolist() == [1, 0]
    assert fuse_logits([wide], [2.0], out="logits", **arguments).isnan().all(1).tolist() == [False, False, True, True]
    negative = fuse_logits([wide.double()], [-2.0], out="logits", **arguments)
    assert negative[2:].isnan().all(), "+inf of a negative weight"
    for temperature in (-1.0, torch.nan):
        broken = fuse_logits([row], [1.0], temperature=torch.tensor([temperature]), out="argmax", backend=backend)
        assert broken.item() == -1
    assert fuse_logits([row], [-1.0], mode="mixture", backend=backend).isnan().all()
    mixture = fuse_logits([wide, wide], [1.0, 1.0], mode="mixture", out="probs", **arguments)
    assert torch.equal(mixture.isnan(), probs.isnan()) and mixture[:2].sum(1).tolist() == [1, 0]
    cold = dict(temperature=torch.zeros(1), backend=backend)
    draw["request_ids"] = torch.arange(1)
    assert fuse_logits([row], [1.0], out="sample", **draw, **cold).item() == row.argmax().item()
    assert fuse_logits([row], [1.0], **cold).isnan().all()


#: rooms that have Triton kernels alone
TRITON_EXERCISES = {
    "grouped_gemm": exercise_grouped_gemm,
    "expert_ffn": exercise_expert_ffn,
    "unpack": exercise_unpack,
    "routed_lora": exercise_routed_lora,
    "lora halves": exercise_lora_halves,
    "lora dropout": exercise_lora_dropout,
    "lora parts": exercise_lora_parts,
}
EXERCISES: dict[str, Callable[[str], None]] = {
    "one tile": lambda backend: exercise_plan(backend, 500, 9, 4),
    "two passes": lambda backend: exercise_plan(backend, 40, 2600, 3),
    "two tiles": lambda backend: exercise_plan(backend, 600, 1100, 4),
    "permute": exercise_permute,
    "route": exercise_route,
    "merge": exercise_merge,
    "task_vector": exercise_task_vector,
    "ternary_linear": exercise_ternary_linear,
    "decode": exercise_decode,
    "task vector of many blocks": exercise_many_blocks,
    "logit_fusion": lambda backend: exercise_logit_fusion(backend, WEIGHED_SOURCES, ("logits", "log_probs", "probs")),
    "logit_fusion bounds": lambda backend: exercise_logit_fusion(backend, BOUNDED_SOURCES, ("log_probs",)),
    "logit_fusion rows": exercise_logit_rows,
}


def report_of(name: str, backend: str) -> str:
    """What an exercise finds wrong: a fault of the interpreter, other numbers, or nothing."""
    try:
        (EXERCISES | TRITON_EXERCISES)[name](backend)
    except Fault as fault:
        return str(fault)
    except AssertionError as error:
        return f"numbers: {error}"
    return "nothing"
