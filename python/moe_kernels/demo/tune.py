"""``demo tune``: experts switched off and on by what they are used for, and what that changes."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from moe_kernels import route, tune_experts
from moe_kernels.demo.model import LanguageModel, feed_forward_layers, loss_of, set_feed_forward_layers, split_model
from moe_kernels.demo.perplexity import windows_of
from moe_kernels.demo.settings import TuneSettings
from moe_kernels.demo.text import Texts
from moe_kernels.nn import ModuleStatistics, MoEFeedForward

Experts = list[tuple[int, int]]  # (layer, expert)


@torch.inference_mode()
def run(language_model: LanguageModel, kinds: dict[str, Texts], settings: TuneSettings, seed: int, progress) -> dict:
    """Counts which experts each of two kinds of text takes, switches the most distinctive ones, and reads both again.

    Args:
        kinds: name -> its text, two of them. Experts are made and counted on the calibration part.

    Returns:
        ``rows``: for each number of switched experts and each choice of them, the perplexity of both kinds;
        ``untouched`` without any switch; ``distinctive``: the most distinctive experts of each kind: layer,
        expert, difference of the shares of tokens that take it.
    """
    model = language_model.model
    dense = feed_forward_layers(model)
    names = list(kinds)
    parts = [[windows_of(language_model.encode(text), settings.windows, settings.window_size) for text in texts]
             for texts in kinds.values()]  # fmt: skip
    split = split_model(model, torch.cat([calibration for calibration, _ in parts]), settings.num_experts, progress)
    evaluation = {name: part[1] for name, part in zip(names, parts, strict=True)}
    switch(split, settings.top_k, [], [])
    try:
        set_feed_forward_layers(model, split)
        with ModuleStatistics(nn.ModuleList(split)) as statistics:
            for label, (calibration, _) in enumerate(parts):
                with statistics.label(label):
                    for window in progress(calibration, f"counting: {names[label]}"):
                        model.model(window[None], use_cache=False)
        distinctive = {name: ranked(statistics, label) for label, name in enumerate(names)}
        generator = torch.Generator().manual_seed(seed)
        everyone = torch.randperm(len(split) * settings.num_experts, generator=generator).tolist()
        at_random = [divmod(number, settings.num_experts) for number in everyone]

        result = {
            "model": language_model.name,
            "kinds": names,
            "num_layers": len(split),
            "num_experts": settings.num_experts,
            "top_k": settings.top_k,
            "tokens_of_each_kind": evaluation[names[0]].numel(),
            "untouched": perplexities(model, evaluation, progress, "reading"),
            "distinctive": {name: experts[: settings.num_listed] for name, experts in distinctive.items()},
            "rows": [],
        }
        for amount in settings.num_switched:
            choices: dict[str, tuple[Experts, Experts]] = {"off: at random": (at_random[:amount], [])}
            for name, experts in distinctive.items():
                best = [(layer, expert) for layer, expert, _ in experts[:amount]]
                choices[f"off: {name}'s"] = (best, [])
                choices[f"on: {name}'s"] = ([], best)
            for choice, (off, forced) in choices.items():
                switch(split, settings.top_k, off, forced)
                row = {"switched": amount, "choice": choice}
                row["perplexity"] = perplexities(model, evaluation, progress, f"reading, {amount} {choice}")
                result["rows"].append(row)
    finally:
        set_feed_forward_layers(model, dense)
    return result


def ranked(statistics: ModuleStatistics, label: int) -> list[tuple[int, int, float]]:
    """All experts, those that kind ``label`` takes more than the other kind first."""
    return [(int(layer), expert, difference) for layer, expert, difference in statistics.distinctive(label, 1 - label)]


def switch(layers: list[MoEFeedForward], top_k: int, off: Experts, forced: Experts) -> None:
    """Takes experts out of their layers, or into every token's choice; every token still takes ``top_k``."""
    for number, layer in enumerate(layers):
        bias = tune_experts(
            layer.num_experts,
            off=[expert for at, expert in off if at == number],
            forced=[expert for at, expert in forced if at == number],
        )
        layer.routing = partial(route, top_k=top_k, expert_bias=bias)


def perplexities(model: nn.Module, evaluation: dict[str, Tensor], progress, description: str) -> dict[str, float]:
    """Perplexity of each kind of text."""
    found = {}
    for name, windows in evaluation.items():
        losses = []
        for window in progress(windows, f"{description}: {name}"):
            logits = model(window[None], use_cache=False).logits[0]
            losses.append(loss_of(logits, window))
        found[name] = math.exp(sum(losses) / len(losses))
    return found
