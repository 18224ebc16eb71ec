"""How much of everything the demo does: the full run and the quick one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PerplexitySettings:
    """Part 1. ``active_experts`` lists the numbers of experts to evaluate; the first is all of them."""

    num_experts: int = 16
    active_experts: tuple[int, ...] = (16, 14, 12, 10, 8, 6)
    window_size: int = 512
    calibration_windows: int = 16
    evaluation_windows: int = 6
    timing_repeats: int = 5


@dataclass(frozen=True)
class LayerSettings:
    """Part 2. ``expert_divisor`` divides the number of experts: 1 is the real layer."""

    num_tokens: tuple[int, ...] = (1, 256)
    expert_divisor: int = 1
    repeats: int = 5
    max_copied_bytes: int = 4 * 2**30


@dataclass(frozen=True)
class FinetuneSettings:
    """Part 3. A Qwen3-MoE over bytes.

    ``implementations``: the first is what the others are compared with. ``eager`` is a yardstick: rounding is amplified
    by every step, and two implementations of transformers drift apart as far as ours does.
    """

    implementations: tuple[str, ...] = ("grouped_mm", "moe_kernels", "eager")
    hidden_size: int = 256
    intermediate_size: int = 256
    num_layers: int = 4
    num_experts: int = 16
    top_k: int = 4
    window_size: int = 128
    batch_size: int = 8
    num_steps: int = 40
    learning_rate: float = 2e-3


@dataclass(frozen=True)
class RouterSettings:
    """``demo route``. Every kind trains the same routers on the same tokens for as many steps."""

    num_experts: int = 16
    active_experts: int = 8
    window_size: int = 256
    calibration_windows: int = 12
    evaluation_windows: int = 4
    num_steps: int = 30
    batch_size: int = 256
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class TuneSettings:
    """``demo tune``. ``windows`` of each kind of text to count on, and as many to read.

    ``num_switched``: experts, of those of all layers together.
    """

    num_experts: int = 16
    top_k: int = 12
    window_size: int = 256
    windows: int = 5
    num_switched: tuple[int, ...] = (16, 48)
    num_listed: int = 8


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """``demo lora``. ``adapters``: for each kind of text, the rank of its adapter and the layers that have it."""

    adapters: tuple[tuple[int, tuple[str, ...]], ...] = (
        (8, ATTENTION + FEED_FORWARD),
        (16, FEED_FORWARD),
        (32, ("q_proj", "v_proj")),
    )
    window_size: int = 128
    batch_size: int = 2
    num_steps: int = 25
    learning_rate: float = 2e-3
    evaluation_windows: int = 6
    repeats: int = 5
    prompt: str = "The function returns"
    new_tokens: int = 16


@dataclass(frozen=True)
class TaskVectorSettings:
    """``demo taskvector``. Each step of Adam moves a weight by up to ``learning_rate``."""

    densities: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    alphas: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0)
    window_size: int = 128
    batch_size: int = 4
    num_steps: int = 12
    learning_rate: float = 1e-4
    evaluation_windows: int = 6
    repeats: int = 5


@dataclass(frozen=True)
class LogitSettings:
    """``demo logits``. ``num_prompts`` of each kind at most; ``scales`` of the tuned small model's change."""

    num_prompts: int = 6
    strength: float = 1.0
    scale: float = 1.5
    answer_tokens: int = 6
    new_tokens: int = 24
    num_beams: int = 4
    beam_tokens: int = 10
    hidden_size: int = 96
    base_steps: int = 50
    tuning_steps: int = 50
    batch_size: int = 8
    window_size: int = 64
    learning_rate: float = 2e-3
    scales: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 1.0)
    evaluation_windows: int = 4
    evaluation_size: int = 128
    num_draft: int = 3
    prompt: str = "Help on module calendar:\n\nNAME\n    calendar"


@dataclass(frozen=True)
class QuantizeSettings:
    """``demo quantize``. ``windows`` to fit the routers on, which all experts being active do not need, and to read."""

    formats: tuple[str, ...] = ("int8", "fp8", "int4", "mxfp4")
    num_experts: int = 16
    window_size: int = 512
    windows: int = 6
    timing_repeats: int = 9


@dataclass(frozen=True)
class Settings:
    perplexity: PerplexitySettings = PerplexitySettings()
    layers: LayerSettings = LayerSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    route: RouterSettings = RouterSettings()
    tune: TuneSettings = TuneSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    lora: LoraSettings = LoraSettings()
    taskvector: TaskVectorSettings = TaskVectorSettings()
    logits: LogitSettings = LogitSettings()
    seed: int = 0


def full(seed: int) -> Settings:
    """What ``make demo`` runs."""
    return Settings(seed=seed)


def quick(seed: int) -> Settings:
    """Every part, as small as it can be: a check that the demo works, with numbers that mean little."""
    return Settings(
        PerplexitySettings(
            active_experts=(16, 8), window_size=256, calibration_windows=3, evaluation_windows=1, timing_repeats=1
        ),
        LayerSettings(num_tokens=(1, 16), expert_divisor=8, repeats=1),
        FinetuneSettings(("grouped_mm", "moe_kernels"), num_layers=1, window_size=64, batch_size=2, num_steps=4),
        RouterSettings(calibration_windows=3, evaluation_windows=1, num_steps=2, batch_size=64),
        TuneSettings(windows=3, num_switched=(16,)),
        QuantizeSettings(window_size=256, windows=2, timing_repeats=1),
        LoraSettings(window_size=48, batch_size=1, num_steps=3, evaluation_windows=1, repeats=1, new_tokens=4),
        TaskVectorSettings(
            (0.05, 0.2), (1.0, 2.0), window_size=48, batch_size=1, num_steps=2, evaluation_windows=1, repeats=1
        ),
        LogitSettings(
            num_prompts=1,
            new_tokens=6,
            beam_tokens=4,
            base_steps=2,
            tuning_steps=2,
            scales=(0.3,),
            evaluation_windows=1,
        ),
        seed,
    )
