"""Quantised experts of transformers' models. The oracle is their eager loop over the dequantised weights."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_kernels import quantized_from_mxfp4
from moe_kernels.integrations.transformers import IMPLEMENTATION, quantize_experts, replace_modules
from moe_kernels.testing import assert_close_to_reference, random_routing
from tests.integrations.test_transformers_fp8 import build, dequantised

NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE = 5, 64, 32


def experts_of(name: str) -> nn.Module:
    sizes = {"hidden_size": HIDDEN_SIZE, "num_hidden_layers": 1}
    if name == "gpt_oss":
        experts = GptOssExperts(
            GptOssConfig(**sizes, intermediate_size=INTERMEDIATE_SIZE, num_local_experts=NUM_EXPERTS)
        )
    else:
        act = "mish" if name == "own_gate" else "silu"
        sizes |= {"moe_intermediate_size": INTERMEDIATE_SIZE, "num_experts": NUM_EXPERTS, "hidden_act": act}
        experts = Qwen3MoeExperts(Qwen3MoeConfig(**sizes))
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape) / 4
    replace_modules(experts)
    return experts


def run(experts: nn.Module, dtype: torch.dtype, size: int = HIDDEN_SIZE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(9, size, generator=generator).to(dtype).requires_grad_()
    topk_ids, topk_weights = random_routing(9, NUM_EXPERTS, 3)
    topk_weights = topk_weights.to(dtype).requires_grad_()
    out = experts(hidden_states, topk_ids.long(), topk_weights)
    (out * torch.randn(out.shape, generator=generator).to(dtype)).sum().backward()
    return [out.detach(), hidden_states.grad, topk_weights.grad]


def eager(plain: nn.Module, quantized: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    plain = copy.deepcopy(plain)
    plain.config = SimpleNamespace(_experts_implementation="eager")
    plain.to(dtype)
    for name in ("gate_up_proj", "down_proj"):
        weights = getattr(quantized, name)().dequantize(dtype)
        weights = weights.transpose(1, 2).contiguous() if plain.is_transposed else weights
        getattr(plain, name).data = weights
    return run(plain, dtype)


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "own_gate"])
@pytest.mark.parametrize("format", ["int8", "int4", "mxfp4"])
def test_forward_and_backward(name, format):
    torch.manual_seed(0)
    plain = experts_of(name)
    experts = copy.deepcopy(plain)
    experts.config = plain.config
    assert quantize_experts(experts, format) == [""]
    assert quantize_experts(experts, format) == []
    assert not [key for key, _ in experts.named_parameters() if key.endswith("proj")]
    results = (run(experts, torch.float32), eager(plain, experts, torch.float64), eager(plain, experts, torch.float32))
    for actual, reference64, low in zip(*results, strict=True):
        assert_close_to_reference(actual, reference64, low)


def test_dequantised_gpt_oss_weights_come_back_as_they_were_released():
    experts = experts_of("gpt_oss")
    blocks = torch.randint(0, 256, (NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, 2), dtype=torch.uint8)
    released = quantized_from_mxfp4(blocks, scales, num_splits=2, interleaved=True).dequantize()
    experts.gate_up_proj.data = released.transpose(1, 2).contiguous()
    quantize_experts(experts, "mxfp4")
    assert torch.equal(experts.gate_up_proj().dequantize(), released)


@pytest.mark.parametrize(
    "arguments", [{"block_size": (4, 16)}, {"block_size": None}, {"has_gate": False, "block_size": None}]
)
def test_fp8_experts_keep_their_codes(arguments):
    experts = build(**arguments)
    reference64 = run(dequantised(experts, torch.float64), torch.float64, experts.hidden_dim)
    low = run(dequantised(experts, torch.float32), torch.float32, experts.hidden_dim)
    assert quantize_experts(experts, "fp8") == [""]
    for results in zip(run(experts, torch.float32, experts.hidden_dim), reference64, low, strict=True):
        assert_close_to_reference(*results)
    assert replace_modules(experts).paths == {"": "fused"}


def test_refused():
    with pytest.raises(
        ValueError, match="quantize_experts: format must be 'fp8' for weights that are stored so, got 'int8'"
    ):
        quantize_experts(build())
    experts = build(config={"_experts_implementation": "eager"})
    with pytest.raises(ValueError, match=f"experts_implementation of  must be '{IMPLEMENTATION}', got 'eager'"):
        quantize_experts(experts, "fp8")


def test_experts_that_do_not_fit_stay_whole():
    experts = experts_of("qwen3")
    # groups of 48 divide what down_proj takes, not what gate_up_proj does, and the other way round with 64
    experts.down_proj.data = torch.randn(NUM_EXPERTS, HIDDEN_SIZE, 48)
    for group_size in (48, 64):
        with pytest.raises(ValueError, match=f"group_size must be a divisor of in=.*, got {group_size}"):
            quantize_experts(experts, "int8", group_size=group_size)
        assert isinstance(experts.gate_up_proj, nn.Parameter) and isinstance(experts.down_proj, nn.Parameter)
