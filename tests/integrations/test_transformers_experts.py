"""``experts_implementation="moe_kernels"`` against ``eager``, over every decorated class that is installed."""

import copy
import io

import pytest
import torch
from experts_zoo import HIDDEN_SIZE, NUM_EXPERTS, build, decorated_classes
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_kernels import _dispatch
from moe_kernels.integrations.transformers import IMPLEMENTATION, experts, experts_forward, fp8_experts_forward
from moe_kernels.integrations.transformers.gates import activation_kind, recognise
from moe_kernels.testing import assert_close_to_reference, random_routing

CLASSES = {str(experts_class): experts_class for experts_class in decorated_classes()}

#: classes of the installed transformers that no configuration of their own model builds, with the reason
NOT_BUILT: dict[str, str] = {}

#: classes that run as permute, grouped_gemm, their own functions, grouped_gemm, unpermute, with the reason
_UNFUSED = {
    "Inkling2Experts": "softcapped by tanh, which Activation does not have",
    "Inkling2LoopExperts": "softcapped by tanh, which Activation does not have",  # from transformers 5.24 on
    "MuseSparkExperts": "normalises each expert's output before the weights",
}
UNFUSED = {name: reason for name, reason in _UNFUSED.items() if name in CLASSES}

#: one class for each distinct (flags, gate): what compile, export, autocast and checkpointing can trip over. The other
#: classes share every line of code with one of these; that they do is what test_forward_backward shows.
DISTINCT = (
    "MixtralExperts",
    "AriaExperts",  # transposed
    "GptOssExperts",  # transposed, interleaved, biased, clamped
    "OpenAIPrivacyFilterExperts",  # transposed, biased, concatenated
    "NemotronHExperts",  # no gate, relu2
    "Gemma4TextExperts",  # tanh gelu
    "DeepseekV4Experts",
    "HYV4Experts",
    "MiniMaxM3VLExperts",
    "BeamExperts",
    "Lfm2MoeExperts",  # act_fn is a function
    *UNFUSED,
)

needs_kernels = pytest.mark.skipif(
    _dispatch.resolve("expert_ffn", "auto", "cpu") == "reference",
    reason="auto is the reference here (not built, or MOE_KERNELS_BACKEND), whose loop over experts cannot be traced",
)


def inputs(num_tokens: int = 9, top_k: int = 3, dtype: torch.dtype = torch.float32, skip: float = 0.0):
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator).to(dtype)
    topk_ids, topk_weights = random_routing(num_tokens, NUM_EXPERTS, top_k, skip=skip)
    return hidden_states, topk_ids.long(), topk_weights


def run(module: nn.Module, implementation: str, hidden_states, topk_ids, topk_weights) -> dict[str, torch.Tensor]:
    """The output, and every gradient of a weighted sum of it."""
    module.config._experts_implementation = implementation
    module.zero_grad()
    hidden_states = hidden_states.detach().clone().requires_grad_()
    topk_weights = topk_weights.detach().clone().requires_grad_()
    out = module(hidden_states, topk_ids, topk_weights)
    coefficients = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    (out * coefficients).sum().backward()
    results = {"out": out.detach(), "grad_hidden_states": hidden_states.grad, "grad_topk_weights": topk_weights.grad}
    for name, parameter in module.named_parameters():
        results[f"grad_{name.removeprefix('_orig_mod.')}"] = parameter.grad
    return results


def run64(module: nn.Module, hidden_states, topk_ids, topk_weights) -> dict[str, torch.Tensor]:
    """The oracle: transformers' own implementation in float64."""
    # these classes' eager forward rounds to float32 whatever the dtype; batched_mm is the same sum without
    eager_is_float32 = type(module).__name__ in ("OpenAIPrivacyFilterExperts", "Inkling2Experts")
    implementation = "batched_mm" if eager_is_float32 else "eager"
    module = copy.deepcopy(module).double()
    return run(module, implementation, hidden_states.double(), topk_ids, topk_weights.double())


def compare(module: nn.Module, hidden_states, topk_ids, topk_weights):
    reference64 = run64(module, hidden_states, topk_ids, topk_weights)
    eager = run(module, "eager", hidden_states, topk_ids, topk_weights)
    actual = run(module, IMPLEMENTATION, hidden_states, topk_ids, topk_weights)
    for name in reference64:
        assert_close_to_reference(actual[name], reference64[name], eager[name], name)


def test_registered():
    assert ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] is experts_forward
    assert ALL_FP8_EXPERTS_FUNCTIONS[IMPLEMENTATION] is fp8_experts_forward


def test_every_class_is_covered():
    failed = {}
    for name, experts_class in CLASSES.items():
        try:
            build(experts_class)
        except LookupError as error:
            failed[name] = str(error)
    assert failed.keys() == NOT_BUILT.keys(), failed
    assert set(DISTINCT) <= CLASSES.keys()


BUILT = sorted(CLASSES.keys() - NOT_BUILT.keys())


@pytest.mark.parametrize("name", BUILT)
def test_forward_backward(name):
    compare(build(CLASSES[name]), *inputs())


@pytest.mark.parametrize("name", BUILT)
def test_path(name):
    # a class that stops being recognised, or starts, is a change that somebody must look at
    assert (experts.fusable_gate(build(CLASSES[name])) is None) == (name in UNFUSED)


@pytest.mark.parametrize("name", sorted(set(BUILT) - UNFUSED.keys()))
def test_recognised_gate_equals_the_module(name):
    module = build(CLASSES[name])
    gate = recognise(module)
    size = 2 * 64 if module.has_gate else 64
    # 30 is three times the largest clamp there is
    pre_activation = 30 * torch.randn(128, size, generator=torch.Generator().manual_seed(3))
    own = module._apply_gate if module.has_gate else module.act_fn
    if not module.has_gate:
        halves = (pre_activation,)
    elif gate.interleaved:
        halves = (pre_activation[:, 0::2], pre_activation[:, 1::2])
    else:
        halves = pre_activation.chunk(2, dim=1)
    assert_close_to_reference(gate.activation(*halves), own(pre_activation.double()), own(pre_activation))
    if gate.activation.limit < float("inf"):
        assert (halves[0] > gate.activation.limit).any() and (halves[1] < -gate.activation.limit).any()


# one token: decode; top_k of 1 and of all experts
@pytest.mark.parametrize(("num_tokens", "top_k"), [(1, 2), (4, 1), (4, NUM_EXPERTS)])
@pytest.mark.parametrize("name", ["GptOssExperts", "MuseSparkExperts"])
def test_sizes(name, num_tokens, top_k):
    compare(build(CLASSES[name]), *inputs(num_tokens, top_k))


def test_no_tokens():
    # what an expert-parallel rank may get; eager's result has no graph then, so there is nothing to compare with
    results = run(build(CLASSES["GptOssExperts"]), IMPLEMENTATION, *inputs(num_tokens=0))
    assert results["out"].shape == (0, HIDDEN_SIZE)
    assert not any(gradient.any() for gradient in results.values())
    unfused = build(CLASSES["MuseSparkExperts"])
    unfused.config._experts_implementation = IMPLEMENTATION
    assert unfused(*inputs(num_tokens=0)).shape == (0, HIDDEN_SIZE)


@pytest.mark.parametrize("name", DISTINCT)
def test_bfloat16(name):
    hidden_states, topk_ids, topk_weights = inputs(dtype=torch.bfloat16)
    compare(build(CLASSES[name], torch.bfloat16), hidden_states, topk_ids, topk_weights.bfloat16())


@pytest.mark.parametrize("name", DISTINCT)
def test_expert_parallel_sentinels(name):
    module = build(CLASSES[name])
    hidden_states, topk_ids, topk_weights = inputs(skip=0.7)
    skipped = (topk_ids < 0) | (topk_ids >= NUM_EXPERTS)
    assert skipped.any() and skipped.all(1).any()
    topk_ids = topk_ids.masked_fill(skipped, NUM_EXPERTS)  # the id that transformers sends
    topk_weights = topk_weights.masked_fill(skipped, 0)
    actual = run(module, IMPLEMENTATION, hidden_states, topk_ids, topk_weights)
    assert not actual["out"][skipped.all(1)].any()
    assert not actual["grad_hidden_states"][skipped.all(1)].any()
    assert not actual["grad_topk_weights"][skipped].any()

    # weight zero on any real expert leaves all but that weight's own gradient as they are
    elsewhere = topk_ids.masked_fill(skipped, 0)
    eager = run(module, "eager", hidden_states, elsewhere, topk_weights)
    reference64 = run64(module, hidden_states, elsewhere, topk_weights)
    for results in (eager, reference64):
        results["grad_topk_weights"].masked_fill_(skipped, 0)
    for key in reference64:
        assert_close_to_reference(actual[key], reference64[key], eager[key], key)


def test_hidden_states_of_another_dtype():
    # as transformers' own implementations: float32 from a norm into bfloat16 experts gives float32
    module = build(CLASSES["MixtralExperts"], torch.bfloat16)
    hidden_states, topk_ids, topk_weights = inputs()
    module.config._experts_implementation = IMPLEMENTATION
    out = module(hidden_states, topk_ids, topk_weights)
    assert out.dtype == torch.float32
    assert torch.equal(out, module(hidden_states.bfloat16(), topk_ids, topk_weights).float())


@pytest.mark.parametrize("name", DISTINCT)
def test_autocast(name):
    module = build(CLASSES[name])
    arguments = inputs()
    reference64 = run64(module, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        eager = run(module, "eager", *arguments)
        actual = run(module, IMPLEMENTATION, *arguments)
    for key in reference64:
        # float32 like eager's, of bfloat16's accuracy
        assert actual[key].dtype == eager[key].dtype
        assert_close_to_reference(actual[key].bfloat16(), reference64[key], eager[key].bfloat16(), key)


@pytest.mark.parametrize("name", DISTINCT)
def test_checkpointing(name):
    module = build(CLASSES[name])
    hidden_states, topk_ids, topk_weights = inputs()
    plain = run(module, IMPLEMENTATION, hidden_states, topk_ids, topk_weights)
    inner = module.forward
    module.forward = lambda *args: checkpoint(inner, *args, use_reentrant=False)
    again = run(module, IMPLEMENTATION, hidden_states, topk_ids, topk_weights)
    for key in plain:
        assert torch.equal(plain[key], again[key]), key


@needs_kernels
@pytest.mark.parametrize("name", DISTINCT)
def test_compile(name):
    module = build(CLASSES[name])
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (9, 4):
        hidden_states, topk_ids, topk_weights = inputs(num_tokens)
        plain = run(module, IMPLEMENTATION, hidden_states, topk_ids, topk_weights)
        traced = run(compiled, IMPLEMENTATION, hidden_states, topk_ids, topk_weights)
        for key in plain:
            assert torch.equal(plain[key], traced[key]), key


@needs_kernels
def test_compile_sees_changes():
    module = build(CLASSES["DeepseekV4Experts"])
    module.config._experts_implementation = IMPLEMENTATION
    hidden_states, topk_ids, topk_weights = inputs()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    changes = (
        lambda: None,
        lambda: setattr(module, "limit", 0.5),
        lambda: setattr(module, "act_fn", ACT2FN["mish"]),
        lambda: setattr(module, "act_fn", ACT2FN["gelu"]),
        lambda: module.act_fn.register_forward_hook(lambda *_: torch.zeros(())),
    )
    seen = []
    for change in changes:
        change()
        seen.append(compiled(hidden_states, topk_ids, topk_weights))
        assert torch.equal(seen[-1], module(hidden_states, topk_ids, topk_weights))
    assert not any(torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))


@needs_kernels
@pytest.mark.parametrize("name", DISTINCT)
def test_export(name):
    module = build(CLASSES[name]).requires_grad_(False)
    module.config._experts_implementation = IMPLEMENTATION
    num_tokens = torch.export.Dim.AUTO
    with torch.no_grad():
        exported = torch.export.export(module, inputs(), dynamic_shapes=({0: num_tokens},) * 3)
        stored = io.BytesIO()
        torch.export.save(exported, stored)
        stored.seek(0)
        loaded = torch.export.load(stored).module()
        other = inputs(num_tokens=5)
        assert torch.equal(loaded(*other), module(*other))


class ThirdGate(CLASSES["MixtralExperts"].load()):
    """What a user writes: a gate of their own on a class that would be recognised."""

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * (up + 3)


@torch.no_grad()
def by_hand(module, hidden_states, topk_ids, topk_weights):
    """The module's own gate, pair by pair (its eager forward does not call _apply_gate)."""
    out = hidden_states.new_zeros(hidden_states.shape).to(module.down_proj.dtype)
    for token, ids in enumerate(topk_ids.tolist()):
        for slot, expert in enumerate(ids):
            pre_activation = module.gate_up_proj[expert] @ hidden_states[token].to(out.dtype)
            a = module._apply_gate(pre_activation[None])[0]
            out[token] += topk_weights[token, slot] * (module.down_proj[expert] @ a)
    return out


def test_own_gate_runs():
    module = build(CLASSES["MixtralExperts"])
    arguments = inputs()
    plain = run(module, IMPLEMENTATION, *arguments)["out"]
    module.__class__ = ThirdGate
    assert recognise(module) is None
    own = run(module, IMPLEMENTATION, *arguments)["out"]
    assert not torch.allclose(own, plain)
    assert_close_to_reference(own, by_hand(copy.deepcopy(module).double(), *arguments), by_hand(module, *arguments))

    # the same gate on the instance only
    module.__class__ = CLASSES["MixtralExperts"].load()
    module._apply_gate = ThirdGate._apply_gate.__get__(module)
    assert recognise(module) is None
    assert torch.equal(run(module, IMPLEMENTATION, *arguments)["out"], own)


def test_patched_class_gate_runs(monkeypatch):
    module = build(CLASSES["GptOssExperts"])
    assert recognise(module) is not None
    monkeypatch.setattr(type(module), "_apply_gate", lambda self, gate_up: gate_up[..., ::2] * gate_up[..., 1::2])
    assert recognise(module) is None
    compare(module, *inputs())


# every name of ACT2FN: recognised exactly, or unfused; xielu needs a package, prelu has a parameter
@pytest.mark.parametrize("act", sorted(ACT2FN.keys() - {"xielu"}))
def test_activations(act):
    module = build(CLASSES["MixtralExperts"])
    module.act_fn = ACT2FN[act]
    compare(module, *inputs())


def test_recognised_activations():
    recognised = {act: activation_kind(ACT2FN[act]) for act in ACT2FN.keys() - {"xielu"}}
    assert {act: kind for act, kind in recognised.items() if kind is not None} == {
        "silu": ("silu", 1.0),
        "swish": ("silu", 1.0),
        "quick_gelu": ("silu", 1.702),
        "gelu": ("gelu", 1.0),
        "gelu_python": ("gelu", 1.0),
        "gelu_new": ("gelu_tanh", 1.0),
        "gelu_accurate": ("gelu_tanh", 1.0),
        "gelu_pytorch_tanh": ("gelu_tanh", 1.0),
        "gelu_python_tanh": ("gelu_tanh", 1.0),
        "relu": ("relu", 1.0),
        "relu2": ("relu2", 1.0),
    }


class ThirdSiLU(nn.SiLU):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", ["subclass", "forward", "hook", "pre_hook"])
def test_changed_activation_runs(change):
    module = build(CLASSES["MixtralExperts"])
    if change == "subclass":
        module.act_fn = ThirdSiLU()
    elif change == "forward":
        module.act_fn.forward = lambda x: 2 * nn.functional.silu(x)
    elif change == "hook":
        module.act_fn.register_forward_hook(lambda _, __, out: 2 * out)
    else:
        module.act_fn.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    assert recognise(module) is None
    compare(module, *inputs())


@pytest.mark.parametrize("limit", [None, 0.0, torch.tensor(2.0)])
def test_limits_that_are_no_data_are_not_recognised(limit):
    module = build(CLASSES["DeepseekV4Experts"])
    module.limit = limit
    assert recognise(module) is None


def test_parametrised_weights():
    # PEFT and pruning reparametrise; the class changes, its gate does not
    module = build(CLASSES["GptOssExperts"])

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(module, "down_proj", Double())
    assert recognise(module) is not None
    compare(module, *inputs())
