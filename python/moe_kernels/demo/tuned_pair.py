"""A small model trained on the large one's tokens, before and after tuning, and what the large one makes of the two."""

import copy
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.demo.model import LanguageModel
from moe_kernels.demo.perplexity import windows_of
from moe_kernels.demo.settings import LogitSettings
from moe_kernels.demo.text import Texts
from moe_kernels.ops.logit_fusion import dynamic_fusion, dynamic_solution, presets


def run(
    language_model: LanguageModel,
    kinds: Mapping[str, Texts],
    settings: LogitSettings,
    seed: int,
    generate: Callable[..., dict],
    progress,
) -> dict:
    """Trains the pair, reads with it and writes with it.

    Returns:
        ``training``: losses of both trainings; ``losses``: on each text, of the three models and of their fusion at
        each scale and at the solved one; ``best``: the scale with the smallest loss on the last text; ``texts``: what
        is written after the prompt without and with; ``drafted``: the same drafted by the small model.
    """
    from moe_kernels.integrations.transformers import fusions

    *before, last = kinds
    begin = time.perf_counter()
    ids = {name: language_model.encode(text.calibration) for name, text in kinds.items()}
    untuned = small_model(language_model.model, settings.hidden_size, seed)
    both = torch.cat([ids[name] for name in before])
    training = {"untuned": train(untuned, both, settings.base_steps, settings, seed, progress)}
    tuned = copy.deepcopy(untuned)
    training["tuned"] = train(tuned, ids[last], settings.tuning_steps, settings, seed, progress)
    result = {
        "before": before,
        "last": last,
        "num_parameters": sum(p.numel() for p in tuned.parameters()),
        "seconds": time.perf_counter() - begin,
        "training": training,
    }

    models = {"large": language_model.model, "tuned": tuned, "untuned": untuned}
    result["losses"] = {
        name: losses(models, language_model.encode(text.evaluation), settings)
        for name, text in progress(kinds.items(), "reading with scales")
    }
    scales = {scale: result["losses"][last][f"scale {scale:g}"] for scale in settings.scales}
    best = result["best"] = min(scales, key=scales.get)

    def weigh(base: Tensor, *pair: Tensor) -> Tensor:
        return dynamic_solution(base, [pair]).alpha

    prompt = language_model.encode(settings.prompt)
    pairs = [(tuned, untuned)]
    ways = {
        "large alone": {},
        f"scale {best:g}": {"fusion": fusions.emulated_fine_tuning(pairs, [best])},
        "solved": {"fusion": fusions.dynamic_fusion(pairs), "weigh": weigh},
    }
    result["texts"] = {
        name: generate(language_model, prompt, settings.new_tokens, **how)
        for name, how in progress(ways.items(), "writing")
    }
    calls: list[int] = []
    hook = language_model.model.register_forward_hook(lambda *_: calls.append(1))
    drafting = fusions.emulated_fine_tuning(pairs, [best], num_draft=settings.num_draft)
    drafted = generate(language_model, prompt, settings.new_tokens, drafting)
    hook.remove()
    result["drafted"] = drafted | {
        "calls": len(calls) - 1,  # the first reads the prompt
        "is_the_same": drafted["text"] == result["texts"][f"scale {best:g}"]["text"],
    }
    return result


def small_model(large: nn.Module, hidden_size: int, seed: int) -> nn.Module:
    """Two layers on the large model's tokens; their embeddings are the large one's, on its main axes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    embeddings = large.get_input_embeddings().weight.detach().float()
    config = LlamaConfig(
        vocab_size=embeddings.shape[0],
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=large.config.max_position_embeddings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        small = LlamaForCausalLM(config)
        _, _, axes = torch.pca_lowrank(embeddings, min(hidden_size, *embeddings.shape), niter=2)
    projected = embeddings @ axes
    with torch.no_grad():
        # of the size that training from nothing would begin with, or few steps lead nowhere
        small.get_input_embeddings().weight[:, : axes.shape[1]] = 0.05 * projected / projected.std()
    return small


def train(model: nn.Module, ids: Tensor, num_steps: int, settings: LogitSettings, seed: int, progress) -> list[float]:
    """The loss of each step of Adam on windows of the text."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    model.train()
    found = []
    for _ in progress(range(num_steps), "training the small model"):
        starts = torch.randint(ids.numel() - settings.window_size, (settings.batch_size,), generator=generator)
        batch = torch.stack([ids[start : start + settings.window_size] for start in starts.tolist()])
        loss = mean_loss(model(batch, use_cache=False).logits, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    model.eval()
    return found


@torch.inference_mode()
def losses(models: Mapping[str, nn.Module], ids: Tensor, settings: LogitSettings) -> dict[str, float]:
    """Mean loss of each model and of each fusion on windows of the text, and the mean of the solved weights."""
    windows = windows_of(ids, settings.evaluation_windows, settings.evaluation_size)
    found: dict[str, list[float]] = {}
    for window in windows:
        logits = {name: model(window[None], use_cache=False).logits[0] for name, model in models.items()}
        large, *pair = logits.values()
        pair = tuple(pair)
        row = dict(logits)
        for scale in settings.scales:
            row[f"scale {scale:g}"] = presets.emulated_fine_tuning(large, [pair], [scale])
        row["solved"] = dynamic_fusion(large, [pair])
        for name, of in row.items():
            found.setdefault(name, []).append(mean_loss(of[None], window[None]).item())
        found.setdefault("solved weight", []).append(dynamic_solution(large, [pair]).alpha.mean().item())
    return {name: sum(of) / len(of) for name, of in found.items()}


def mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Of predicting each token [batch, length] from those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
