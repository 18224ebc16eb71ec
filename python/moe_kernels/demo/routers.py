"""``demo route``: routers of five kinds, trained on the split model, at equal FLOPs."""

import copy
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels import expert_capacity, route, route_expert_choice, route_random, route_top_p
from moe_kernels.demo.model import LanguageModel, feed_forward_layers, loss_of, set_feed_forward_layers
from moe_kernels.demo.perplexity import windows_of
from moe_kernels.demo.settings import RouterSettings
from moe_kernels.demo.text import Texts
from moe_kernels.nn import CosineRouter, ModuleStatistics, MoEFeedForward, split_dense
from moe_kernels.nn.split_models import recorded_inputs

Routing = Callable[[Tensor], tuple[Tensor, Tensor]]


class Kind(NamedTuple):
    """One way of routing, with a dial that says how many experts a token takes.

    Attributes:
        router: hidden_size, num_experts -> a router to train, or None for the split's own linear one.
        routing: num_experts, dial -> the routing function.
        dial: its settings for the fewest and for the most experts; None where the number is given.
    """

    router: Callable[[int, int], nn.Module] | None
    routing: Callable[[int, float], Routing]
    dial: tuple[float, float] | None


def kinds(active_experts: int) -> dict[str, Kind]:
    """The five, each taking ``active_experts`` experts a token, on average."""

    def cosine_router(hidden_size: int, num_experts: int) -> nn.Module:
        return CosineRouter(hidden_size, num_experts, 64)

    def with_nulls(num_experts: int, dial: float) -> Routing:
        # as many null experts as experts, all of one logit: the dial
        def routing(logits: Tensor) -> tuple[Tensor, Tensor]:
            nulls = logits.new_full((logits.shape[0], num_experts), dial)
            together = torch.cat([logits.log_softmax(1), nulls], dim=1)
            return route(together, num_experts, num_null_experts=num_experts, renormalize=True)

        return routing

    def expert_choice(num_experts: int, _: float) -> Routing:
        def routing(logits: Tensor) -> tuple[Tensor, Tensor]:
            return route_expert_choice(logits, expert_capacity(logits.shape[0], num_experts, active_experts))

        return routing

    def top_k(*_) -> Routing:
        return partial(route, top_k=active_experts)

    def top_p(_: int, dial: float) -> Routing:
        return partial(route_top_p, top_p=dial)

    return {
        "top-k": Kind(None, top_k, None),
        "top-k, cosine": Kind(cosine_router, top_k, None),
        "top-p": Kind(None, top_p, (1e-3, 1.0)),
        "null experts": Kind(None, with_nulls, (0.0, -30.0)),
        "expert choice": Kind(None, expert_choice, None),
    }


def weight_one(routing: Routing, num_experts: int) -> Routing:
    """The same experts with weight 1 each, as the split layers need them; the gradient is that of the scores."""

    def weighed(logits: Tensor) -> tuple[Tensor, Tensor]:
        topk_ids, scores = routing(logits)
        real = (topk_ids >= 0) & (topk_ids < num_experts)
        return topk_ids, real.to(scores.dtype) + (scores - scores.detach())

    return weighed


def at_random(num_experts: int, active_experts: int, seed: int, layer: int) -> Routing:
    """Routing that does not look."""

    def routing(logits: Tensor) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(logits.shape[0])
        return route_random(numbers, num_experts, active_experts, seed=seed, layer=layer)

    return routing


def set_routing(layer: MoEFeedForward, kind: Kind, tokens: Tensor, active_experts: int, rounds: int = 20) -> None:
    """Makes ``layer`` route as ``kind`` does, its dial turned by bisection until ``tokens`` take ``active_experts``."""
    layer.weighted = True  # by the ones of weight_one, through which the router learns
    low, high = kind.dial or (0.0, 0.0)
    for _ in range(rounds if kind.dial else 1):
        middle = (low + high) / 2
        layer.routing = weight_one(kind.routing(layer.num_experts, middle), layer.num_experts)
        low, high = (middle, high) if mean_experts(layer, tokens) < active_experts else (low, middle)


def train_router(
    layer: MoEFeedForward, dense: nn.Module, tokens: Tensor, settings: RouterSettings, seed: int
) -> list[float]:
    """Trains the router so that the chosen experts give what the dense layer gives; the experts stay as they are.

    Returns:
        Of each step, the squared error relative to the squared output.
    """
    layer.requires_grad_(False)
    layer.router.requires_grad_(True)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(settings.num_steps):
        batch = tokens[torch.randint(tokens.shape[0], (settings.batch_size,), generator=generator)]
        target = dense(batch)
        loss = (layer(batch) - target).square().sum() / target.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def mean_experts(layer: MoEFeedForward, tokens: Tensor) -> float:
    """How many experts a token of ``tokens`` takes on average: what its FLOPs are proportional to."""
    topk_ids = layer.routing(layer.router(tokens))[0]
    return ((topk_ids >= 0) & (topk_ids < layer.num_experts)).sum().item() / tokens.shape[0]


def run(language_model: LanguageModel, texts: Texts, settings: RouterSettings, seed: int, progress) -> dict:
    """Trains the routers of each kind layer by layer, sets their dials, and reads the evaluation text with them.

    Returns:
        ``dense``, the untrained split's perplexities, and for each kind in ``rows``: perplexity, experts a token took
        while it was measured, the error of the layers before and after training, and how long that took.
    """
    model = language_model.model.requires_grad_(False)
    dense = feed_forward_layers(model)
    calibration = windows_of(
        language_model.encode(texts.calibration), settings.calibration_windows, settings.window_size
    )
    evaluation = windows_of(language_model.encode(texts.evaluation), settings.evaluation_windows, settings.window_size)
    active = settings.active_experts
    with torch.no_grad(), recorded_inputs(dense) as seen:
        for window in progress(calibration, "calibration: reading"):
            model.model(window[None], use_cache=False)
    tokens = [torch.cat(windows) for windows in seen]

    def split(mlp: nn.Module, x: Tensor) -> MoEFeedForward:
        return split_dense(mlp, settings.num_experts, active, x)

    layers = [split(mlp, x) for mlp, x in progress(list(zip(dense, tokens, strict=True)), "splitting")]
    untrained = [layer.router for layer in layers]
    try:
        result = {
            "model": language_model.name,
            "num_layers": len(dense),
            "num_experts": settings.num_experts,
            "active_experts": active,
            "calibration_tokens": calibration.numel(),
            "evaluation_tokens": evaluation.numel(),
            "dense": measure(model, dense, evaluation, progress, "reading: dense"),
            "untrained": measure(model, layers, evaluation, progress, "reading: not trained"),
        }
        for number, layer in enumerate(layers):
            layer.routing = at_random(settings.num_experts, active, seed, number)
        result["random"] = measure(model, layers, evaluation, progress, "reading: at random")
        result["rows"] = []
        for name, kind in kinds(active).items():
            begin = time.perf_counter()
            torch.manual_seed(seed)
            errors = []
            for number in progress(range(len(layers)), f"training: {name}"):
                layer, x = layers[number], tokens[number]
                layer.router = (
                    kind.router(layer.hidden_size, layer.num_experts)
                    if kind.router
                    else copy.deepcopy(untrained[number])
                )
                set_routing(layer, kind, x, active)  # trained at the FLOPs at which it will run
                errors.append(train_router(layer, dense[number], x, settings, seed))
                set_routing(layer, kind, x, active)
            row = {"kind": name, "train_seconds": time.perf_counter() - begin}
            row["first_error"], row["last_error"] = (mean_of(errors, part) for part in (slice(0, 5), slice(-5, None)))
            result["rows"].append(row | measure(model, layers, evaluation, progress, f"reading: {name}"))
    finally:
        set_feed_forward_layers(model, dense)
    return result


def mean_of(errors: list[list[float]], part: slice) -> float:
    """Mean over the layers and over a part of the steps."""
    return sum(sum(steps[part]) / len(steps[part]) for steps in errors) / len(errors)


@torch.no_grad()
def measure(model: nn.Module, layers: list[nn.Module], windows: Tensor, progress, description: str) -> dict:
    """Loss, perplexity and the experts that a token took, with ``layers`` in the model."""
    set_feed_forward_layers(model, layers)
    split = nn.ModuleList(layer for layer in layers if isinstance(layer, MoEFeedForward))
    losses = []
    with ModuleStatistics(split) if split else nullcontext() as statistics:
        for window in progress(windows, description):
            logits = model(window[None], use_cache=False).logits[0]
            losses.append(loss_of(logits, window))
    loss = sum(losses) / len(losses)
    measured = {"loss": loss, "perplexity": math.exp(loss)}
    if statistics is not None:
        pairs = sum(counts.sum().item() for counts in statistics.counts.values())
        measured["experts_per_token"] = pairs / sum(tokens.sum().item() for tokens in statistics.tokens.values())
    return measured
