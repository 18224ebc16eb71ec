"""routed_lora, lora_shrink, lora_expand: forward, backward, edges, registration, compile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import bgmv, lora_expand, lora_shrink, prepare_routing, routed_lora, sgmv
from moe_kernels.ops.routed_lora import autograd, native, reference
from tests.ops.helpers import DTYPES, LOW_DTYPES, SLOW, check, check_exact, leaf, small_integers, strided

GPU_KERNELS = ["triton-cpu", "triton-ptx", "triton-cuda"]
OP = "routed_lora"


def skip_slow(kernel_id: str, *skipped: bool, dtype: torch.dtype = torch.float32) -> None:
    """An interpreter takes what ``skipped`` leaves; that of PTX does not read tensor cores' float64."""
    if kernel_id in SLOW and (any(skipped) or (kernel_id == "triton-ptx" and dtype == torch.float64)):
        pytest.skip("much the same, and an interpreter takes its time")


def pack(stacked: torch.Tensor, ranks: torch.Tensor, gap: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that ``ranks`` says of each adapter, one behind the other with unused rows between, and their starts."""
    rows, starts, at = [], [], 0
    for e, rank in enumerate(ranks.clamp_min(0).tolist()):
        starts.append(at)
        rows += [stacked[e, :rank], torch.full((gap, stacked.shape[2]), float("nan"), dtype=stacked.dtype)]
        at += rank + gap
    return torch.cat(rows), torch.tensor(starts, dtype=torch.int32)


def pairs(num_tokens: int, num_adapters: int, top_k: int, generator=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of which a quarter is -1, and weights of either sign."""
    ids = torch.randint(0, num_adapters, (num_tokens, top_k), generator=generator, dtype=torch.int32)
    skipped = torch.rand(num_tokens, top_k, generator=generator) < 0.25
    return torch.where(skipped, -1, ids).int(), torch.randn(num_tokens, top_k, generator=generator)


# (in, out, rank): tiny and odd; one below, at and above a vector; 4 and 8 rows a tile with some left over; past the
# chunk of 1024 summed elements and the block of 512 columns
SIZES = [(1, 1, 1), (3, 5, 2), (15, 17, 3), (33, 31, 4), (16, 64, 9), (1100, 70, 16), (70, 1030, 5)]


@pytest.mark.on_gpus
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stacked(backend, kernel_id, dtype, sizes, top_k):
    skip_slow(kernel_id, sizes not in [(33, 31, 4), (70, 1030, 5)], dtype=dtype)
    in_features, out_features, rank = sizes
    ids, weights = pairs(23, 4, top_k)
    tensors = [
        torch.randn(23, in_features).to(dtype),
        (torch.randn(4, rank, in_features) * in_features**-0.5).to(dtype),
        torch.randn(4, out_features, rank).to(dtype),
        weights,
        torch.rand(4) + 0.5,
        torch.randn(23, out_features).to(dtype),
    ]

    def op(x, a, b, w, s, base, backend):
        return routed_lora(x, a, b, ids, w, scaling=s, base=base, backend=backend)

    check(op, tensors, backend)


@pytest.mark.on_gpus
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_true_ranks(backend, kernel_id, dtype):
    skip_slow(kernel_id, dtype=dtype)
    ranks = torch.tensor([3, 0, 16, -1, 5], dtype=torch.int32)
    a, starts = pack(torch.randn(5, 16, 40), ranks)
    b, _ = pack(torch.randn(5, 16, 33), ranks)
    ids, weights = pairs(19, 5, 2)
    ids[ids == 3] = 4
    keep = a.isfinite().all(1)
    check(
        lambda x, a, b, w, base, backend: routed_lora(
            x, a, b, ids, w, base=base, ranks=ranks, rank_starts=starts, backend=backend
        ),
        [torch.randn(19, 40).to(dtype), a.nan_to_num().to(dtype), b.nan_to_num().to(dtype), weights]
        + [torch.randn(19, 33).to(dtype)],
        backend,
    )
    # rows of no adapter are neither read nor given a gradient
    a, b = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
    out = routed_lora(torch.randn(19, 40).to(dtype), a, b, ids, ranks=ranks, rank_starts=starts, backend=backend)
    out.sum().backward()
    assert out.isfinite().all() and a.grad[keep].abs().sum() > 0
    assert not a.grad[~keep].any() and not b.grad[~keep].any()


@pytest.mark.on_gpus
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_shared_rows_have_no_gradients(backend, activation):
    starts, ranks = torch.tensor([0, 2, 9]).int(), torch.tensor([3, 2, -1]).int()
    x, a, b = torch.randn(6, 5), torch.randn(4, 5), torch.randn(4, 7)
    ids = torch.tensor([0, 1, -1, 1, 0, 1])

    def op(a, b, starts=starts, ranks=ranks, backend=backend, x=x):
        table = dict(ranks=ranks, rank_starts=starts, max_rank=3)
        return routed_lora(x, a.to(x.dtype), b.to(x.dtype), ids, **table, activation=activation, backend=backend)

    check(lambda x, backend: op(a, b, backend=backend, x=x), [x], backend)
    for trained in ((leaf(a), b), (a, leaf(b))):
        with pytest.raises(
            ValueError, match=r"rank_starts must be rows of its own .*, got rows that adapters 0 and 1 share"
        ):
            op(*trained)
        op(*trained, backend="reference").sum().backward()
        with torch.no_grad():
            op(*trained)
    apart = torch.tensor([0, 3, 3]).int()
    alone = op(leaf(a), b, apart, torch.tensor([3, 1, 0]).int())
    apart[1] = 2  # a change that is seen
    assert alone.requires_grad
    with pytest.raises(ValueError, match="adapters 0 and 1 share"):
        op(leaf(a), b, apart)


@pytest.mark.on_gpus
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_below_the_stacked_rank(backend, kernel_id, dtype):
    skip_slow(kernel_id, dtype=dtype)
    ranks = torch.tensor([3, 0, 8], dtype=torch.int32)
    ids, _ = pairs(9, 3, 2)
    check(
        lambda x, a, b, backend: routed_lora(x, a, b, ids, ranks=ranks, scaling=0.5, backend=backend),
        [torch.randn(9, 12).to(dtype), torch.randn(3, 8, 12).to(dtype), torch.randn(3, 7, 8).to(dtype)],
        backend,
    )


@pytest.mark.on_gpus
@pytest.mark.parametrize("top_k", [1, 3])
def test_more_rows_than_are_multiplied_at_a_time(backend, kernel_id, top_k):
    """64 on a GPU."""
    ranks = torch.tensor([400, 3, 130], dtype=torch.int32)
    ids, weights = pairs(5, 3, top_k)
    check(
        lambda x, a, b, w, base, backend: routed_lora(x, a, b, ids, w, base=base, ranks=ranks, backend=backend),
        [torch.randn(5, 6), torch.randn(3, 400, 6), torch.randn(3, 7, 400) / 20, weights, torch.randn(5, 7)],
        backend,
    )


@pytest.mark.on_gpus
@pytest.mark.parametrize("num_tokens, top_k", [(530, 1), (300, 2), (512, 1), (513, 1)])
def test_many_pairs(backend, kernel_id, num_tokens, top_k):
    """A GPU sorts them; up to 512 each program looks for its own. A token's bits are the same."""
    skip_slow(kernel_id, kernel_id == "triton-cpu" and num_tokens > 512)
    ids, weights = pairs(num_tokens, 3, top_k)
    ids[40:90] = 1  # more than a tile of one adapter's side by side
    ranks = torch.tensor([3, 5, 0], dtype=torch.int32)
    x, a, b = torch.randn(num_tokens, 9), torch.randn(3, 5, 9), torch.randn(3, 20, 5)

    def op(x, a, b, w, base, backend, ids=ids):
        return routed_lora(x, a, b, ids, w, base=base, ranks=ranks, backend=backend)

    tensors = [x, a, b, weights, torch.randn(num_tokens, 20)]
    check(op, tensors, backend, backward=kernel_id == "native-cpu" or num_tokens == 300)
    few = slice(30, 70)
    alone = op(x[few], a, b, weights[few], tensors[4][few], backend, ids[few])
    assert torch.equal(op(*tensors, backend)[few], alone)


@pytest.mark.on_gpus
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_not_rounded_before_they_meet_b(backend, kernel_id, dtype, top_k):
    """Two large products of which the last bits alone are left; as many bits as a kernel keeps of float32."""
    skip_slow(kernel_id, dtype=dtype)
    large = (0x401 * 32.0, 1.5) if dtype == torch.float16 else (float(0x810000), 512.0, 3.0)
    x = torch.tensor([large]).to(dtype).expand(17, -1)
    a = torch.ones(1, 2, len(large), dtype=dtype)
    a[0, 1, 1:] = 0
    b = torch.tensor([[1.0, -1.0], [-2.0, 2.0]], dtype=dtype)[None]
    ids = torch.tensor([[0, -1]] * 17)[:, :top_k]
    out = routed_lora(x, a, b, ids, backend=backend)
    left = sum(large[1:])
    assert torch.equal(out, torch.tensor([[left, -2 * left]] * 17).to(dtype))


@pytest.mark.on_gpus
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_infinities(backend, kernel_id, dtype, top_k):
    """An infinite product is infinite, not NaN; an infinite weight does not meet rows that are not there."""
    x, a, b = torch.ones(5, 9, dtype=dtype), torch.ones(2, 3, 9, dtype=dtype), torch.ones(2, 20, 3, dtype=dtype)
    x[1, 2], ranks = torch.inf, torch.tensor([2, 3], dtype=torch.int32)
    ids, weights = torch.tensor([[0, 1]] * 5)[:, :top_k], torch.ones(5, top_k)
    weights[3] = -torch.inf
    out = routed_lora(x, a, b, ids, weights, ranks=ranks, backend=backend)
    finite = 18.0 if top_k == 1 else 45.0
    expected = torch.tensor([finite, torch.inf, finite, -torch.inf, finite]).to(dtype)
    assert torch.equal(out, expected[:, None].expand(-1, 20))


@pytest.mark.on_gpus
@pytest.mark.parametrize("top_k", [1, 2])
def test_no_adapters(backend, top_k):
    x, base, ids = torch.randn(6, 5), torch.randn(6, 7), torch.full((6, top_k), -1)
    none = torch.zeros(0, dtype=torch.int32)
    stacked = routed_lora(x, torch.randn(0, 2, 5), torch.randn(0, 7, 2), ids, base=base, backend=backend)
    factors = [leaf(torch.randn(4, 5)), leaf(torch.randn(4, 7))]
    packed = routed_lora(x, *factors, ids, base=base, ranks=none, rank_starts=none, max_rank=3, backend=backend)
    assert torch.equal(stacked, base) and torch.equal(packed, base)
    packed.sum().backward()
    assert not factors[0].grad.any() and not factors[1].grad.any()


@pytest.mark.on_gpus
def test_more_adapters_than_tokens(backend):
    ids = torch.randint(-1, 150, (33,))
    check(
        lambda x, a, b, base, backend: routed_lora(x, a, b, ids, base=base, backend=backend),
        [torch.randn(33, 6), torch.randn(150, 2, 6), torch.randn(150, 7, 2), torch.randn(33, 7)],
        backend,
    )


@pytest.mark.on_gpus
@pytest.mark.parametrize("packed", [False, True])
def test_a_gpu_skips_what_a_processor_refuses(backend, raises_in_kernel, packed):
    """Ids of no adapter, of an empty slot, and rows outside the factor: as if the token had none."""
    if raises_in_kernel:
        pytest.skip("test_bad_ids")
    x, a, b, base = torch.randn(6, 5), torch.randn(3, 2, 5), torch.randn(3, 7, 2), torch.randn(6, 7)
    ids = torch.tensor([0, -2, 3, 2**40, 1, 2**32])
    starts, ranks = torch.tensor([0, 2, 4]).int(), torch.tensor([2, -1, 2]).int()
    factors = (a.flatten(0, 1), b.transpose(1, 2).flatten(0, 1)) if packed else (a, b)
    leaves = [leaf(tensor) for tensor in (x, *factors, torch.rand(3))]
    table = dict(ranks=ranks, rank_starts=starts if packed else None)
    out = routed_lora(*leaves[:3], ids, scaling=leaves[3], base=base, **table, backend=backend)
    assert torch.equal(out[1:], base[1:]) and not torch.equal(out[0], base[0])
    out.square().sum().backward()
    assert not leaves[0].grad[1:].any() and leaves[0].grad[0].any()
    assert not leaves[1].grad.flatten(0, -2)[2:].any() and leaves[3].grad.bool().tolist() == [True, False, False]
    if packed:  # the last adapter's rows end behind the factor's
        table = dict(ranks=ranks, rank_starts=starts + 1, max_rank=2)
        short = routed_lora(x, *factors, torch.full((6,), 2), base=base, **table, backend=backend)
        one_row = routed_lora(x, a[2:, 1:], b[2:, :, 1:], torch.zeros(6).int(), base=base, backend=backend)
        assert torch.equal(short, one_row)


@given(
    num_tokens=st.integers(0, 40),
    num_adapters=st.integers(0, 4),
    top_k=st.integers(1, 3),
    rank=st.integers(0, 10),
    in_features=st.integers(1, 70),
    out_features=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    rows_first=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_any_shape(num_tokens, num_adapters, top_k, rank, in_features, out_features, dtype, rows_first, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, num_adapters, (num_tokens, top_k), generator=generator, dtype=torch.int32)

    def integers(*shape):
        return small_integers(torch.empty(*shape, dtype=dtype), generator)

    b = integers(num_adapters, out_features, rank)
    if rows_first:  # in memory [num_adapters, rank, out], which is read in place
        b = b.transpose(1, 2).contiguous().transpose(1, 2)
    tensors = [integers(num_tokens, in_features), integers(num_adapters, rank, in_features), b]
    tensors.append(integers(num_tokens, out_features))
    check_exact(lambda x, a, b, base, backend: routed_lora(x, a, b, ids, base=base, backend=backend), tensors, "native")


def test_gradcheck(backend):
    ids = torch.tensor([[0, -1], [2, 0], [1, 2], [-1, -1]])
    x, base = torch.randn(4, 3).double(), torch.randn(4, 5).double()
    a, b = torch.randn(3, 2, 3).double(), torch.randn(3, 5, 2).double()
    weights, scaling = torch.randn(4, 2).double(), torch.rand(3).double()
    inputs = [tensor.requires_grad_() for tensor in (x, a, b, weights, scaling, base)]
    assert torch.autograd.gradcheck(
        lambda x, a, b, w, s, base: routed_lora(x, a, b, ids, w, scaling=s, base=base, backend=backend), inputs
    )
    assert torch.autograd.gradcheck(
        lambda x, a, b, w, s, base: routed_lora(
            x, a, b, ids, w, scaling=s, base=base, combine="factor", backend=backend
        ),
        inputs,
    )
    gains, diagonal = torch.rand(3, 5).double().requires_grad_(), torch.rand(3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, a, b, w, base, g, d: routed_lora(
            x, a, b, ids, w, base=base, row_scale=g, diagonal=d, activation="silu", backend=backend
        ),
        (*inputs[:4], inputs[5], gains, diagonal),
    )


# every epilogue on its own and together, top_k 1 and 2; -1 rows among them
EPILOGUES = {
    "factor": dict(combine="factor"),
    "relu": dict(activation="relu"),
    "gelu": dict(activation="gelu"),
    "softmax": dict(activation="softmax"),
    "diagonal": dict(diagonal=True),
    "row_scale": dict(row_scale=True),
    "base_gate": dict(base_gate=True),
    "all": dict(activation="silu", diagonal=True, row_scale=True, base_gate=True),
}


@pytest.mark.on_gpus
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogues(backend, kernel_id, dtype, epilogue, top_k):
    skip_slow(kernel_id, dtype != torch.float32, top_k == 1)
    arguments = dict(EPILOGUES[epilogue])
    ids, weights = pairs(17, 3, top_k)
    ranks = None if epilogue == "factor" else torch.tensor([2, 6, 5], dtype=torch.int32)
    tensors = [torch.randn(17, 20).to(dtype), torch.randn(3, 6, 20).to(dtype), torch.randn(3, 9, 6).to(dtype), weights]
    tensors.append(torch.randn(17, 9).to(dtype))
    shapes = {"diagonal": (3, 6), "row_scale": (3, 9), "base_gate": (17,)}
    given_shapes = {name: shapes[name] for name in shapes if arguments.pop(name, False)}
    tensors += [(torch.rand(*shape) + 0.5).to(dtype) for shape in given_shapes.values()]

    def op(x, a, b, w, base, *more, backend):
        named = dict(zip(given_shapes, more, strict=True))
        return routed_lora(x, a, b, ids, w, base=base, ranks=ranks, scaling=0.5, **named, **arguments, backend=backend)

    check(op, tensors, backend)


@pytest.mark.on_gpus
@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_rows_a_pair(backend, kernel_id, dtype):
    """MixLoRA's two calls: a row of the output a pair, then a row of the input a pair."""
    skip_slow(kernel_id, dtype == torch.float16)
    ids, weights = pairs(11, 3, 2)
    x, a, b = torch.randn(11, 20).to(dtype), torch.randn(3, 4, 20).to(dtype), torch.randn(3, 9, 4).to(dtype)
    check(
        lambda x, a, b, backend: routed_lora(x, a, b, ids, scaling=2.0, reduce=False, backend=backend),
        [x, a, b],
        backend,
    )
    check(
        lambda x, a, b, w, backend: routed_lora(x, a, b, ids, w, backend=backend),
        [torch.randn(11, 2, 20).to(dtype), a, b, weights],
        backend,
    )
    rows = routed_lora(x, a, b, ids, reduce=False, backend=backend)
    assert rows.shape == (11, 2, 9) and not rows[ids < 0].any() and rows[ids >= 0].any()


@pytest.mark.on_gpus
def test_the_two_mixtures_differ(backend):
    ids, weights = torch.tensor([[0, 1]] * 4), torch.rand(4, 2)
    x, a, b = torch.randn(4, 30), torch.randn(2, 4, 30), torch.randn(2, 20, 4)
    output = routed_lora(x, a, b, ids, weights, backend=backend)
    factor = routed_lora(x, a, b, ids, weights, combine="factor", backend=backend)
    assert (output - factor).norm() > 0.3 * output.norm()


@pytest.mark.on_gpus
@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_slices_are_their_own_calls(backend, dtype):
    ids, weights = pairs(13, 3, 2)
    x, base = torch.randn(13, 20).to(dtype), torch.randn(13, 8 + 3 + 5).to(dtype)
    a = [torch.randn(3, rank, 20).to(dtype) for rank in (4, 2, 4)]
    b = [torch.randn(3, width, rank).to(dtype) for width, rank in ((8, 4), (3, 2), (5, 4))]
    together = routed_lora(x, a, b, ids, weights, base=base, backend=backend)
    alone = [
        routed_lora(x, *factors, ids, weights, base=y, backend=backend)
        for *factors, y in zip(a, b, base.split([8, 3, 5], 1), strict=True)
    ]
    assert torch.equal(together, torch.cat(alone, 1))


@pytest.mark.on_gpus
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_a_token_has_the_same_bits_alone_and_among_others(backend, kernel_id, dtype, top_k, threads):
    skip_slow(kernel_id, threads == 2, kernel_id == "triton-ptx" and dtype == torch.float16)
    ids, weights = pairs(70, 5, top_k)
    x, base = torch.randn(70, 1100).to(dtype), torch.randn(70, 530).to(dtype)
    a, b = torch.randn(5, 16, 1100).to(dtype), torch.randn(5, 530, 16).to(dtype)
    together = routed_lora(x, a, b, ids, weights, base=base, backend=backend)
    for t in (0, 1, 33, 69):
        alone = routed_lora(
            x[t : t + 1], a, b, ids[t : t + 1], weights[t : t + 1], base=base[t : t + 1], backend=backend
        )
        assert torch.equal(together[t : t + 1], alone)
    order = torch.randperm(70)
    shuffled = routed_lora(x[order], a, b, ids[order], weights[order], base=base[order], backend=backend)
    assert torch.equal(together[order], shuffled)


@pytest.mark.on_gpus
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_without_adapters_return_their_base_to_the_bit(backend, kernel_id, dtype):
    skip_slow(kernel_id, dtype=dtype)
    base = torch.randn(4, 9).to(dtype)
    base[0, 0], base[1, 1], base[2, 2] = -0.0, float("nan"), float("inf")
    a, b = torch.full((2, 3, 5), float("nan")).to(dtype), torch.randn(2, 9, 3).to(dtype)
    ids = torch.tensor([-1, -1, -1, 1])
    out = routed_lora(torch.randn(4, 5).to(dtype), a, b, ids, base=base, backend=backend)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(out[:3].view(bits), base[:3].view(bits)) and out[3].isnan().all()


def test_gradients_do_not_depend_on_the_number_of_threads(backend):
    ids, weights = pairs(300, 3, 2)
    tensors = [torch.randn(300, 600), torch.randn(3, 5, 600), torch.randn(3, 530, 5), weights]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaves = [leaf(tensor) for tensor in tensors]
        routed_lora(*leaves[:3], ids, leaves[3], backend=backend).square().sum().backward()
        results.append([tensor.grad for tensor in leaves])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.on_gpus
@pytest.mark.parametrize("shape", [(0, 1), (3, 0)])
def test_nothing_to_do(backend, shape):
    x = torch.randn(shape[0], 4, requires_grad=True)
    ids = torch.zeros(shape, dtype=torch.int32)
    out = routed_lora(x, torch.randn(2, 3, 4), torch.randn(2, 5, 3), ids, backend=backend)
    assert out.shape == (shape[0], 5) and not out.any()
    out.sum().backward()
    assert not x.grad.any()


@pytest.mark.on_gpus
def test_strides_and_halves(backend):
    ids = torch.tensor([1, -1, 0, 1])
    x, a, b = torch.randn(4, 6), torch.randn(2, 3, 6), torch.randn(2, 5, 3)
    plain = routed_lora(x, a, b, ids, scaling=2.0, backend=backend)
    views = routed_lora(strided(x), strided(a), strided(b), strided(ids.int()), scaling=2.0, backend=backend)
    assert torch.equal(plain, views)
    v = lora_shrink(x, a, ids, backend=backend)
    assert v.shape == (4, 1, 3) and v.dtype == torch.float32 and not v[1].any()
    assert torch.equal(lora_expand(v, b, ids, scaling=2.0, backend=backend), plain)


@pytest.mark.on_gpus
def test_names_of_serving_engines(backend):
    x, base, a, b = torch.randn(9, 6), torch.randn(9, 5), torch.randn(3, 2, 6), torch.randn(3, 5, 2)
    # a token before the first segment and one behind the last; an empty one, one without adapter, one adapter twice
    seg_indptr, weight_indices = torch.tensor([1, 3, 3, 4, 6, 8]), torch.tensor([2, 1, -1, 0, 2])
    ids = torch.tensor([-1, 2, 2, -1, 0, 0, 2, 2, -1])
    expected = routed_lora(x, a, b, ids, scaling=0.5, base=base, backend=backend)
    assert torch.equal(bgmv(x, a, b, ids, 0.5, base=base, backend=backend), expected)
    assert torch.equal(sgmv(x, a, b, seg_indptr, weight_indices, 0.5, base=base, backend=backend), expected)
    with pytest.raises(ValueError, match=r"sgmv: seg_indptr must be of shape \[num_segments \+ 1\]"):
        sgmv(x, a, b, seg_indptr[:-1], weight_indices)
    with pytest.raises(ValueError, match=r"bgmv: indices must be of shape \[num_tokens\]"):
        bgmv(x, a, b, ids[:, None])
    routing = prepare_routing(ids, 3)
    assert routing.token_indices_sorted_by_lora_ids.tolist() == [0, 3, 8, 4, 5, 1, 2, 6, 7]
    assert routing.lora_ids.tolist() == [-1, 0, 2, -1] and routing.num_tokens_per_lora.tolist() == [3, 2, 4, 0]
    assert routing.lora_token_start_loc.tolist() == [0, 3, 5, 9, 9]


@pytest.mark.with_reference
def test_bad_ids(backend):
    x, a, b = torch.randn(2, 6), torch.randn(3, 2, 6), torch.randn(3, 5, 2)
    for bad in (3, -2):
        with pytest.raises(RuntimeError, match=rf"adapter_ids must be -1 or in \[0, num_adapters=3\), got {bad}"):
            routed_lora(x, a, b, torch.tensor([0, bad]), backend=backend)
    ranks = torch.tensor([2, -1, 2], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="must name loaded adapters, got 1.*whose slot is empty"):
        routed_lora(x, a, b, torch.tensor([0, 1]), ranks=ranks, backend=backend)


def test_bad_input():
    x, a, b, ids = torch.randn(2, 6), torch.randn(3, 2, 6), torch.randn(3, 5, 2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"routed_lora: lora_a must be of shape .* with in=6, got \[3, 2, 7\]"):
        routed_lora(x, torch.randn(3, 2, 7), b, ids)
    with pytest.raises(ValueError, match=r"lora_b must be of shape \[num_adapters=3, out, rank=2\], got \[3, 5, 4\]"):
        routed_lora(x, a, torch.randn(3, 5, 4), ids)
    with pytest.raises(TypeError, match="lora_a must be torch.bfloat16, got torch.float32; it must equal that of x"):
        routed_lora(x.bfloat16(), a, b, ids)
    with pytest.raises(TypeError, match="lora_b must be torch.float32, got torch.float64"):
        routed_lora(x, a, b.double(), ids)
    with pytest.raises(TypeError, match="adapter_ids must be one of torch.int32, torch.int64"):
        routed_lora(x, a, b, ids.float())
    with pytest.raises(ValueError, match=r"adapter_ids must be of shape \[num_tokens=2\]"):
        routed_lora(x, a, b, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"adapter_weights must be of shape \[2, 1\]"):
        routed_lora(x, a, b, ids, torch.rand(2, 2))
    with pytest.raises(ValueError, match=r"scaling must be of shape \[num_adapters=3\]"):
        routed_lora(x, a, b, ids, scaling=torch.rand(2))
    with pytest.raises(ValueError, match="rank_starts and ranks must be given for a packed lora_a"):
        routed_lora(x, a.flatten(0, 1), b, ids)
    with pytest.raises(ValueError, match="combine must be 'output' with an activation"):
        routed_lora(x, a, b, ids, combine="factor", activation="relu")
    with pytest.raises(ValueError, match="base must be given with row_scale"):
        routed_lora(x, a, b, ids, row_scale=torch.rand(3, 5))
    with pytest.raises(ValueError, match="reduce must be True with a base"):
        routed_lora(x, a, b, ids, base=torch.rand(2, 5), reduce=False)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    ranks = torch.tensor([2, 2, 2], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"adapter 2 must lie within the packed rows \[0, 6\)"):
        packed_b = torch.randn(6, 5)
        routed_lora(x, a.flatten(0, 1), packed_b, ids, ranks=ranks, rank_starts=starts, backend="native")


def test_autocast(backend):
    x, a, b, ids = torch.randn(2, 6), torch.randn(3, 2, 6), torch.randn(3, 5, 2), torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        out = routed_lora(x, a, b, ids, base=torch.randn(2, 5), backend=backend)
    assert out.dtype == torch.bfloat16


def test_registration(backend):
    ids = torch.tensor([[0, -1], [1, 1]], dtype=torch.int32)
    starts, ranks = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([3, 2], dtype=torch.int32)
    x, base, v = torch.randn(2, 6), torch.randn(2, 7), torch.randn(2, 2, 3)
    for factor, table in ((torch.randn(2, 3, 6), (None, None)), (torch.randn(5, 6), (starts, ranks))):
        torch.library.opcheck(native.lora_dropout, (x, 0.5, torch.tensor(3)))
        torch.library.opcheck(native.lora_shrink, (x, factor, *table, ids, 3))
        num_rows = None if factor.dim() == 3 else 5
        torch.library.opcheck(native.lora_factor_grad, (v, x, *table, ids, 2, num_rows))
    torch.library.opcheck(
        native.lora_expand, (v, torch.randn(2, 3, 7), None, None, ids, torch.rand(2, 2), torch.rand(2), base)
    )
    torch.library.opcheck(native.lora_expand, (v, torch.randn(5, 7), starts, ranks, ids, None, None, None))


@pytest.mark.on_gpus
def test_compile(backend):
    a, b = torch.randn(3, 2, 6, requires_grad=True), torch.randn(3, 5, 2, requires_grad=True)

    def op(x, ids, weights, base):
        return routed_lora(x, a, b, ids, weights, scaling=0.5, base=base, backend=backend)

    compiled = torch.compile(op, fullgraph=True, dynamic=True)
    for num_tokens in (3, 7):
        ids, weights = pairs(num_tokens, 3, 2)
        inputs = torch.randn(num_tokens, 6), ids, weights, torch.randn(num_tokens, 5)
        out, expected = compiled(*inputs), op(*inputs)
        assert torch.equal(out, expected)
        grads = torch.autograd.grad(out.sum(), (a, b))
        assert all(torch.equal(*pair) for pair in zip(grads, torch.autograd.grad(expected.sum(), (a, b)), strict=True))


@pytest.mark.on_gpus
# tokens without adapters, an entry named twice, no base, rows a pair
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_entries(backend, kernel_id, dtype, top_k, with_base):
    skip_slow(kernel_id, dtype != torch.float32, not with_base)
    ids, weights = pairs(17, 3, top_k)
    rows, columns = torch.randint(0, 9, (3, 6), dtype=torch.int32), torch.randint(0, 20, (3, 6))
    rows[:, 1], columns[:, 1] = rows[:, 0], columns[:, 0]
    tensors = [torch.randn(17, 20).to(dtype), torch.randn(3, 4, 20).to(dtype), torch.randn(3, 9, 4).to(dtype), weights]
    tensors += [torch.randn(3, 6).to(dtype)] + [torch.randn(17, 9).to(dtype)] * with_base

    def op(x, a, b, w, values, *base, backend):
        y = base[0] if base else None
        return routed_lora(x, a, b, ids, w, scaling=0.5, sparse=(rows, columns, values), base=y, backend=backend)

    check(op, tensors, backend)
    x, a, b, w, values, *base = tensors
    out = op(x, a, b, w, values, *base, backend=backend)
    none = (ids < 0).all(1)
    assert torch.equal(out[none], base[0][none] if base else torch.zeros_like(out[none]))
    entries = rows, columns, values
    for t in (0, 16):
        alone = routed_lora(
            x[t : t + 1], a, b, ids[t : t + 1], w[t : t + 1], scaling=0.5, sparse=entries,
            base=base[0][t : t + 1] if base else None, backend=backend,
        )  # fmt: skip
        assert torch.equal(alone, out[t : t + 1])


def test_sparse_gradcheck_and_bad_input(backend):
    ids = torch.tensor([[0, -1], [2, 0], [1, 2], [-1, -1]])
    rows, columns = torch.tensor([[0, 4], [1, 1], [2, 3]]), torch.tensor([[0, 1], [2, 2], [1, 0]])
    x, base, weights = torch.randn(4, 3).double(), torch.randn(4, 5).double(), torch.randn(4, 2).double()
    a, b, values = torch.randn(3, 2, 3).double(), torch.randn(3, 5, 2).double(), torch.randn(3, 2).double()
    assert torch.autograd.gradcheck(
        lambda x, a, b, w, base, v: routed_lora(x, a, b, ids, w, base=base, sparse=(rows, columns, v), backend=backend),
        [tensor.requires_grad_() for tensor in (x, a, b, weights, base, values)],
    )
    bad = [
        (ValueError, r"sparse rows must be in \[0, 5\), got 1 to 5", (rows + 1, columns, values), {}),
        (ValueError, r"sparse columns must be in \[0, 3\), got -1 to 1", (rows, columns - 1, values), {}),
        (
            ValueError,
            r"sparse rows must be of shape \[num_adapters=3, num_entries=2\]",
            (rows[:2], columns, values),
            {},
        ),
        (TypeError, "sparse rows must be one of torch.int32, torch.int64", (rows.double(), columns, values), {}),
        (TypeError, "sparse values must be torch.float64, got torch.float32", (rows, columns, values.float()), {}),
        (ValueError, "sparse must be None with combine='factor'", (rows, columns, values), {"combine": "factor"}),
        (ValueError, "sparse must be None with combine=.* reduce=False", (rows, columns, values), {"reduce": False}),
    ]
    for error, message, entries, more in bad:
        with pytest.raises(error, match=message):
            routed_lora(x, a, b, ids, sparse=entries, **more, backend=backend)
    with pytest.raises(ValueError, match="sparse must be None with slices"):
        routed_lora(x, [a], [b], ids, sparse=(rows, columns, values), backend=backend)
    with pytest.raises(RuntimeError, match=r"must be -1 or in \[0, num_adapters=3\), got 3"):
        routed_lora(x, a, b, ids + 1, sparse=(rows, columns, values), backend=backend)


@pytest.mark.with_reference
def test_sparse_entries_alone(backend):
    """Adapters of rank 0: a few entries and nothing else; integers, so that every sum is exact."""
    ids = torch.tensor([[0, -1], [2, 0], [1, 2], [-1, -1]])
    rows, columns = torch.randint(0, 9, (3, 6)), torch.randint(0, 20, (3, 6))
    x, values = (torch.randint(-8, 9, shape).float() for shape in ((4, 20), (3, 6)))
    factors = torch.zeros(3, 0, 20), torch.zeros(3, 9, 0)
    out = routed_lora(x, *factors, ids, sparse=(rows, columns, values), backend=backend)
    expected = torch.zeros(4, 9)
    for t, k in (ids >= 0).nonzero().tolist():
        for row, column, value in zip(*(found[ids[t, k]].tolist() for found in (rows, columns, values)), strict=True):
            expected[t, row] += value * x[t, column]
    assert torch.equal(out, expected) and out.any()
    with torch.autocast("cpu", torch.bfloat16):
        low = routed_lora(x, *factors, ids, sparse=(rows, columns, values))
    assert low.dtype == torch.bfloat16 and torch.equal(low, expected.bfloat16())


def test_sparse_compiles():
    rows, columns = torch.randint(0, 9, (3, 6)), torch.randint(0, 20, (3, 6))
    a, b, values = torch.randn(3, 4, 20), torch.randn(3, 9, 4), torch.randn(3, 6)

    def call(x, ids, base):
        return routed_lora(x, a, b, ids, sparse=(rows, columns, values), base=base)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (5, 8):
        arguments = torch.randn(num_tokens, 20), torch.randint(-1, 3, (num_tokens,)), torch.randn(num_tokens, 9)
        assert torch.equal(compiled(*arguments), call(*arguments))


# no element dropped although the rate is not 0; some; nearly all
RATES = [2.0**-40, 0.3, 1 - 2.0**-24]


@pytest.mark.on_gpus
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("seed", [0, 1, -3, 2**40 + 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_the_same_everywhere(backend, kernel_id, dtype, seed, rate):
    skip_slow(kernel_id, seed == 0, rate != 0.3 and seed != -3, kernel_id == "triton-ptx" and seed != -3)
    x = torch.randn(5, 1101).to(dtype)
    x[0, :4] = torch.tensor([torch.inf, -torch.inf, -0.0, torch.nan])
    x[0, 4:8] = torch.finfo(dtype).smallest_normal / torch.tensor([1, -2, 4, -8])
    x = strided(x)

    def drop(x, seed):
        return autograd.kernels(backend).lora_dropout(x, rate, torch.tensor(seed))

    out, bits = drop(x, seed), {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    expected = reference.lora_dropout(x, rate, torch.tensor(seed))
    assert torch.equal(out.view(bits), expected.contiguous().view(bits))
    assert abs((out[1:] == 0).double().mean() - rate) < 0.05
    # keyed by the place in x and the seed alone
    assert torch.equal(drop(x[1:2, :9], seed), drop(x[1:], seed)[:1, :9])
    if rate == 0.3:
        assert not torch.equal(drop(x, seed + 2**32) == 0, out == 0)


def test_dropout_is_philox():
    x, seed = torch.ones(3, 10), torch.tensor(2**33 + 7)
    block, token = torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij")
    words = reference.philox((block, 0 * block, token, 0 * block), 7, 2)
    kept = reference.lora_dropout(x, 0.5, seed) != 0
    for i in range(10):
        for t in range(3):
            assert kept[t, i] == (words[i % 4][i // 4, t] >= 2**31)


DROPOUT_CASES = {
    "one launch": {},
    "activation": dict(activation="silu"),
    "rows a pair": {},
    "factor": dict(combine="factor"),
    "slices": {},
}


@pytest.mark.on_gpus
@pytest.mark.parametrize("case", DROPOUT_CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(backend, kernel_id, dtype, case):
    skip_slow(kernel_id, dtype not in (torch.float32, torch.bfloat16), dtype != torch.float32 and case != "one launch")
    ids, weights = pairs(11, 3, 2)
    a, b = torch.randn(3, 4, 20).to(dtype), torch.randn(3, 9, 4).to(dtype)
    x = torch.randn(*((11, 2, 20) if case == "rows a pair" else (11, 20))).to(dtype)

    def op(x, a, b, w, base, backend, **dropout):
        factors = ([a, 2 * a], [b[:, :5], b[:, 5:]]) if case == "slices" else (a, b)
        return routed_lora(x, *factors, ids, w, base=base, **dropout, **DROPOUT_CASES[case], backend=backend)

    tensors = [x, a, b, weights, torch.randn(11, 9).to(dtype)]
    check(lambda *tensors, backend: op(*tensors, backend, dropout=0.4, seed=11), tensors, backend)
    out = op(*tensors, backend, dropout=0.4, seed=11)
    assert torch.equal(out, op(*tensors, backend, dropout=0.4, seed=torch.tensor(11)))
    assert torch.equal(out, op(*tensors, backend, dropout=0.4, seed=11))
    assert not torch.equal(out, op(*tensors, backend, dropout=0.4, seed=12))
    assert not torch.equal(out, op(*tensors, backend))
    assert torch.equal(op(*tensors, backend, dropout=0.0, seed=11), op(*tensors, backend))


@pytest.mark.on_gpus
def test_dropout_of_a_token_alone_and_among_others(backend, threads):
    ids, weights = pairs(70, 5, 2)
    x, a, b = torch.randn(70, 300), torch.randn(5, 16, 300), torch.randn(5, 130, 16)
    together = routed_lora(x, a, b, ids, weights, dropout=0.5, seed=3, backend=backend)
    for num_tokens in (1, 33, 69):
        some = routed_lora(
            x[:num_tokens], a, b, ids[:num_tokens], weights[:num_tokens], dropout=0.5, seed=3, backend=backend
        )
        assert torch.equal(some, together[:num_tokens])


def test_dropout_does_not_depend_on_the_number_of_threads(backend):
    ids, _ = pairs(300, 3, 2)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaves = [leaf(tensor) for tensor in (torch.ones(300, 600), torch.ones(3, 5, 600), torch.ones(3, 530, 5))]
        out = routed_lora(*leaves, ids, dropout=0.5, seed=3, backend=backend)
        out.square().sum().backward()
        results.append([out, *(tensor.grad for tensor in leaves)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_dropout_gradcheck(backend, activation):
    ids = torch.tensor([[0, -1], [2, 0], [1, 2], [-1, -1]])
    tensors = torch.randn(4, 9), torch.randn(3, 2, 9), torch.randn(3, 5, 2), torch.randn(4, 2), torch.randn(4, 5)
    inputs = [tensor.double().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(
        lambda x, a, b, w, base: routed_lora(
            x, a, b, ids, w, base=base, dropout=0.5, seed=5, activation=activation, backend=backend
        ),
        inputs,
    )


@pytest.mark.on_gpus
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_dropout_saves_its_seed_alone(backend, activation):
    x, a, b = (leaf(torch.randn(*size)) for size in ((6, 20), (2, 3, 20), (2, 9, 3)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = routed_lora(
            x, a, b, torch.tensor([0, 1, -1, 0, 1, 1]), dropout=0.5, seed=3, activation=activation, backend=backend
        )
    assert out.requires_grad
    like_x = [tensor.data_ptr() for tensor in saved if tensor.shape == x.shape]
    assert like_x and set(like_x) == {x.data_ptr()}


@pytest.mark.on_gpus
def test_dropout_compiles(backend):
    a, b = torch.randn(3, 2, 6, requires_grad=True), torch.randn(3, 5, 2, requires_grad=True)

    def op(x, ids, seed):
        return routed_lora(x, a, b, ids, dropout=0.5, seed=seed, backend=backend)

    compiled = torch.compile(op, fullgraph=True, dynamic=True)
    for num_tokens, seed in ((3, 5), (7, 2**40), (7, torch.tensor(2)), (3, torch.tensor(-9))):
        inputs = torch.randn(num_tokens, 6, requires_grad=True), torch.randint(-1, 3, (num_tokens, 2)), seed
        out, expected = compiled(*inputs), op(*inputs)
        assert torch.equal(out, expected)
        leaves = (inputs[0], a, b)
        grads, eager = (torch.autograd.grad(result.sum(), leaves) for result in (out, expected))
        assert all(torch.equal(*pair) for pair in zip(grads, eager, strict=True))


@pytest.mark.on_gpus
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_dropout_of_nearly_everything(backend, activation):
    """The few that are left count 64 times, down to the least of float16."""
    x, a, b = (
        torch.ones(1, 300).half(),
        torch.full((1, 1, 300), 2.0**-20).half(),
        torch.full((1, 5, 1), 2.0**-10).half(),
    )
    x, rate, ids = x.requires_grad_(), 1 - 2.0**-6, torch.tensor([0])
    out = routed_lora(x, a, b, ids, scaling=1.0, dropout=rate, seed=8, activation=activation, backend=backend)
    count = int((reference.lora_dropout(x, rate, torch.tensor(8)) != 0).sum())
    assert 0 < count < 20 and torch.equal(out, torch.full((1, 5), count * 2.0**-24).half())
    grad = torch.autograd.grad(out.sum(), x)[0]
    assert torch.equal(grad != 0, reference.lora_dropout(x, rate, torch.tensor(8)) != 0)


def test_dropout_with_bad_input():
    x, a, b, ids = torch.randn(2, 6), torch.randn(3, 2, 6), torch.randn(3, 5, 2), torch.tensor([0, 1])
    sparse = torch.zeros(3, 1).int(), torch.zeros(3, 1).int(), torch.zeros(3, 1)
    bad = [
        (ValueError, r"dropout must be in \[0, 1\), got 1.0", dict(dropout=1.0, seed=1)),
        (ValueError, r"dropout must be in \[0, 1\), got -0.1", dict(dropout=-0.1, seed=1)),
        (ValueError, r"dropout must be in \[0, 1\), got nan", dict(dropout=float("nan"), seed=1)),
        (ValueError, "dropout must be 0 with sparse", dict(dropout=0.1, seed=1, sparse=sparse)),
        (ValueError, "seed must be given with a dropout, got None", dict(dropout=0.1)),
        (ValueError, r"seed must be in \[-2\*\*63, 2\*\*63\), got 9223372036854775808", dict(dropout=0.1, seed=2**63)),
        (ValueError, r"seed must be of shape \[\], got", dict(dropout=0.1, seed=torch.tensor([1]))),
        (TypeError, "seed must be torch.int64, got torch.int32", dict(dropout=0.1, seed=torch.tensor(1).int())),
    ]
    for error, message, arguments in bad:
        with pytest.raises(error, match=f"routed_lora: {message}"):
            routed_lora(x, a, b, ids, **arguments)
