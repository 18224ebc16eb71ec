"""Part 2: the experts of real models' layers, ours against the implementations of transformers."""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels.demo.settings import LayerSettings
from moe_kernels.ops.route import route

#: names for ``config._experts_implementation``, in the order of the table
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "moe_kernels")


class Layer(NamedTuple):
    """Where a layer's shape comes from and how to build its experts with ``num_experts // divisor`` experts."""

    name: str
    top_k: int
    build: Callable[[int], nn.Module]


def _qwen3_moe(divisor: int) -> nn.Module:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=128 // divisor)
    return _experts(Qwen3MoeExperts, config)


def _mixtral(divisor: int) -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

    num_experts = max(2, 8 // divisor)
    config = MixtralConfig(hidden_size=4096, intermediate_size=14336, num_local_experts=num_experts)
    return _experts(MixtralExperts, config)


def _gpt_oss(divisor: int) -> nn.Module:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    config = GptOssConfig(hidden_size=2880, intermediate_size=2880, num_local_experts=32 // divisor)
    return _experts(GptOssExperts, config)


#: sizes of the published checkpoints
LAYERS = (
    Layer("Qwen3-30B-A3B", 8, _qwen3_moe),
    Layer("Mixtral-8x7B", 2, _mixtral),
    Layer("GPT-OSS-20B", 4, _gpt_oss),
)


def _experts(experts_class: type[nn.Module], config) -> nn.Module:
    config._experts_implementation = "eager"
    with torch.device("meta"):
        experts = experts_class(config)
    experts = experts.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    experts.config = config
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        _fill_normal(parameter, config.initializer_range, generator)
    return experts


def _fill_normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    # drawing a billion normals takes a minute on one core: draw a block whose odd length aligns with no row, repeat it
    flat = parameter.view(-1)
    block = (torch.randn(min(flat.numel(), 2**22 + 1), generator=generator) * std).to(parameter.dtype)
    for start in range(0, flat.numel(), block.numel()):
        part = flat[start : start + block.numel()]
        part.copy_(block[: part.numel()])


def copied_bytes(experts: nn.Module, pairs: int) -> int:
    """Bytes of the weights that ``batched_mm`` copies at once for ``pairs`` token-expert pairs: both projections.

    Only the larger one needs to be held at a time, but the allocator keeps the first until the second is there.
    """
    weights = (experts.gate_up_proj, experts.down_proj)
    return pairs * sum(weight[0].numel() * weight.element_size() for weight in weights)


def forward_float32(experts: nn.Module, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """The layer in float32 from the same weights, one expert at a time: [num_tokens, hidden_size].

    ``out[t] = sum_k topk_weights[t, k] * (down(gate(gate_up(x[t]))))`` with the module's own gate and layout.
    """
    x, topk_weights = x.float(), topk_weights.float()
    out = torch.zeros_like(x)

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = rows @ (weight.float() if experts.is_transposed else weight.float().T)
        return rows if bias is None else rows + bias.float()

    for expert in topk_ids.unique().tolist():
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        biases = (
            (experts.gate_up_proj_bias[expert], experts.down_proj_bias[expert]) if experts.has_bias else (None,) * 2
        )
        hidden = experts._apply_gate(linear(x[token], experts.gate_up_proj[expert], biases[0]))
        rows = linear(hidden, experts.down_proj[expert], biases[1])
        out.index_add_(0, token, rows * topk_weights[token, slot, None])
    return out


@torch.inference_mode()
def run(settings: LayerSettings, seed: int, progress) -> list[dict]:
    """Compares the implementations on each layer, for one token (decode) and for many (prefill), in bfloat16.

    Returns:
        One row for each layer and number of tokens: for each implementation the median ``ms`` and ``error``, the
        largest difference to the layer computed in float32 relative to its largest value, or ``skipped`` and why.
    """
    import moe_kernels.integrations.transformers  # noqa: F401  registers "moe_kernels"

    cells = [(layer, num_tokens) for layer in LAYERS for num_tokens in settings.num_tokens]
    rows: list[dict] = []
    experts = None
    for layer, num_tokens in progress(cells, "layers"):
        if not rows or rows[-1]["layer"] != layer.name:
            experts = None  # free the last layer's gigabytes before the next one's
            experts = layer.build(settings.expert_divisor)
        rows.append(compare(layer, experts, num_tokens, settings, seed))
    return rows


def compare(layer: Layer, experts: nn.Module, num_tokens: int, settings: LayerSettings, seed: int) -> dict:
    """One row of :func:`run`."""
    hidden_size = experts.down_proj.shape[2 if experts.is_transposed else 1]
    intermediate_size = experts.down_proj.shape[1 if experts.is_transposed else 2]
    num_experts = experts.down_proj.shape[0]
    top_k = min(layer.top_k, num_experts)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden_size, generator=generator).to(torch.bfloat16)
    topk_ids, topk_weights = route(torch.randn(num_tokens, num_experts, generator=generator), top_k, renormalize=True)
    topk_ids, topk_weights = (
        topk_ids.long(),
        topk_weights.to(torch.bfloat16),
    )  # as the routers of transformers give them

    row = {
        "layer": layer.name,
        "num_tokens": num_tokens,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_experts": num_experts,
        "top_k": top_k,
        "weight_bytes": sum(parameter.numel() * parameter.element_size() for parameter in experts.parameters()),
        "implementations": {},
    }
    runnable = list(IMPLEMENTATIONS)
    copied = copied_bytes(experts, num_tokens * top_k)
    if copied > settings.max_copied_bytes:
        runnable.remove("batched_mm")
        row["implementations"]["batched_mm"] = {"skipped": f"would copy {copied / 2**30:.0f} GiB of weights"}

    def call(implementation: str) -> Tensor:
        experts.config._experts_implementation = implementation
        return experts(x, topk_ids, topk_weights)

    expected = forward_float32(experts, x, topk_ids, topk_weights)
    largest = expected.abs().max().item()
    for implementation in runnable:  # also warms up
        error = (call(implementation).float() - expected).abs().max().item() / largest
        row["implementations"][implementation] = {"error": error}
    samples: dict[str, list[float]] = {implementation: [] for implementation in runnable}
    for _ in range(settings.repeats):  # interleaved, so that a busy machine slows all of them alike
        for implementation in runnable:
            begin = time.perf_counter()
            call(implementation)
            samples[implementation].append(1e3 * (time.perf_counter() - begin))
    for implementation in runnable:
        row["implementations"][implementation]["ms"] = median(samples[implementation])
    return row
