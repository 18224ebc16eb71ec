"""Part 1: perplexity and speed of the split model against the dense one."""

import math
import time
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from moe_kernels.demo.model import (
    LanguageModel,
    feed_forward_layers,
    loss_of,
    set_feed_forward_layers,
    split_model,
)
from moe_kernels.demo.settings import PerplexitySettings
from moe_kernels.demo.text import Texts
from moe_kernels.demo.timing import in_turn, rotated
from moe_kernels.nn import MoEFeedForward
from moe_kernels.nn.split_models import recorded_inputs


def windows_of(ids: Tensor, num_windows: int, window_size: int) -> Tensor:
    """``num_windows`` windows at even distances in ``ids``, as [num_windows, window_size]."""
    distance = ids.numel() // num_windows
    if distance < window_size:
        raise ValueError(f"demo: the text must have at least {num_windows * window_size} tokens, got {ids.numel()}")
    return ids[: num_windows * distance].view(num_windows, distance)[:, :window_size].contiguous()


@torch.inference_mode()
def run(language_model: LanguageModel, texts: Texts, settings: PerplexitySettings, progress) -> dict:
    """Splits the model on the calibration text, then measures it on the evaluation text.

    Returns:
        ``dense`` and one of ``rows`` for each number of active experts: perplexity, loss, median tokens/s of the whole
        model and milliseconds of all feed-forward layers together for one token and for a window of tokens;
        ``all_active`` holds what "exact to rounding" means here: how far loss and logits are from dense with all
        experts active.
    """
    model = language_model.model
    dense = feed_forward_layers(model)
    calibration = windows_of(
        language_model.encode(texts.calibration), settings.calibration_windows, settings.window_size
    )
    evaluation = windows_of(language_model.encode(texts.evaluation), settings.evaluation_windows, settings.window_size)

    started = time.perf_counter()
    split = split_model(model, calibration, settings.num_experts, progress)
    split_seconds = time.perf_counter() - started

    losses: dict[int, list[float]] = {top_k: [] for top_k in (0, *settings.active_experts)}  # 0 stands for dense
    seconds: dict[int, list[float]] = {top_k: [] for top_k in losses}
    logit_difference = logit_magnitude = 0.0
    try:
        for turn, window in enumerate(progress(evaluation, "evaluation")):
            compared: dict[int, Tensor] = {}
            for top_k in rotated(list(losses), turn):
                select(model, dense, split, top_k)
                begin = time.perf_counter()
                logits = model(window[None], use_cache=False).logits[0]
                seconds[top_k].append(time.perf_counter() - begin)
                losses[top_k].append(loss_of(logits, window))
                if top_k in (0, settings.num_experts):
                    compared[top_k] = logits
            if len(compared) == 2:
                difference = compared[settings.num_experts] - compared[0]
                logit_difference = max(logit_difference, difference.abs().max().item())
                logit_magnitude = max(logit_magnitude, compared[0].abs().max().item())
    finally:
        set_feed_forward_layers(model, dense)

    with recorded_inputs(dense) as seen:
        model.model(evaluation[:1], use_cache=False)
    tokens = [torch.cat(part) for part in seen]
    times = {
        "decode": feed_forward_times(
            dense, split, [x[-1:] for x in tokens], settings, progress, "feed-forward, 1 token"
        ),
        "prefill": feed_forward_times(dense, split, tokens, settings, progress, "feed-forward, one window"),
    }

    rows = {}
    for top_k, window_losses in losses.items():
        loss = sum(window_losses) / len(window_losses)
        rows[top_k] = {
            "active_experts": top_k or None,
            "loss": loss,
            "perplexity": math.exp(loss),
            "model_tokens_per_second": settings.window_size / median(seconds[top_k]),
            "feed_forward_decode_ms": times["decode"][top_k],
            "feed_forward_prefill_ms": times["prefill"][top_k],
        }
    dense_row = rows.pop(0)
    result = {
        "model": language_model.name,
        "num_layers": len(dense),
        "num_experts": settings.num_experts,
        "neurons_per_expert": split[0].down_proj.shape[2],
        "calibration_tokens": calibration.numel(),
        "evaluation_tokens": evaluation.numel(),
        "window_size": settings.window_size,
        "split_seconds": split_seconds,
        "dense": dense_row,
        "rows": list(rows.values()),
    }
    if settings.num_experts in rows:
        result["all_active"] = {
            "loss_difference": rows[settings.num_experts]["loss"] - dense_row["loss"],
            "max_logit_difference": logit_difference,
            "max_logit": logit_magnitude,
            "float32_eps": torch.finfo(torch.float32).eps,
        }
    return result


def select(model: nn.Module, dense: list[nn.Module], split: list[MoEFeedForward], top_k: int) -> None:
    """Makes ``model`` run its dense layers (``top_k == 0``) or the split ones with ``top_k`` experts."""
    if top_k:
        for layer in split:
            layer.top_k = top_k
    set_feed_forward_layers(model, split if top_k else dense)


def feed_forward_times(
    dense: list[nn.Module],
    split: list[MoEFeedForward],
    tokens: list[Tensor],
    settings: PerplexitySettings,
    progress,
    description: str,
) -> dict[int, float]:
    """Median milliseconds of one pass through all feed-forward layers, by number of active experts (0: dense).

    All layers in turn, each on the tokens that it sees in the model: one layer alone would stay in the cache.
    """

    def run_all(top_k: int) -> None:
        for layer in split:
            layer.top_k = top_k or layer.num_experts
        for mlp, x in zip(split if top_k else dense, tokens, strict=True):
            mlp(x)

    calls = {top_k: partial(run_all, top_k) for top_k in (0, *settings.active_experts)}
    return in_turn(calls, settings.timing_repeats, progress, description)
