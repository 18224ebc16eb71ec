"""Named layer shapes of real models."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """Routed part of one mixture-of-experts layer with gated experts.

    Attributes:
        model: where the numbers come from (the model's config.json).
    """

    name: str
    model: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

    def weight_bytes(self, element_size: int) -> int:
        """Bytes of all experts' gate, up and down projections."""
        return 3 * self.num_experts * self.hidden_size * self.intermediate_size * element_size

    def flops(self, num_tokens: int) -> float:
        """Multiplications and additions of one forward pass without skipped pairs."""
        return 2.0 * 3 * num_tokens * self.top_k * self.hidden_size * self.intermediate_size


_SHAPES = (
    # many small experts, two large experts of few, and what lies between: the three regimes of an expert FFN
    LayerShape("A", "Qwen3-30B-A3B", 2048, 768, 128, 8),
    LayerShape("B", "Mixtral-8x7B scaled down (its 4096 x 14336 is shape mixtral-8x7b)", 2048, 5632, 8, 2),
    LayerShape("C", "DeepSeek-MoE-16B, 64 routed experts without the 2 shared ones", 2048, 1408, 64, 6),
    LayerShape("deepseek-v2-lite", "DeepSeek-V2-Lite", 2048, 1408, 64, 6),
    LayerShape("deepseek-v3", "DeepSeek-V3", 7168, 2048, 256, 8),
    LayerShape("gpt-oss-20b", "GPT-OSS-20B's sizes, with silu and without biases", 2880, 2880, 32, 4),
    LayerShape("granite-3.0-1b-a400m", "Granite-3.0-1B-A400M", 1024, 512, 32, 8),
    LayerShape("mixtral-8x7b", "Mixtral-8x7B", 4096, 14336, 8, 2),
    LayerShape("olmoe-1b-7b", "OLMoE-1B-7B", 2048, 1024, 64, 8),
    LayerShape("qwen1.5-moe-a2.7b", "Qwen1.5-MoE-A2.7B", 2048, 1408, 60, 4),
    # small enough for a test; fits in a cache, so its times say nothing about memory
    LayerShape("toy", "none: for tests of the harness", 64, 32, 8, 2),
)

SHAPES = {shape.name: shape for shape in _SHAPES}
