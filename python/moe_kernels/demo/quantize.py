"""``demo quantize``: what each format of quantised experts costs in perplexity and saves in memory and time."""

import copy
import math
from functools import partial

import torch
from torch import nn

from moe_kernels.demo.model import LanguageModel, feed_forward_layers, loss_of, set_feed_forward_layers, split_model
from moe_kernels.demo.perplexity import windows_of
from moe_kernels.demo.settings import QuantizeSettings
from moe_kernels.demo.text import Texts
from moe_kernels.demo.timing import in_turn
from moe_kernels.nn import MoEFeedForward, quantize_experts
from moe_kernels.nn.quantized_experts import expert_weights
from moe_kernels.nn.split_models import recorded_inputs


@torch.inference_mode()
def run(language_model: LanguageModel, texts: Texts, settings: QuantizeSettings, progress) -> dict:
    """Splits the model's feed-forward layers into experts, all active, and reads the text with them in each format.

    Returns:
        ``rows``, float32 first: bits a weight with its share of the scales, ``weight_error`` (root of the mean squared
        error over that of the weights), perplexity, and median milliseconds of all feed-forward layers together for one
        token and for a window.
    """
    model = language_model.model
    dense = feed_forward_layers(model)
    calibration, evaluation = (
        windows_of(language_model.encode(text), settings.windows, settings.window_size) for text in texts
    )
    layers = {"float32": split_model(model, calibration, settings.num_experts, progress)}
    for format in progress(settings.formats, "quantising"):
        layers[format] = copy.deepcopy(layers["float32"])
        quantize_experts(nn.ModuleList(layers[format]), format)

    losses: dict[str, list[float]] = {format: [] for format in layers}
    try:
        for window in progress(evaluation, "evaluation"):
            for format, split in layers.items():
                set_feed_forward_layers(model, split)
                logits = model(window[None], use_cache=False).logits[0]
                losses[format].append(loss_of(logits, window))
    finally:
        set_feed_forward_layers(model, dense)
    with recorded_inputs(dense) as seen:
        model.model(evaluation[:1], use_cache=False)
    tokens = [torch.cat(part) for part in seen]

    def times(tokens: list[torch.Tensor], what: str) -> dict[str, float]:
        calls = {format: partial(_run_all, split, tokens) for format, split in layers.items()}
        return in_turn(calls, settings.timing_repeats, progress, f"feed-forward, {what}")

    decode, prefill = times([x[-1:] for x in tokens], "1 token"), times(tokens, "one window")

    rows = []
    for format, split in layers.items():
        loss = sum(losses[format]) / len(losses[format])
        rows.append(
            {
                "format": format,
                **_size_and_error(split, layers["float32"]),
                "loss": loss,
                "perplexity": math.exp(loss),
                "feed_forward_decode_ms": decode[format],
                "feed_forward_prefill_ms": prefill[format],
            }
        )
    return {
        "model": language_model.name,
        "num_layers": len(dense),
        "num_experts": settings.num_experts,
        "evaluation_tokens": evaluation.numel(),
        "window_size": settings.window_size,
        "rows": rows,
    }


def _run_all(layers: list[MoEFeedForward], tokens: list[torch.Tensor]) -> None:
    """All layers in turn, each on the tokens that it sees in the model: one layer alone would stay in the cache."""
    for layer, x in zip(layers, tokens, strict=True):
        layer(x)


def _size_and_error(layers: list[MoEFeedForward], exact: list[MoEFeedForward]) -> dict[str, float]:
    """Bits a weight, and the root of the mean squared error of the weights over that of the weights."""
    total = size = error = square = 0.0
    for layer, source in zip(layers, exact, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            held, weights = expert_weights(getattr(layer, name)), getattr(source, name)
            values = held if isinstance(held, torch.Tensor) else held.dequantize()
            total += weights.numel()
            size += held.nbytes
            error += (values - weights).double().square().sum().item()
            square += weights.double().square().sum().item()
    return {"bits": 8 * size / total, "weight_error": math.sqrt(error / square)}
