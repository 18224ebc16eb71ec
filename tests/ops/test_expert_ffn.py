"""expert_ffn: forward, backward, edges, memory, registration, compile."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moe_kernels import Activation, expert_ffn, grouped_gemm, permute, plan_dispatch, prepack, unpermute
from moe_kernels.ops.expert_ffn import native
from moe_kernels.testing import assert_close_to_reference, random_routing
from tests.ops.helpers import (
    DTYPES,
    LOW_DTYPES,
    SLOW,
    check,
    check_exact,
    leaf,
    run,
    seeded,
    small_integers,
    strided,
    to_double,
)

GPU_KERNELS = ["triton-cpu", "triton-ptx", "triton-cuda"]
OP = "expert_ffn"

# every kind; gated and not; limits so tight that most values are clamped
ACTIVATIONS = {
    "silu": Activation(),
    "gelu": Activation("gelu"),
    "gelu_tanh": Activation("gelu_tanh"),
    "relu": Activation("relu"),
    "relu2": Activation("relu2"),
    "silu_ungated": Activation(gated=False),
    "relu2_ungated": Activation("relu2", gated=False),
    "gpt_oss": Activation.gpt_oss(),
    "gpt_oss_tight": Activation.gpt_oss(limit=0.5),
    "clamped_swiglu": Activation.clamped_swiglu(0.7),
    "swiglu_step": Activation.swiglu_step(0.3),
}


@dataclass
class Layer:
    """Arguments of expert_ffn; ``tensors`` are those with gradients, in the order of ``call``."""

    num_tokens: int = 37
    hidden_size: int = 40
    intermediate_size: int = 24
    num_experts: int = 5
    top_k: int = 2
    dtype: torch.dtype = torch.float32
    activation: Activation = Activation()
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    skip: float = 0.15
    seed: int = 0

    def __post_init__(self):
        generator = seeded(self.seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        gate_up_size = self.intermediate_size * (2 if self.activation.gated else 1)
        self.topk_ids, weights = random_routing(
            self.num_tokens, self.num_experts, self.top_k, skip=self.skip, seed=self.seed
        )
        gate_up = randn(self.num_experts, gate_up_size, self.hidden_size) * self.hidden_size**-0.5
        down = randn(self.num_experts, self.hidden_size, self.intermediate_size) * self.intermediate_size**-0.5
        if self.transposed:
            gate_up, down = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (gate_up, down))
        tensors = [
            randn(self.num_tokens, self.hidden_size),
            weights.double(),
            gate_up,
            down,
            randn(self.num_experts, gate_up_size) if self.bias else None,
            randn(self.num_experts, self.hidden_size) if self.bias else None,
        ]
        self.tensors = [None if tensor is None else tensor.to(self.dtype) for tensor in tensors]

    def call(self, hidden_states, topk_weights, gate_up_proj, down_proj, gate_up_bias, down_bias, *, backend="auto"):
        return expert_ffn(
            hidden_states,
            self.topk_ids,
            topk_weights,
            gate_up_proj,
            down_proj,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            activation=self.activation,
            interleaved=self.interleaved,
            backend=backend,
        )

    @property
    def smooth(self) -> bool:
        """Whether the gradient is continuous: at a clamp or at relu's kink a rounding of the pre-activation moves the
        gradient by more than any rounding unit, in every implementation, so low precision has nothing to compare."""
        return self.activation.limit == float("inf") and self.activation.kind != "relu"


# (hidden_size, intermediate_size): odd and tiny; one below, at, above the 32-element step and the 64-column panel;
# past the 256-column block and the 256-step chunk
SIZES = [(1, 1), (5, 3), (31, 33), (64, 32), (65, 63), (72, 290), (530, 17)]


@pytest.mark.on_gpus
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("layout", ["packed", "interleaved", "transposed", "transposed_interleaved"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(backend, kernel_id, dtype, layout, sizes):
    slow_double = dtype == torch.float64 and (kernel_id == "triton-ptx" or sizes != (5, 3))
    if kernel_id in SLOW and (sizes not in [(5, 3), (72, 290)] or slow_double):
        pytest.skip("seconds each; the cases that stay run the same kernels")
    layer = Layer(
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        dtype=dtype,
        interleaved="interleaved" in layout,
        transposed="transposed" in layout,
        bias="interleaved" in layout,
    )
    check(layer.call, layer.tensors, backend)


@pytest.mark.on_gpus
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(backend, kernel_id, dtype, interleaved, name):
    if kernel_id in SLOW and (interleaved or dtype != torch.float32):
        pytest.skip("seconds each; the cases that stay run the same code")
    activation = ACTIVATIONS[name]
    layer = Layer(dtype=dtype, activation=activation, interleaved=interleaved and activation.gated, bias=True)
    exact = dtype in (torch.float32, torch.float64)
    check(layer.call, layer.tensors, backend, backward=exact or layer.smooth)


@given(
    num_tokens=st.integers(0, 40),
    hidden_size=st.integers(1, 80),
    intermediate_size=st.integers(1, 80),
    num_experts=st.integers(1, 6),
    top_k=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    gated=st.booleans(),
    interleaved=st.booleans(),
    transposed=st.booleans(),
    bias=st.booleans(),
    skip=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=100)
def test_any_layer(num_experts, top_k, gated, interleaved, seed, **arguments):
    layer = Layer(
        num_experts=num_experts,
        top_k=min(top_k, num_experts),
        activation=Activation("relu", gated=gated),
        interleaved=gated and interleaved,
        seed=seed,
        **arguments,
    )
    generator = seeded(seed)
    tensors = [None if tensor is None else small_integers(tensor, generator) for tensor in layer.tensors]
    check_exact(layer.call, tensors, "native")


# all to one expert (more rows than one task and one chunk take), one token an expert, one token
@pytest.mark.on_gpus
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(700, 1, 1), (6, 6, 1), (1, 8, 8)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", LOW_DTYPES)
def test_distributions(backend, dtype, transposed, num_tokens, num_experts, top_k):
    layer = Layer(num_tokens, num_experts=num_experts, top_k=top_k, dtype=dtype, transposed=transposed, skip=0)
    check(layer.call, layer.tensors, backend)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu2_ungated", "gpt_oss_tight", "swiglu_step"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(backend, name, interleaved):
    activation = ACTIVATIONS[name]
    layer = Layer(
        4, 3, 2, 3, 2, torch.float64, activation, interleaved=interleaved and activation.gated, bias=True, seed=3
    )
    tensors = [tensor.requires_grad_() for tensor in layer.tensors]
    assert torch.autograd.gradcheck(lambda *t: layer.call(*t, backend=backend), tensors)


@pytest.mark.on_gpus
@pytest.mark.parametrize("weights_dtype", DTYPES)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_routing_dtypes(backend, weights_dtype, id_dtype):
    layer = Layer(dtype=torch.bfloat16)
    layer.topk_ids = layer.topk_ids.to(id_dtype)
    layer.tensors[1] = layer.tensors[1].to(weights_dtype)
    check(layer.call, layer.tensors, backend)


@pytest.mark.on_gpus
@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_token_has_the_same_bits_alone_and_among_others(backend, dtype, transposed):
    layer = Layer(num_tokens=61, hidden_size=130, intermediate_size=70, dtype=dtype, transposed=transposed, bias=True)
    results = {}
    for size in (61, 7, 1):
        part = [layer.tensors[0][:size].clone().requires_grad_(), layer.tensors[1][:size].clone().requires_grad_()]
        alone = replace(layer, num_tokens=size)
        alone.topk_ids = layer.topk_ids[:size]
        out = alone.call(*part, *layer.tensors[2:], backend=backend)
        results[size] = [out, *torch.autograd.grad(out.float().square().sum(), part)]
    for size in (7, 1):
        for few, many in zip(results[size], results[61], strict=True):
            assert torch.equal(few, many[:size])


def test_denormals_have_the_same_bits_in_any_batch(backend):
    # blocks of columns depend on the batch; a row's vectors and its tail must round alike
    layer = Layer(1200, 256, 16, 1, 1, torch.bfloat16, skip=0)
    tensors = [layer.tensors[0], torch.full((1200, 1), 1e-39), *layer.tensors[2:]]
    many = layer.call(*tensors, backend=backend)
    few = replace(layer, num_tokens=8)
    assert torch.equal(few.call(tensors[0][:8], tensors[1][:8], *tensors[2:], backend=backend), many[:8])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_same_bits_with_one_and_two_threads(backend, dtype, transposed):
    layer = Layer(num_tokens=90, hidden_size=300, intermediate_size=290, dtype=dtype, transposed=transposed, bias=True)
    grad_out = torch.randn(90, 300).to(dtype)
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        out, grads = run(layer.call, layer.tensors, backend, grad_out)
        results.append([out, *grads])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["silu", "gpt_oss_tight", "relu2_ungated"])
def test_prepacked_gives_the_same_bits(dtype, interleaved, bias, name):
    activation = ACTIVATIONS[name]
    interleaved = interleaved and activation.gated
    for sizes in SIZES:
        layer = Layer(13, *sizes, dtype=dtype, activation=activation, interleaved=interleaved, bias=bias)
        hidden_states, topk_weights, gate_up, down, *biases = layer.tensors
        packed = prepack(gate_up, num_splits=2 if activation.gated else 1, interleaved=interleaved), prepack(down)
        assert torch.equal(
            layer.call(hidden_states, topk_weights, *packed, *biases),
            layer.call(hidden_states, topk_weights, gate_up, down, *biases),
        )


@pytest.mark.on_gpus
def test_equals_the_unfused_path(backend, kernel_id):
    if kernel_id == "triton-ptx":
        pytest.skip("the bench reads no float64 products")
    layer = Layer(dtype=torch.float64, skip=0.3)
    x, topk_weights, gate_up, down, _, _ = layer.tensors
    plan = plan_dispatch(layer.topk_ids, layer.num_experts)
    h = grouped_gemm(permute(x, plan), gate_up, plan.expert_offsets)
    y = grouped_gemm(layer.activation(*h.chunk(2, 1)), down, plan.expert_offsets)
    torch.testing.assert_close(layer.call(*layer.tensors, backend=backend), unpermute(y, plan, topk_weights))


@pytest.mark.on_gpus
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(0, 2, 3), (4, 0, 3), (0, 0, 0), (4, 0, 0)])
def test_empty(backend, num_tokens, top_k, num_experts):
    x = torch.randn(num_tokens, 8, requires_grad=True)
    weights = [torch.randn(num_experts, 6, 8, requires_grad=True), torch.randn(num_experts, 8, 3, requires_grad=True)]
    ids = torch.zeros(num_tokens, top_k, dtype=torch.int32)
    out = expert_ffn(x, ids, torch.ones(num_tokens, top_k), *weights, backend=backend)
    assert torch.equal(out, torch.zeros(num_tokens, 8))
    out.sum().backward()
    for tensor in (x, *weights):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.on_gpus
def test_skipped_pairs_are_zero_even_beside_nan(backend):
    layer = Layer(num_tokens=3, skip=0)
    layer.topk_ids = torch.tensor([[0, 1], [-1, 99], [1, -1]], dtype=torch.int32)
    tensors = [None if t is None else t.clone() for t in layer.tensors]
    tensors[0][1] = torch.nan
    tensors[1][1] = torch.nan
    tensors[1][2, 1] = torch.nan
    out, (grad_x, grad_weights, *grad_experts) = run(layer.call, tensors, backend, torch.ones(3, layer.hidden_size))
    assert torch.equal(out[1], torch.zeros(layer.hidden_size)) and out.isfinite().all()
    assert torch.equal(grad_x[1], torch.zeros(layer.hidden_size)) and grad_x.isfinite().all()
    assert torch.equal(grad_weights[1], torch.zeros(2)) and grad_weights[2, 1] == 0
    assert all(grad.isfinite().all() for grad in grad_experts)
    for grad in grad_experts:  # experts without tokens
        assert torch.equal(grad[2:], torch.zeros_like(grad[2:]))


@pytest.mark.on_gpus
def test_nan_stays_in_its_token(backend):
    layer = Layer(skip=0)
    tensors = [None if t is None else t.clone() for t in layer.tensors]
    tensors[0][5, 3] = torch.nan
    out, clean = (layer.call(*t, backend=backend) for t in (tensors, layer.tensors))
    assert out[5].isnan().all()
    others = torch.arange(layer.num_tokens) != 5
    assert torch.equal(out[others], clean[others])


@pytest.mark.on_gpus
def test_strides(backend):
    layer = Layer(dtype=torch.bfloat16, bias=True)
    expected = layer.call(*layer.tensors, backend=backend)
    assert torch.equal(layer.call(*(strided(tensor) for tensor in layer.tensors), backend=backend), expected)
    ids = layer.topk_ids
    layer.topk_ids = strided(ids)
    assert torch.equal(layer.call(*layer.tensors, backend=backend), expected)
    out = layer.call(*(tensor.requires_grad_() for tensor in layer.tensors), backend=backend)
    assert torch.autograd.grad(out.sum(), layer.tensors[0])[0].isfinite().all()  # the gradient has strides of zero


def saved_bytes(layer: Layer, needs_grad: list[bool]) -> int:
    saved = {}
    tensors = [
        t if t is None else t.detach().requires_grad_(need) for t, need in zip(layer.tensors, needs_grad, strict=True)
    ]
    parameters = {t.data_ptr() for t in tensors[2:] if t is not None}

    def keep(tensor):
        if tensor.data_ptr() not in parameters and tensor.is_floating_point():
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer.call(*tensors)
    return sum(saved.values())


def test_saved_memory_is_the_minimum():
    # 2 T d + 4 T K n bytes in bf16 (SonicMoE's count), and the routing weights
    layer = Layer(64, 48, 20, 8, 4, torch.bfloat16, skip=0)
    minimum = 2 * 64 * 48 + 4 * 64 * 4 * 20
    routing = 2 * 64 * 4
    everything = [True] * 4 + [False] * 2
    assert saved_bytes(layer, everything) == minimum + routing
    # frozen experts: the input is not kept
    assert saved_bytes(layer, [True, True, False, False, False, False]) == minimum - 2 * 64 * 48 + routing
    assert saved_bytes(layer, [False] * 6) == 0


def test_frozen_weights_get_no_gradient_computed():
    layer = Layer(bias=True)
    x = layer.tensors[0].requires_grad_()
    asked = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is native.expert_ffn_backward:
                asked.append(args[-6:])
            return function(*args, **(kwargs or {}))

    with Record():
        layer.call(*layer.tensors).sum().backward()
    assert asked == [(True, False, False, False, False, False)] and x.grad is not None


@pytest.mark.on_gpus
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_gradients_lie_as_the_weights_do(backend, transposed):
    layer = Layer(transposed=transposed)
    _, grads = run(layer.call, layer.tensors, backend, torch.randn(layer.num_tokens, layer.hidden_size))
    assert [grad.stride() for grad in grads[2:]] == [tensor.stride() for tensor in layer.tensors[2:4]]


def test_inputs_are_not_touched(backend):
    layer = Layer(dtype=torch.bfloat16, transposed=True, bias=True)
    before = [tensor.clone() for tensor in layer.tensors]
    run(layer.call, layer.tensors, backend, torch.randn(layer.num_tokens, layer.hidden_size))
    prepack(layer.tensors[2], num_splits=2)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(layer.tensors, before, strict=True))


def test_autocast(backend):
    layer = Layer(bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = run(layer.call, layer.tensors, backend, torch.ones(layer.num_tokens, layer.hidden_size))
    low = replace(layer, dtype=torch.bfloat16)
    low.tensors[1] = layer.tensors[1]
    assert torch.equal(out, low.call(*low.tensors, backend=backend)) and out.dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in grads)
    double = replace(layer, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # F.linear leaves float64 alone
        assert double.call(*double.tensors, backend=backend).dtype == torch.float64


@pytest.mark.on_gpus
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend, use_reentrant):
    layer = Layer()
    results = []
    for recompute in (False, True):
        tensors = [leaf(tensor) for tensor in layer.tensors]
        if recompute:
            out = checkpoint(lambda *t: layer.call(*t, backend=backend), *tensors, use_reentrant=use_reentrant)
        else:
            out = layer.call(*tensors, backend=backend)
        out.square().sum().backward()
        results.append([out, *(tensor.grad for tensor in tensors if tensor is not None)])
    for recomputed, plain in zip(*results, strict=True):
        assert torch.equal(recomputed, plain)


@pytest.mark.on_gpus
def test_double_backward_says_so(backend):
    layer = Layer()
    x = layer.tensors[0].requires_grad_()
    (grad,) = torch.autograd.grad(layer.call(*layer.tensors, backend=backend).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_bad_input():
    layer = Layer(bias=True)
    x, weights, gate_up, down, gate_up_bias, down_bias = layer.tensors
    ids, ungated = layer.topk_ids, Activation(gated=False)

    def call(x=x, ids=ids, weights=weights, gate_up=gate_up, down=down, **keywords):
        return expert_ffn(x, ids, weights, gate_up, down, **keywords)

    for arguments, error, message in [
        (dict(x=x[0]), ValueError, r"hidden_states must be of shape \[num_tokens, hidden_size\], got \[40\]"),
        (dict(x=x.long()), TypeError, "hidden_states must be one of"),
        (dict(x=[1]), TypeError, "hidden_states must be a torch.Tensor, got list"),
        (dict(ids=ids[:5]), ValueError, r"topk_ids must be of shape \[num_tokens=37, top_k\], got \[5, 2\]"),
        (dict(ids=ids.float()), TypeError, "topk_ids must be one of torch.int32, torch.int64"),
        (dict(weights=weights[:, :1]), ValueError, r"topk_weights must be of shape \[37, 2\] like topk_ids"),
        (dict(weights=weights.long()), TypeError, "topk_weights must be one of"),
        (dict(gate_up=gate_up.mT), ValueError, r"gate_up_proj must be of shape .* transposed weights are given as"),
        (dict(gate_up=gate_up[:, :47]), ValueError, "gate_up_proj must be of shape"),
        (dict(down=down.mT), ValueError, "down_proj must be of shape"),
        (dict(down=down[:4]), ValueError, "down_proj must be of shape"),
        (dict(gate_up=gate_up.bfloat16()), TypeError, "gate_up_proj must be torch.float32, got torch.bfloat16"),
        (dict(down=down.double()), TypeError, "down_proj must be torch.float32, got torch.float64"),
        (dict(gate_up_bias=gate_up_bias[:, :4]), ValueError, r"gate_up_bias must be of shape \[5, 48\], got \[5, 4\]"),
        (dict(down_bias=down_bias.half()), TypeError, "down_bias must be torch.float32"),
        (dict(activation=ungated), ValueError, "down_proj must be of shape"),
        (dict(gate_up=gate_up[:, :24], activation=ungated, interleaved=True), ValueError, "interleaved must be False"),
        (dict(down=prepack(down)), ValueError, "down_proj must be prepacked where gate_up_proj is"),
        (dict(gate_up=prepack(gate_up), down=prepack(down)), ValueError, "gate_up_proj must be prepacked with"),
        (dict(gate_up=gate_up.to("meta")), ValueError, "gate_up_proj must be on cpu like hidden_states, got meta"),
        (dict(down_bias=down_bias.to("meta")), ValueError, "down_bias must be on cpu like hidden_states, got meta"),
        (dict(gate_up_bias=gate_up_bias.to("meta")), ValueError, "gate_up_bias must be on cpu like hidden_states"),
        (dict(backend="cuda"), ValueError, "backend must be one of auto, reference, native, triton, got 'cuda'"),
    ]:  # fmt: skip
        with pytest.raises(error, match="expert_ffn: " + message):
            call(**arguments)
    with pytest.raises(ValueError, match="a plain tensor where a gradient is needed"):
        call(x=x.clone().requires_grad_(), gate_up=prepack(gate_up, num_splits=2), down=prepack(down))
    packed = dict(gate_up=prepack(gate_up, num_splits=2), down=prepack(down))
    for arguments in ({}, packed):
        with pytest.raises(RuntimeError, match="backend='triton' is unavailable"):
            call(backend="triton", **arguments)
    with pytest.raises(ValueError, match="must be a plain tensor for backend='reference', got prepacked weights"):
        call(backend="reference", **packed)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="hidden_states must be one of"):
        call(x=x.long())
    with pytest.raises(ValueError, match=r"num_tokens \* top_k must be below 2\*\*31"):
        expert_ffn(
            torch.zeros(1, 1).expand(2**16, 1),
            torch.zeros(1, 1, dtype=torch.int32).expand(2**16, 2**15),
            torch.zeros(1, 1).expand(2**16, 2**15),
            torch.zeros(1, 2, 1),
            torch.zeros(1, 1, 1),
        )


@pytest.mark.parametrize("transposed", [False, True])
def test_registration(backend, transposed):
    layer = Layer(transposed=transposed, bias=True)
    x, weights, gate_up, down, gate_up_bias, down_bias = layer.tensors
    arguments = (*layer.activation.kernel_arguments(), False)
    tensors = (x, layer.topk_ids, weights, gate_up, down, gate_up_bias, down_bias)
    torch.library.opcheck(native.expert_ffn, (*tensors, *arguments, tensors[3].shape[1], False))
    torch.library.opcheck(native.expert_ffn, (*tensors, *arguments, tensors[3].shape[1], True))
    grad_out, pre_activation = native.expert_ffn(*tensors, *arguments, tensors[3].shape[1], True)
    for asked in ([True] * 6, [True, False, False, True, False, False]):
        torch.library.opcheck(
            native.expert_ffn_backward,
            (grad_out, x, layer.topk_ids, weights, gate_up, down, down_bias, pre_activation, *arguments, *asked),
        )


@pytest.mark.on_gpus
@pytest.mark.parametrize("transposed", [False, True])
def test_compile(backend, kernel_id, transposed):
    if kernel_id == "triton-ptx":
        pytest.skip("minutes; what it runs is not compiled anew")
    layer = Layer(transposed=transposed, bias=True)
    experts = [tensor.requires_grad_() for tensor in layer.tensors[2:]]

    def call(x, ids, weights):
        return expert_ffn(x, ids, weights, *experts[:2], gate_up_bias=experts[2], down_bias=experts[3], backend=backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for num_tokens in (37, 12):
        x = layer.tensors[0][:num_tokens].detach().requires_grad_()
        ids, weights = layer.topk_ids[:num_tokens], layer.tensors[1][:num_tokens]
        results = [
            (out := op(x, ids, weights), *torch.autograd.grad(out.square().sum(), (x, *experts)))
            for op in (compiled, call)
        ]
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)
    with torch.no_grad():
        assert torch.equal(compiled(x, ids, weights), call(x, ids, weights))


def test_export(backend):
    layer = Layer(skip=0)
    _, weights, gate_up, down, _, _ = layer.tensors

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up, self.down = torch.nn.Parameter(gate_up), torch.nn.Parameter(down)

        def forward(self, x, ids, weights):
            return expert_ffn(x, ids, weights, self.gate_up, self.down, backend=backend)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    exported = torch.export.export(
        Module(), (layer.tensors[0], layer.topk_ids, weights), dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens})
    )
    few = layer.tensors[0][:5], layer.topk_ids[:5], weights[:5]
    assert torch.equal(exported.module()(*few), Module()(*few))


@pytest.mark.on_gpus
def test_large_values_follow_the_reference(backend):
    # beyond float16's range inside, and where exp overflows
    layer = Layer(dtype=torch.float16, skip=0)
    tensors = [None if t is None else t.clone() for t in layer.tensors]
    tensors[0] *= 300
    reference64 = layer.call(*[to_double(t) for t in tensors], backend="reference")
    actual = layer.call(*tensors, backend=backend)
    eager = layer.call(*tensors, backend="reference")
    fits = eager.isfinite()
    assert fits.any() and not fits.all()
    assert_close_to_reference(actual[fits], reference64[fits], eager[fits])
