"""FP8Experts on moe_kernels: dequantised at each call.

Transformers' own FP8 kernels need a GPU. The oracle is their eager loop over weights that their function dequantised.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import (
    ALL_FP8_EXPERTS_FUNCTIONS,
    FP8Experts,
    _dequantize_fp8_weight,
)
from transformers.integrations.moe import use_experts_implementation

from moe_kernels.integrations.transformers import IMPLEMENTATION, replace_modules
from moe_kernels.integrations.transformers.gates import recognise
from moe_kernels.testing import assert_close_to_reference, random_routing

NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE = 5, 12, 7


def build(has_gate: bool = True, block_size=(4, 4), config=(), **arguments) -> nn.Module:
    # a subclass: the decorator rewrites the class it is given
    decorate = use_experts_implementation(experts_interface=ALL_FP8_EXPERTS_FUNCTIONS, has_gate=has_gate)
    cls = decorate(type("LocalFP8Experts", (FP8Experts,), {}))
    values = {
        "hidden_size": HIDDEN_SIZE,
        "num_local_experts": NUM_EXPERTS,
        "moe_intermediate_size": INTERMEDIATE_SIZE,
        "hidden_act": "silu",
        "_experts_implementation": IMPLEMENTATION,
        "_experts_implementation_internal": IMPLEMENTATION,
        **dict(config),
    }
    experts = cls(SimpleNamespace(**values), block_size=block_size, has_gate=has_gate, **arguments)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in experts.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = ((values / 4).exp2() if "scale" in name else values).to(parameter.dtype)
        parameter.requires_grad_(False)
    return experts


def dequantised(experts: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The same module with weights of ``dtype``, on which eager runs plain linears."""
    plain = copy.deepcopy(experts)
    for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
        weight, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv").float()
        if experts.block_size is None:
            # one scale for each half of gate_up_proj; transformers' function cannot broadcast two
            scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
        weight = _dequantize_fp8_weight(weight, scale, experts.block_size, torch.float64)
        setattr(plain, name, nn.Parameter(weight.to(dtype), requires_grad=False))
    plain.config = SimpleNamespace(_experts_implementation="eager")
    return plain


def run(experts: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(9, HIDDEN_SIZE, generator=generator).to(dtype).requires_grad_()
    topk_ids, topk_weights = random_routing(9, NUM_EXPERTS, 3)
    topk_weights = topk_weights.to(dtype).requires_grad_()
    out = experts(hidden_states, topk_ids.long(), topk_weights)
    (out * torch.randn(out.shape, generator=generator).to(dtype)).sum().backward()
    return [out.detach(), hidden_states.grad, topk_weights.grad]


# blocks that do not divide 7 and 14; power-of-two scales; scales for whole matrices; a kept-precision module; each gate
@pytest.mark.parametrize(
    ("arguments", "fused"),
    [
        ({}, True),
        ({"scale_fmt": "ue8m0"}, True),
        ({"block_size": None}, True),
        ({"has_gate": False, "config": {"hidden_act": "relu2"}}, True),
        ({"config": {"swiglu_limit": 2.0}}, True),
        ({"config": {"swiglu_limit": 2.0, "swiglu_alpha": 1.702}}, True),
        ({"config": {"hidden_act": "mish"}}, False),
        ({"config": {"mlp_gate_softcap": 2.0, "mlp_up_softcap": 3.0}}, False),
    ],
    ids=["blocks", "ue8m0", "matrix", "ungated", "clamped", "oai", "mish", "softcap"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_backward(arguments, fused, dtype):
    experts = build(**arguments)
    assert (recognise(experts) is not None) == fused
    reference64 = run(dequantised(experts, torch.float64), torch.float64)
    eager = run(dequantised(experts, dtype), dtype)
    results = list(zip(run(experts, dtype), reference64, eager, strict=True))
    if dtype == torch.bfloat16 and experts.limit is not None:
        results = results[:1]  # a gradient jumps where rounding takes a value across its clamp
    for actual, expected64, low in results:
        assert_close_to_reference(actual, expected64, low)


def test_unquantised_weights_run_as_they_are():
    experts = build()
    plain = dequantised(experts, torch.float32)
    eager = run(plain, torch.float32)
    reference64 = run(dequantised(experts, torch.float64), torch.float64)
    plain.config._experts_implementation = IMPLEMENTATION
    for results in zip(run(plain, torch.float32), reference64, eager, strict=True):
        assert_close_to_reference(*results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert_dtype": "fp4", "block_size": None}, "down_proj must be torch.float8_e4m3fn, got torch.int8"),
        ({"activation_scheme": "static"}, "activation_scheme must be 'dynamic', got 'static'"),
    ],
)
def test_refused(arguments, message):
    if "expert_dtype" in arguments:
        arguments = {**arguments, "config": {"hidden_size": 64, "moe_intermediate_size": 32}}
    experts = build(**arguments)
    hidden_states = torch.zeros(2, experts.hidden_dim)
    topk_ids, topk_weights = random_routing(2, NUM_EXPERTS, 2)
    with pytest.raises(ValueError, match=f"fp8_experts_forward: {message}"):
        experts(hidden_states, topk_ids.long(), topk_weights)
    ((_, _, reason),) = replace_modules(experts).refused
    assert message in reason


def test_replace_modules():
    experts = build(config={"_experts_implementation": "eager"})
    report = replace_modules(experts)
    assert report.paths == {"": "dequantised at each call, fused"}
    assert experts.config._experts_implementation_internal == IMPLEMENTATION
    report.restore()
    assert experts.config._experts_implementation_internal == "eager"
