"""Weights and routings, made cheaply."""

from pathlib import Path

import torch

from benchmarks.providers.base import Batch, Layer
from benchmarks.shapes import LayerShape

#: random numbers are drawn for this many experts only; the others are rolled copies, so no two experts are alike
_NUM_DRAWN = 4
_SEED = 0


def generator(seed: int = _SEED) -> torch.Generator:
    """For tensors of the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def make_layer(shape: LayerShape, dtype: torch.dtype, threads: int, training: bool = False) -> Layer:
    """A layer with random weights of the usual scale.

    Drawing 600 million normal numbers takes longer than the benchmark, and equal experts would hide a kernel that mixes
    them up. So expert e is drawn expert e % 4 with its rows rolled by e // 4.
    """
    random = generator()

    def weights(out_features: int, in_features: int) -> torch.nn.Parameter:
        drawn = min(_NUM_DRAWN, shape.num_experts)
        base = torch.randn(drawn, out_features, in_features, generator=random).mul_(in_features**-0.5).to(dtype)
        full = torch.empty(shape.num_experts, out_features, in_features, dtype=dtype)
        for expert in range(shape.num_experts):
            roll = expert // drawn % out_features
            full[expert, roll:] = base[expert % drawn, : out_features - roll]
            full[expert, :roll] = base[expert % drawn, out_features - roll :]
        return torch.nn.Parameter(full, requires_grad=training)

    gate_up_proj = weights(2 * shape.intermediate_size, shape.hidden_size)
    return Layer(shape, gate_up_proj, weights(shape.hidden_size, shape.intermediate_size), threads)


def num_routings(num_tokens: int) -> int:
    """How many routings a cell cycles through: with few tokens, enough that weights come from memory, not cache.

    A GPU's cache is flushed instead (timing_cuda.py).
    """
    if torch.get_default_device().type == "cuda":
        return 1
    return 8 if num_tokens <= 16 else 3


def make_batches(shape: LayerShape, dtype: torch.dtype, num_tokens: int) -> list[Batch]:
    """Random tokens with random distinct experts and renormalised softmax weights, the same for every provider."""
    random = generator(_SEED + num_tokens)
    hidden_states = torch.randn(num_tokens, shape.hidden_size, generator=random).to(dtype)
    batches = []
    for _ in range(num_routings(num_tokens)):
        logits = torch.randn(num_tokens, shape.num_experts, generator=random)
        scores, topk_ids = logits.softmax(1).topk(shape.top_k, dim=1)
        topk_weights = (scores / scores.sum(1, keepdim=True)).to(dtype)
        batches.append(Batch(hidden_states, topk_ids, topk_ids.int(), topk_weights, topk_weights.float()))
    return batches


def touched_experts(batch: Batch) -> list[int]:
    """Ids of the experts that have a token."""
    return batch.topk_ids.unique().tolist()


def fingerprint(layer: Layer) -> int:
    """Changes when a provider writes into weights that all share: bits of some thousand elements of every expert."""
    total = 0
    for weights in (layer.gate_up_proj.detach(), layer.down_proj.detach()):
        bits = weights.view(torch.int16 if weights.dtype.itemsize == 2 else torch.int32)
        total += int(bits.flatten()[::997].long().sum())
    return total


def available_bytes() -> int | None:
    """Memory of the default device that can be had without swapping, or None where the system does not say."""
    if torch.get_default_device().type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
