"""Fused logits: kernels against the float64 reference, gradients, the -inf and NaN table, draws, filters."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_kernels import TokenFilter, fuse_logits
from moe_kernels.ops.logit_fusion import native, reference
from moe_kernels.testing import assert_close_to_reference
from tests.ops.helpers import DTYPES, SLOW, check, check_exact, strided

OP = "fuse_logits"
GPU_KERNELS = ["native-simt", "native-ptx", "native-cuda", "triton-cpu", "triton-ptx", "triton-cuda"]
INF, NAN = math.inf, math.nan

# weights as the methods have them; each is run with every result
FUSIONS = {
    "one_source": dict(weights=[1.0]),
    "guidance": dict(weights=[2.5, -1.5]),
    "emulated_fine_tuning": dict(weights=[1.0, 0.7, -0.7], temperature=0.8),
    "masked": dict(weights=[1.5, -0.5], mask=TokenFilter(min_p=0.1)),
    "nucleus_of_the_anchor": dict(weights=[0.5, 1.0, -1.0], anchor=1, mask=TokenFilter(top_p=0.9, min_keep=2)),
    "floored": dict(weights=[1.0, -1.0], floor=TokenFilter(top_k=5), neg_inf="floor"),
    "mixture": dict(weights=[0.3, 0.5, 0.2], mode="mixture", temperature=1.3),
    "filtered": dict(weights=[1.0, 0.5, -0.5], keep=TokenFilter(top_k=40, top_p=0.8, min_p=0.01)),
}
RESULTS = ["logits", "log_probs", "probs"]
GPU_FUSIONS = {
    name: FUSIONS[name] for name in ("one_source", "guidance", "emulated_fine_tuning", "masked", "mixture")
} | {
    "floored": dict(weights=[1.0, -1.0], floor=TokenFilter(min_p=0.1), neg_inf="floor"),
    "filtered": dict(weights=[1.0, 0.5, -0.5], keep=TokenFilter(min_p=0.05)),
    "masked_mixture": dict(weights=[0.3, 0.7], mode="mixture", anchor=1, mask=TokenFilter(min_p=0.2)),
    "anchored": dict(weights=[0.5, 1.0, -1.0], anchor=1, neg_inf="zero", temperature=0.7),
}


def fuse(fusion: dict, **more):
    arguments = {**fusion, **more}
    weights = arguments.pop("weights")
    temperature = arguments.pop("temperature", 1.0)

    def op(*tensors, backend):
        *sources, w, t = tensors
        return fuse_logits(sources, w, temperature=t, **arguments, backend=backend)

    return op, weights, temperature


def inputs(fusion: dict, num_rows: int, vocab_size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    _, weights, temperature = fuse(fusion)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    sources = [3 * torch.randn(num_rows, vocab_size).to(dtype) for _ in weights]
    return [
        *sources,
        # a factor each: one for all lets sums of low-precision logits tie, and filters see those rounded apart
        torch.tensor(weights, dtype=acc) * (1 + 0.1 * torch.rand(num_rows, len(weights), dtype=acc)),
        torch.full((num_rows,), temperature, dtype=acc),
    ]


def on_gpu(kernel_id: str, op):
    """Kernels without gradients get no inputs that ask for them."""
    return torch.no_grad()(op) if kernel_id in GPU_KERNELS else op


# vocabularies: one token, below and above a vector, one token past a block of sums, three blocks
# rows: of gradients that are one number a row, eager's largest error is taken of few and of many
@pytest.mark.parametrize("num_rows", [5, 48])
@pytest.mark.parametrize("vocab_size", [1, 7, 513, 1500])
@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("out", RESULTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(backend, dtype, out, name, vocab_size, num_rows):
    op, _, _ = fuse(FUSIONS[name], out=out)
    check(op, inputs(FUSIONS[name], num_rows, vocab_size, dtype), backend)


# tiles of four blocks of 512: one token, one block that is not full, one that is, two, more than a tile
@pytest.mark.on_gpus
@pytest.mark.parametrize("vocab_size", [1, 7, 512, 513, 2500])
@pytest.mark.parametrize("name", GPU_FUSIONS)
@pytest.mark.parametrize("out", RESULTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_on_gpus(backend, kernel_id, dtype, out, name, vocab_size):
    in_ptx = (dtype, out) in ((torch.bfloat16, "log_probs"), (torch.float64, "probs"), (torch.float32, "logits"))
    if kernel_id.endswith("ptx") and (vocab_size != 513 or not in_ptx):
        pytest.skip("seconds each in the PTX interpreter; the cases that stay run the same kernels")
    op, _, _ = fuse(GPU_FUSIONS[name], out=out)
    num_rows = 2 if kernel_id.endswith("ptx") else 5
    check(torch.no_grad()(op), inputs(GPU_FUSIONS[name], num_rows, vocab_size, dtype), backend, backward=False)


@pytest.mark.on_gpus
def test_a_real_vocabulary(backend, kernel_id):
    op, _, _ = fuse(FUSIONS["emulated_fine_tuning"], out="log_probs")
    vocab_size = 20_000 if kernel_id.endswith("ptx") else 151_936
    tensors = inputs(FUSIONS["emulated_fine_tuning"], 2, vocab_size, torch.bfloat16)
    check(on_gpu(kernel_id, op), tensors, backend, backward=kernel_id not in GPU_KERNELS)


def test_integers_are_exact(backend):
    sources = [torch.randint(-8, 9, (3, 600)).float() for _ in range(3)]
    check_exact(
        lambda a, b, c, backend: fuse_logits([a, b, c], [1.0, 2.0, -2.0], out="logits", backend=backend),
        sources,
        backend,
    )


@pytest.mark.on_gpus
@pytest.mark.parametrize("neg_inf", ["mask", "zero"])
def test_logits_are_rounded_once(backend, kernel_id, neg_inf):
    if kernel_id not in GPU_KERNELS and neg_inf == "mask":
        pytest.skip("the CPU rounds each product and sum")
    sources = [1e4 * torch.randn(2, 600) for _ in range(3)]
    weights = torch.tensor([1.1, 0.7, -1.7])
    fused = fuse_logits(sources, weights, neg_inf=neg_inf, out="logits", backend=backend)
    exact = sum(weight.double() * source.double() for weight, source in zip(weights, sources, strict=True))
    assert torch.equal(fused, exact.float())


# a floor is a constant by definition, a difference quotient sees it move: it is compared with the reference above
@pytest.mark.parametrize("name", [name for name in FUSIONS if name != "floored"])
@pytest.mark.parametrize("out", RESULTS)
def test_gradcheck(backend, name, out):
    op, _, _ = fuse(FUSIONS[name], out=out)
    tensors = [tensor.double().requires_grad_() for tensor in inputs(FUSIONS[name], 2, 6, torch.float64)]

    def finite(*tensors):
        fused = op(*tensors, backend=backend)
        return fused.masked_fill(fused.isinf(), 0)

    assert torch.autograd.gradcheck(finite, tensors)


@pytest.mark.on_gpus
def test_sources_of_different_dtypes_and_vocabularies(backend, kernel_id):
    sources = [torch.randn(4, 700), torch.randn(4, 720).bfloat16(), torch.randn(4, 704).half()]
    op = on_gpu(kernel_id, lambda *sources, backend: fuse_logits(sources, [1.0, 1.0, -1.0], backend=backend))
    check(op, sources, backend, backward=kernel_id not in GPU_KERNELS)
    if kernel_id in GPU_KERNELS:
        return
    sources[1].requires_grad_()
    fused = fuse_logits(sources, [1.0, 1.0, -1.0], backend=backend)
    assert fused.shape == (4, 700)
    assert not torch.autograd.grad(fused[:, 3].sum(), sources[1])[0][:, 700:].any()


# what a token's fused logit is where sources hold -inf: weights 1, 1, -1
@pytest.mark.with_reference
@pytest.mark.on_gpus
@pytest.mark.parametrize(
    ("neg_inf", "expected"),
    [
        # anchor, positive, negative, positive and negative, all three
        ("mask", [-INF, -INF, -INF, -INF, -INF, 3.0 + 5.0 - 7.0]),
        ("floor", [-INF, -INF, 3.0 + 5.0 - 2.0, -INF, -INF, 3.0 + 5.0 - 7.0]),
        ("zero", [-INF, -INF, 3.0, -INF, -INF, 3.0 + 5.0 - 7.0]),
    ],
)
def test_minus_infinity(backend, kernel_id, neg_inf, expected):
    anchor = torch.tensor([[-INF, 3, 3, 3, -INF, 3]])
    positive = torch.tensor([[5, -INF, 5, -INF, -INF, 5]])
    negative = torch.tensor([[2.0, 2, -INF, -INF, -INF, 7]])
    sources = [source.requires_grad_() for source in (anchor, positive, negative)]
    weights = torch.tensor([1.0, 1.0, -1.0], requires_grad=True)
    with torch.set_grad_enabled(kernel_id not in GPU_KERNELS):
        fused = fuse_logits(sources, weights, neg_inf=neg_inf, out="logits", backend=backend)
        log_probs = fuse_logits(sources, weights, neg_inf=neg_inf, backend=backend)
    assert fused.tolist() == [expected]
    assert not log_probs.isnan().any()
    if kernel_id in GPU_KERNELS:
        return
    for grad in torch.autograd.grad(log_probs[0, 5], [*sources, weights]):
        assert grad.isfinite().all()


@pytest.mark.on_gpus
@pytest.mark.parametrize("neg_inf", ["mask", "floor", "zero"])
@pytest.mark.parametrize("anchor", [0, 2])
def test_minus_infinity_everywhere_against_the_reference(backend, kernel_id, neg_inf, anchor):
    sources = [torch.randn(6, 600, dtype=torch.float64) for _ in range(3)]
    for source in sources:
        source[torch.rand(6, 600) < 0.2] = -INF
    weights = torch.randn(6, 3, dtype=torch.float64)
    op, _, _ = fuse(dict(weights=[], neg_inf=neg_inf, anchor=anchor), out="log_probs")
    tensors = [*sources, weights, torch.ones(6, dtype=torch.float64)]
    check(on_gpu(kernel_id, op), tensors, backend, backward=kernel_id not in GPU_KERNELS)


@pytest.mark.with_reference
@pytest.mark.on_gpus
@pytest.mark.parametrize("mode", ["linear", "mixture"])
def test_broken_and_empty_rows(backend, kernel_id, mode):
    good = torch.zeros(5, 4)
    other = torch.zeros(5, 4)
    other[0, 1], other[1, 2], other[2] = NAN, INF, -INF
    weights = torch.full((5, 2), 0.5)
    weights[3, 1] = 0.0  # a source of weight zero is not read
    other[3] = NAN
    temperature = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0])
    leaves = [tensor.requires_grad_(kernel_id not in GPU_KERNELS) for tensor in (good, other, weights)]
    arguments = dict(mode=mode, temperature=temperature, backend=backend)
    log_probs = fuse_logits(leaves[:2], leaves[2], **arguments)
    # a mixture goes on with the sources that have a token
    empty = torch.full((4,), -INF) if mode == "linear" else torch.full((4,), 0.25).log()
    assert log_probs[[0, 1, 4]].isnan().all()
    torch.testing.assert_close(log_probs[2], empty)
    torch.testing.assert_close(log_probs[3], torch.full((4,), 0.25).log())
    probs = fuse_logits(leaves[:2], leaves[2], out="probs", **arguments)
    torch.testing.assert_close(probs[2].sum().item(), 0.0 if mode == "linear" else 1.0)
    ids = torch.arange(5)
    for out in ("argmax", "sample"):
        tokens = fuse_logits(leaves[:2], leaves[2], out=out, request_ids=ids, seed=0, **arguments)
        assert tokens.dtype == torch.int64
        assert tokens[[0, 1, 4]].tolist() == [-1] * 3 and (tokens[2] == -1) == (mode == "linear") and tokens[3] >= 0
    if kernel_id in GPU_KERNELS:
        return
    grads = torch.autograd.grad(log_probs[:, 0].nan_to_num(neginf=0).sum(), leaves)
    for grad in grads:
        assert grad.isfinite().all() and not grad[[0, 1, 4]].any()


@pytest.mark.with_reference
@pytest.mark.on_gpus
@pytest.mark.parametrize("broken", [NAN, INF])
@pytest.mark.parametrize("kept", [dict(top_k=2), dict(top_p=0.9), dict(min_p=0.1)], ids=str)
def test_a_broken_row_stays_alone_under_a_filter(backend, kernel_id, broken, kept):
    if kernel_id in GPU_KERNELS and "min_p" not in kept:
        pytest.skip("filters of min_p alone")
    sources = [torch.randn(2, 10), torch.randn(2, 10)]
    expected = fuse_logits(sources, [1.0, -0.5], mask=TokenFilter(**kept), backend=backend)[1]
    sources[0][0, 3] = broken
    log_probs = fuse_logits(sources, [1.0, -0.5], mask=TokenFilter(**kept), backend=backend)
    assert log_probs[0].isnan().all() and torch.equal(log_probs[1], expected)


@pytest.mark.with_reference
@pytest.mark.on_gpus
def test_only_tokens_have_a_limit_at_temperature_zero(backend):
    logits, temperature = torch.tensor([[1.0, 3.0, 2.0]] * 2), torch.tensor([0.0, 1.0])
    for out in RESULTS:
        assert fuse_logits([logits], [1.0], temperature=temperature, out=out, backend=backend).isnan().tolist() == [
            [True] * 3,
            [False] * 3,
        ]
    tokens = fuse_logits([logits], [1.0], temperature=temperature, out="argmax", backend=backend)
    assert tokens.tolist() == [1, 1]


@pytest.mark.with_reference
@pytest.mark.on_gpus
def test_outside_the_mask_the_others_are_not_read(backend):
    anchor = torch.tensor([[9.0, 8.9, 0.0]])
    other = torch.tensor([[1.0, 2.0, NAN]])
    fused = fuse_logits([anchor, other], [2.0, -1.0], mask=TokenFilter(min_p=0.5), out="logits", backend=backend)
    torch.testing.assert_close(fused, torch.tensor([[17.0, 15.8, -INF]]))


# ties stay or go together; the reference is the rule, Python's sort its oracle
@given(
    values=st.lists(st.sampled_from([-50.0, -2.0, -1.0, 0.0, 1.0, 2.5]), min_size=1, max_size=12),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([1.0, 0.93, 0.51, 0.17]),
    min_p=st.sampled_from([0.0, 0.3]),
    min_keep=st.integers(1, 4),
)
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.with_reference
def test_filters_keep_what_their_rule_says(backend, values, top_k, top_p, min_p, min_keep):
    keep = TokenFilter(top_k, top_p, min_p, min_keep)
    row = torch.tensor([values], dtype=torch.float64)
    fused = fuse_logits([row], [1.0], keep=keep, out="logits", backend=backend)
    ranked = sorted(values, reverse=True)
    bound = ranked[top_k - 1] if 0 < top_k < len(values) else -INF
    left = [value for value in ranked if value >= bound]
    total = sum(map(math.exp, left))
    for value in left:
        if sum(math.exp(other) for other in left if other > value) < top_p * total:
            nucleus = value
    bound = max(bound, nucleus) if top_p < 1 else bound
    bound = max(bound, ranked[0] + math.log(min_p)) if min_p else bound
    bound = min(bound, ranked[min(min_keep, len(ranked)) - 1])
    assert (fused > -INF).tolist() == [[value >= bound for value in values]]


@pytest.mark.on_gpus
def test_one_hot_weights_choose_a_source(backend):
    sources = [torch.randn(3, 40) for _ in range(3)]
    fused = fuse_logits(sources, torch.eye(3), out="logits", backend=backend)
    assert torch.equal(fused, torch.stack([source[k] for k, source in enumerate(sources)]))


@pytest.mark.on_gpus
def test_constants_of_the_sources_cancel(backend):
    sources = [torch.randn(3, 600, dtype=torch.float64) for _ in range(3)]
    shifted = [source + 10 * torch.randn(3, 1, dtype=torch.float64) for source in sources]
    expected, actual = (fuse_logits(each, [1.0, 1.5, -1.5], backend=backend) for each in (sources, shifted))
    assert_close_to_reference(actual, expected, expected)


@pytest.mark.on_gpus
def test_rows_of_one_tensor(backend, kernel_id):
    logits = torch.randn(5, 300, requires_grad=kernel_id not in GPU_KERNELS)
    rows = torch.tensor([[0, 4], [1, 4], [3, 3]])
    pair = [logits[rows[:, 0]], logits[rows[:, 1]]]
    expected = fuse_logits(pair, [3.0, -2.0], backend=backend)
    assert torch.equal(fuse_logits(logits.detach(), [3.0, -2.0], rows=rows, backend=backend), expected)
    if kernel_id in GPU_KERNELS:
        return
    actual = fuse_logits(logits, [3.0, -2.0], rows=rows, backend=backend)
    for grads in zip(*(torch.autograd.grad(each.square().sum(), logits) for each in (actual, expected)), strict=True):
        assert torch.equal(*grads)


@pytest.mark.on_gpus
def test_a_row_has_the_same_bits_in_any_batch(backend, kernel_id, threads, monkeypatch):
    if kernel_id in GPU_KERNELS and threads > 1:
        pytest.skip("threads are the CPU's")
    if backend == "triton":  # one program for each tile of a row alone, one for several in a batch
        from moe_kernels.ops.logit_fusion import triton

        monkeypatch.setattr(triton, "PROGRAMS", 4)
        monkeypatch.setattr(triton, "FINISHED_TILES", 1)
    keep = TokenFilter(min_p=0.05) if kernel_id in GPU_KERNELS else TokenFilter(top_p=0.9)
    sources = [torch.randn(9, 1300).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    ids = torch.arange(9)
    for out in ("log_probs", "probs", "argmax", "sample"):
        arguments = dict(out=out, request_ids=ids, seed=3, keep=keep, backend=backend)
        whole = fuse_logits(sources, [2.0, -1.0], **arguments)
        wide = [strided(sources[0]), torch.nn.functional.pad(sources[1], (0, 5))[:, :1300]]
        assert torch.equal(fuse_logits(wide, [2.0, -1.0], **arguments), whole)
        for row in range(9):
            arguments["request_ids"] = ids[row : row + 1]
            alone = fuse_logits([source[row : row + 1] for source in sources], [2.0, -1.0], **arguments)
            assert torch.equal(alone, whole[row : row + 1])


# an equal share each: the exponentials are exact, so kernel and reference see the same sums
@pytest.mark.on_gpus
@pytest.mark.parametrize("vocab_size", [1, 5, 512, 513, 4000])
def test_draws_are_the_references(backend, kernel_id, vocab_size):
    num_rows = {"native-ptx": 5, "triton-ptx": 5, "triton-cpu": 50, "native-simt": 50}.get(kernel_id, 500)
    logits = torch.zeros(num_rows, vocab_size)
    logits[:, 1::3] = -INF
    arguments = dict(out="sample", request_ids=torch.arange(num_rows) * 2**30 - 5, seed=2**32 - 7, step=11)
    tokens = fuse_logits([logits], [1.0], **arguments, backend=backend)
    assert torch.equal(tokens, fuse_logits([logits], [1.0], **arguments, backend="reference"))
    assert (logits.gather(1, tokens[:, None]) == 0).all()


@pytest.mark.on_gpus
@pytest.mark.parametrize("name", ["emulated_fine_tuning", "masked", "mixture", "filtered"])
def test_draws_in_float64_are_the_references(backend, kernel_id, name):
    fusion = (GPU_FUSIONS if kernel_id in GPU_KERNELS else FUSIONS)[name]
    num_rows, vocab_size = (300, 800) if kernel_id not in SLOW else (3, 1800) if "ptx" in kernel_id else (40, 1800)
    op, _, _ = fuse(fusion, out="sample", request_ids=torch.arange(num_rows), seed=1)
    tensors = inputs(fusion, num_rows, vocab_size, torch.float64)
    assert torch.equal(op(*tensors, backend=backend), op(*tensors, backend="reference"))


@pytest.mark.on_gpus
def test_argmax_is_the_references(backend, kernel_id):
    num_rows, vocab_size = (50, 700) if kernel_id not in SLOW else (2, 1100) if "ptx" in kernel_id else (10, 2100)
    for name, fusion in (GPU_FUSIONS if kernel_id in GPU_KERNELS else FUSIONS).items():
        op, _, _ = fuse(fusion, out="argmax")
        # no integers: two sums that tie may be rounded apart
        tensors = inputs(fusion, num_rows, vocab_size, torch.float64)
        assert torch.equal(op(*tensors, backend=backend), op(*tensors, backend="reference")), name


@pytest.mark.on_gpus
def test_draws_follow_the_distribution(backend, kernel_id):
    if kernel_id in (*SLOW, "native-simt"):
        pytest.skip("an interpreter takes minutes")
    num_draws, vocab_size = 20_000, 600
    row = 2 * torch.randn(vocab_size)
    probs = row.double().softmax(0)
    tokens = fuse_logits(
        [row.expand(num_draws, -1)], [1.0], out="sample", request_ids=torch.arange(num_draws), seed=5, backend=backend
    )
    common = probs * num_draws > 20
    expected = torch.cat([probs[common], probs[~common].sum()[None]]) * num_draws
    counts = torch.bincount(tokens, minlength=vocab_size)
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    freedom = expected.numel() - 1
    # chi-squared: 5 standard deviations above its mean
    assert ((counts - expected).square() / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.with_reference
@pytest.mark.on_gpus
def test_a_draw_depends_on_seed_request_and_step_alone(backend, kernel_id):
    num_rows = 20 if kernel_id in SLOW else 200
    logits = torch.randn(num_rows, 50).repeat(2, 1)
    ids = torch.arange(num_rows).repeat(2)
    arguments = dict(out="sample", request_ids=ids, backend=backend)
    tokens = fuse_logits([logits], [1.0], seed=1, step=2, **arguments)
    assert torch.equal(tokens[:num_rows], tokens[num_rows:])
    for other in (dict(seed=2, step=2), dict(seed=1, step=3)):
        assert (fuse_logits([logits], [1.0], **other, **arguments) != tokens).any()
    greedy = fuse_logits([logits], [1.0], seed=1, temperature=0.0, **arguments)
    assert torch.equal(greedy, logits.argmax(1))


@pytest.mark.with_reference
@pytest.mark.on_gpus
def test_a_token_without_probability_is_never_drawn(backend, kernel_id):
    # the uniforms nearest to 1 of two million: sums that are rounded otherwise than their parts end before them
    ids = torch.arange(2**21)
    num_rows = 3 if kernel_id.endswith("ptx") else 50
    ids = ids[reference.uniforms(ids, 3, 0).topk(num_rows).indices]
    logits = 3 * torch.randn(num_rows, 1600)
    logits[:, 900:] = -INF
    logits[:, 800:900] = -120  # too small for float32 beside the largest
    tokens = fuse_logits([logits], [1.0], out="sample", request_ids=ids, seed=3, backend=backend)
    assert (tokens < 800).all()


@pytest.mark.on_gpus
@pytest.mark.parametrize("out", ["log_probs", "argmax", "sample"])
def test_no_rows(backend, kernel_id, out):
    sources = [torch.randn(0, 8, requires_grad=kernel_id not in GPU_KERNELS)]
    ids = torch.zeros(0, dtype=torch.int64)
    fused = fuse_logits(sources, [1.0], out=out, request_ids=ids, seed=0, backend=backend)
    assert fused.shape[0] == 0
    if out == "log_probs" and kernel_id not in GPU_KERNELS:
        fused.sum().backward()
        assert sources[0].grad.shape == (0, 8)


def test_bad_input():
    a, b = torch.randn(2, 10), torch.randn(2, 10)
    ids = torch.arange(2)
    for sources, weights, arguments, message in [
        ([], [], {}, "sources must be at least one tensor, got none"),
        ([a, b[:1]], [1, 1], {}, r"sources\[1\] must be of shape \[num_rows=2, vocab_size >= 1\], got \[1, 10\]"),
        (
            [a, torch.randn(2, 300)],
            [1, 1],
            {},
            r"sources\[0\] must be at most 256 tokens short of the largest vocabulary, 300, got 10; .* give vocab=",
        ),
        ([a, b], [1, 1], dict(vocab=11), r"vocab must be in \[1, 10\], the vocabulary of sources\[0\], got 11"),
        ([a, b], [1, 1, 1], {}, r"weights must be of shape \[num_sources=2\] or"),
        ([a, b], [1, 1], dict(mode="product"), "mode must be one of linear, mixture, got 'product'"),
        ([a, b], [1, 1], dict(neg_inf="nan"), "neg_inf must be one of mask, floor, zero"),
        ([a, b], [1, 1], dict(out="token"), "out must be one of logits, log_probs"),
        ([a, b], [1, 1], dict(anchor=2), r"anchor must be in \[0, num_sources=2\), got 2"),
        ([a, b], [1, 1], dict(temperature=0.0), "temperature must be above 0; out='argmax' is the limit at 0, got 0.0"),
        ([a, b], [1, 1], dict(temperature=1e-46), "temperature must be between 1.18e-38 and 3.4e.38, the numbers of"),
        ([a, b], [1, 1], dict(temperature=float("inf")), "temperature must be between .*, got inf"),
        ([a, b], [1, 1], dict(temperature=torch.ones(3)), r"temperature must be of shape \[num_rows=2\]"),
        ([a, b], [1, 1], dict(out="sample", seed=1), "request_ids must be given for out='sample'"),
        ([a, b], [1, 1], dict(out="sample", request_ids=ids), "seed must be given for out='sample'"),
        ([a, b], [1, 1], dict(out="sample", request_ids=ids, seed=-1), r"seed must be in \[0, 2\*\*32\), got -1"),
        ([a, b], [1, 1], dict(rows=ids[:, None]), "sources must be one tensor where rows are given, got 2 tensors"),
        (a, [1.0], dict(rows=ids), r"rows must be of shape \[num_rows, num_sources >= 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            fuse_logits(sources, weights, **arguments)
    with pytest.raises(TypeError, match=r"sources\[1\] must be float64 like all others or none, got torch.float32"):
        fuse_logits([a.double(), b], [1, 1])
    with pytest.raises(TypeError, match=r"sources\[1\] must be one of torch.float32"):
        fuse_logits([a, b.long()], [1, 1])
    with pytest.raises(ValueError, match=r"TokenFilter: top_p must be in \(0, 1\], got 0"):
        TokenFilter(top_p=0)
    with pytest.raises(ValueError, match="TokenFilter: top_k must be at least 0, got -1"):
        TokenFilter(top_k=-1)


@pytest.mark.on_gpus
def test_rows_outside_are_refused(backend, raises_in_kernel):
    if not raises_in_kernel:  # a GPU has nobody to tell
        rows = torch.tensor([[0, 3], [0, 2], [-1, 0]])
        fused = fuse_logits(torch.randn(3, 8), [1.0, 1.0], rows=rows, backend=backend)
        assert fused.isnan().all(1).tolist() == [True, False, True]
        return
    with pytest.raises(RuntimeError, match=r"rows must be in \[0, 3\), got 3"):
        fuse_logits(torch.randn(3, 8), [1.0], rows=torch.tensor([[3]]), backend=backend)


def test_registration(backend):
    sources = [torch.randn(3, 9), torch.randn(3, 9).bfloat16()]
    weights, temperature = torch.tensor([[1.5, -0.5]] * 3), torch.ones(3)
    filters = ([], [], [4.0, 1.0, 0.0, 1.0])
    arguments = (sources, None, weights, temperature, torch.arange(3), 1, 2, 9, False, 0, 0, *filters)
    for out in (1, 4):
        torch.library.opcheck(native.fuse_logits, (*arguments, out))
    fused, stats = native.fuse_logits(*arguments, 1)
    torch.library.opcheck(
        native.fuse_logits_backward, (fused, fused, sources, weights, temperature, stats, False, 0, 0, 1)
    )


def test_compile(backend):
    compiled = torch.compile(
        lambda a, b, w: fuse_logits([a, b], w, keep=TokenFilter(top_k=5), backend=backend), fullgraph=True, dynamic=True
    )
    for num_rows in (3, 5):
        tensors = [torch.randn(num_rows, 40, requires_grad=True) for _ in range(2)]
        weights = torch.tensor([2.0, -1.0], requires_grad=True)
        results = []
        for op in (compiled, lambda a, b, w: fuse_logits([a, b], w, keep=TokenFilter(top_k=5), backend=backend)):
            log_probs = op(*tensors, weights)
            inner = log_probs.masked_fill(log_probs.isinf(), 0).square().sum()
            results.append((log_probs, *torch.autograd.grad(inner, [*tensors, weights])))
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.with_reference
def test_weights_in_a_list_have_gradients(backend):
    sources, alpha = list(torch.randn(2, 3, 40)), torch.tensor(0.3, requires_grad=True)
    (grad,) = torch.autograd.grad(fuse_logits(sources, [1.0, alpha], backend=backend)[:, 0].sum(), alpha)
    weights = torch.tensor([1.0, 0.3], requires_grad=True)
    (expected,) = torch.autograd.grad(fuse_logits(sources, weights, backend=backend)[:, 0].sum(), weights)
    assert torch.equal(grad, expected[1])


@pytest.mark.on_gpus
def test_what_gpus_do_not_do(backend, kernel_id):
    if kernel_id == "native-cpu":
        pytest.skip("the CPU does it")
    logits, nucleus = torch.randn(2, 9), TokenFilter(top_p=0.9)
    # on CPU tensors the CUDA op itself refuses
    error = RuntimeError if kernel_id in ("native-simt", "native-ptx") else ValueError
    for name in ("mask", "floor", "keep"):
        with pytest.raises(error, match=f"{name} must be of min_p alone .*; use backend='reference'"):
            fuse_logits([logits], [1.0], **{name: nucleus}, backend=backend)
    if backend == "native":
        with pytest.raises(error, match="at most 16 .*in CUDA"):
            fuse_logits([logits] * 17, [1.0] * 17, backend=backend)
    if kernel_id.endswith("cuda") or backend == "triton":
        with pytest.raises(RuntimeError, match="fuse_logits with gradients has no .* kernels yet"):
            fuse_logits([logits.requires_grad_()], [1.0], backend=backend)


@pytest.mark.with_reference
@pytest.mark.on_gpus
@pytest.mark.parametrize(
    "keep",
    [None, TokenFilter(top_p=0.9), TokenFilter(top_k=2), TokenFilter(min_p=0.1)],
    ids=["all", "top_p", "top_k", "min_p"],
)
def test_a_sum_that_overflows_breaks_its_row(backend, kernel_id, keep):
    if kernel_id in GPU_KERNELS and keep is not None and keep.min_p == 0:
        pytest.skip("filters of min_p alone")
    first = torch.randn(3, 600)
    first[1, 550] = 3e38
    sources = [first, first.clone()]
    for out in ("logits", "log_probs", "probs"):
        fused = fuse_logits(sources, [1.0, 1.0], keep=keep, out=out, backend=backend)
        assert fused[1].isnan().all() and not fused[[0, 2]].isnan().any()
    assert fuse_logits(sources, [1.0, 1.0], keep=keep, out="argmax", backend=backend)[1] == -1
    ids = torch.arange(3)
    assert fuse_logits(sources, [1.0, 1.0], keep=keep, out="sample", request_ids=ids, seed=1, backend=backend)[1] == -1
    if kernel_id in GPU_KERNELS:
        return
    weights = torch.ones(3, 2, requires_grad=True)
    fused = fuse_logits(sources, weights, keep=keep, out="probs", backend=backend)
    assert torch.autograd.grad(fused[[0, 2], 0].sum(), weights)[0][[0, 2]].isfinite().all()
