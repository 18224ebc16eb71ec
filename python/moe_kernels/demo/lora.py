"""``demo lora``: adapters trained together in mixed batches, then served in one, beside each alone and beside PEFT."""

import copy
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.demo.model import LanguageModel
from moe_kernels.demo.perplexity import windows_of
from moe_kernels.demo.settings import LoraSettings
from moe_kernels.demo.text import Texts
from moe_kernels.demo.timing import in_turn
from moe_kernels.integrations.peft import PeftAdapters, load_peft_adapters, new_peft_adapter

#: a part of a batch: token ids [sequences, window_size], and the adapter of each sequence (None: the base model)
Part = tuple[Tensor, Sequence[str | None]]
#: the logits of a part; further arguments go to the model
Forward = Callable[..., Tensor]


def run(
    language_model: LanguageModel, kinds: dict[str, Texts], settings: LoraSettings, seed: int, folder: Path, progress
) -> dict:
    """Trains one adapter for each kind of text, all in the same batches; writes them; reads, compares and times them.

    Args:
        kinds: name -> its text; an adapter is trained on the calibration part and measured on the evaluation part.
        folder: where the adapters are written, as PEFT writes them.

    Returns:
        ``adapters``: rank, layers, bytes, losses of each; ``perplexity``: of each text with each adapter and without;
        ``difference``: of the logits of one mixed batch to those of each part alone, and to PEFT's; ``milliseconds`` of
        prefill, decode and a training step; ``continuations`` of one prompt.
    """
    model = language_model.model.requires_grad_(False)
    names = list(kinds)
    paths = {name: folder / name for name in names}
    for number, name in enumerate(names):
        rank, targets = settings.adapters[number]
        new_peft_adapter(model, paths[name], targets, rank=rank, seed=seed + number)
    peers = {"PEFT": Peft(model)} if importlib.util.find_spec("peft") else {}
    served = load_peft_adapters(model, paths, num_slots=len(names))
    try:
        result = {"model": language_model.name, "settings": asdict(settings), "kinds": names}
        calibration = {name: language_model.encode(kinds[name].calibration) for name in names}
        losses = train(model, served, calibration, settings, seed, progress)
        for name in names:
            served.export(name, paths[name])
        result["adapters"] = {
            name: {
                "rank": settings.adapters[number][0],
                "target_modules": settings.adapters[number][1],
                "bytes": (paths[name] / "adapter_model.safetensors").stat().st_size,
                "losses": losses[name],
            }
            for number, name in enumerate(names)
        }
        evaluation = {
            name: windows_of(
                language_model.encode(kinds[name].evaluation), settings.evaluation_windows, settings.window_size
            )
            for name in names
        }
        with torch.inference_mode():
            result["perplexity"] = perplexities(model, served, evaluation, progress)
        # a window of each text with its own adapter, and one without any
        sequences = torch.cat([windows[: settings.batch_size] for windows in evaluation.values()])
        users = [name for name in names for _ in range(len(sequences) // len(names))]
        batch = torch.cat([sequences, sequences[:1]]), [*users, None]
        for peer in peers.values():
            peer.load(paths)

        def ours(ids: Tensor, users: Sequence[str | None], **arguments) -> Tensor:
            served.use(users)
            return model(ids, **arguments).logits

        forwards = {"moe_kernels": ours} | {name: peer.forward for name, peer in peers.items()}
        with torch.inference_mode():
            result["difference"] = differences(forwards, batch, model, served)
            result["milliseconds"] = {
                "prefill": prefill_times(forwards, batch, settings, progress),
                "decode": decode_times(forwards, batch, settings, progress),
            }
            result["continuations"] = continuations(language_model, ours, [None, *names], settings)
        result["milliseconds"]["training step"] = training_times(model, served, peers, batch, settings, progress)
        result["sequences"] = len(batch[1])
    finally:
        served.restore()
    return result


class Peft:
    """PEFT's own model over the same weights."""

    def __init__(self, model: nn.Module):
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.base = copy.deepcopy(model, shared)  # other modules, the same memory

    def load(self, paths: dict[str, Path]) -> None:
        import peft

        first, *others = paths
        self.model = peft.PeftModel.from_pretrained(self.base, paths[first], adapter_name=first, is_trainable=True)
        for name in others:
            self.model.load_adapter(paths[name], adapter_name=name, is_trainable=True)
        self.model.eval()

    def forward(self, ids: Tensor, users: Sequence[str | None], **arguments) -> Tensor:
        """One user is served by PEFT's own layers, several by its ``adapter_names``."""
        if len(set(users)) > 1:
            return self.model(ids, adapter_names=[user or "__base__" for user in users], **arguments).logits
        if users[0] is None:
            with self.model.disable_adapter():
                return self.model(ids, **arguments).logits
        if self.model.active_adapter != users[0]:
            self.model.set_adapter(users[0])
        return self.model(ids, **arguments).logits


def train(
    model: nn.Module, served: PeftAdapters, texts: dict[str, Tensor], settings: LoraSettings, seed: int, progress
) -> dict[str, list[float]]:
    """Trains all adapters at once: a batch holds ``batch_size`` windows of each text, each with its own adapter.

    Returns:
        The losses of each adapter.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(served.requires_grad_().parameters(), lr=settings.learning_rate)
    users = [name for name in texts for _ in range(settings.batch_size)]
    losses: dict[str, list[float]] = {name: [] for name in texts}
    served.use(users)
    for _ in progress(range(settings.num_steps), f"training {len(texts)} adapters"):
        windows = []
        for ids in texts.values():
            starts = torch.randint(ids.numel() - settings.window_size, (settings.batch_size,), generator=generator)
            windows += [ids[start : start + settings.window_size] for start in starts.tolist()]
        of_sequences = sequence_losses(model(torch.stack(windows), use_cache=False).logits, torch.stack(windows))
        of_adapters = of_sequences.view(len(texts), settings.batch_size).mean(1)
        optimizer.zero_grad()
        of_adapters.sum().backward()  # a sum: each adapter gets the gradient that it would get alone
        optimizer.step()
        for name, loss in zip(texts, of_adapters.tolist(), strict=True):
            losses[name].append(loss)
    served.requires_grad_(False)
    return losses


def sequence_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """[batch]: the mean loss of each sequence."""
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.mean(1)


def perplexities(model: nn.Module, served: PeftAdapters, evaluation: dict[str, Tensor], progress) -> dict:
    """Text -> adapter ("" for none) -> perplexity. A mixed batch holds a window for every adapter."""
    users = [None, *evaluation]
    served.use(users)
    found = {}
    for text, windows in evaluation.items():
        losses = []
        for window in progress(windows, f"reading: {text}"):
            ids = window.expand(len(users), -1)
            losses.append(sequence_losses(model(ids, use_cache=False).logits, ids))
        means = torch.stack(losses).mean(0).tolist()
        found[text] = {user or "": math.exp(loss) for user, loss in zip(users, means, strict=True)}
    return found


def parts_of(batch: Part) -> list[Part]:
    """The sequences of each adapter."""
    ids, users = batch
    rows = {user: [row for row, other in enumerate(users) if other == user] for user in users}
    return [(ids[row], [user] * len(row)) for user, row in rows.items()]


def differences(forwards: dict[str, Forward], batch: Part, model: nn.Module, served: PeftAdapters) -> dict[str, float]:
    """Largest differences of logits, relative to the largest logit.

    ``base model, batch to parts`` is how much PyTorch's own products differ between a batch and its parts.
    """
    ours = forwards["moe_kernels"]
    mixed = ours(*batch, use_cache=False)
    scale = mixed.abs().max()
    alone = [ours(*part, use_cache=False) for part in parts_of(batch)]

    def difference(others: Tensor) -> float:
        return ((mixed - others).abs().max() / scale).item()

    served.use(None)
    base, base_parts = (
        torch.cat([model(ids, use_cache=False).logits for ids, _ in parts]) for parts in ([batch], parts_of(batch))
    )
    found = {
        "mixed batch to each adapter alone": difference(torch.cat(alone)),
        "base model, batch to parts": ((base - base_parts).abs().max() / base.abs().max()).item(),
        "mixed batch to no adapters": difference(base),
    }
    for name, forward in forwards.items():
        if name != "moe_kernels":
            parts = torch.cat([forward(*part, use_cache=False) for part in parts_of(batch)])
            found[f"mixed batch to {name}, each adapter alone"] = difference(parts)
            found[f"mixed batch to {name}'s"] = difference(forward(*batch, use_cache=False))
    return found


def ways(forwards: dict[str, Forward], batch: Part) -> dict[str, tuple[Forward, list[Part]]]:
    """Every way to run the batch: without adapters, mixed and one adapter after the other."""
    ids, users = batch
    found = {"base model": (forwards["moe_kernels"], [(ids, [None] * len(users))])}
    for name, forward in forwards.items():
        found[f"{name}, mixed batch"] = (forward, [batch])
        found[f"{name}, one adapter after the other"] = (forward, parts_of(batch))
    return found


def prefill_times(forwards: dict[str, Forward], batch: Part, settings: LoraSettings, progress) -> dict[str, float]:
    """Milliseconds to read the whole batch."""

    def call(forward: Forward, parts: list[Part]) -> Callable[[], None]:
        return lambda: [forward(*part, use_cache=False, logits_to_keep=1) for part in parts] and None

    calls = {name: call(*way) for name, way in ways(forwards, batch).items()}
    return in_turn(calls, settings.repeats, progress, "timing prefill")


def decode_times(forwards: dict[str, Forward], batch: Part, settings: LoraSettings, progress) -> dict[str, float]:
    """Milliseconds for one more token of every sequence."""
    from transformers import DynamicCache

    def call(forward: Forward, parts: list[Part]) -> Callable[[], None]:
        caches = [DynamicCache() for _ in parts]
        for (ids, users), cache in zip(parts, caches, strict=True):
            forward(ids, users, **cached(cache), use_cache=True, logits_to_keep=1)

        def step() -> None:
            for (ids, users), cache in zip(parts, caches, strict=True):
                forward(ids[:, :1], users, **cached(cache), use_cache=True)
                cache.crop(-1)

        return step

    calls = {name: call(*way) for name, way in ways(forwards, batch).items()}
    return in_turn(calls, 3 * settings.repeats, progress, "timing decode")


def training_times(
    model: nn.Module, served: PeftAdapters, peers: dict[str, Peft], batch: Part, settings: LoraSettings, progress
) -> dict[str, float]:
    """Milliseconds of forward and backward for all adapters. PEFT trains one adapter at a time."""
    parts = [part for part in parts_of(batch) if part[1][0] is not None]
    mixed = torch.cat([ids for ids, _ in parts]), [user for _, users in parts for user in users]
    served.requires_grad_()

    def ours() -> None:
        served.use(mixed[1])
        sequence_losses(model(mixed[0], use_cache=False).logits, mixed[0]).sum().backward()

    def theirs(peer: Peft) -> None:
        for ids, users in parts:
            sequence_losses(peer.forward(ids, users, use_cache=False), ids).sum().backward()

    calls: dict[str, Callable[[], None]] = {"moe_kernels, mixed batch": ours}
    for name, peer in peers.items():
        calls[f"{name}, one adapter after the other"] = lambda peer=peer: theirs(peer)
    found = in_turn(calls, settings.repeats, progress, "timing training steps")
    served.requires_grad_(False)
    return found


def cached(cache) -> dict:
    """The argument that gives a model its cache; transformers 5.24 calls it ``cache``."""
    from transformers import LlamaForCausalLM

    named = "cache" in inspect.signature(LlamaForCausalLM.forward).parameters
    return {"cache" if named else "past_key_values": cache}


def continuations(
    language_model: LanguageModel, ours: Forward, users: list[str | None], settings: LoraSettings
) -> dict[str, str]:
    """The likeliest tokens after one prompt, of all users in one batch."""
    from transformers import DynamicCache

    ids = language_model.encode(settings.prompt).expand(len(users), -1)
    prompt_length, cache, step = ids.shape[1], DynamicCache(), ids
    for _ in range(settings.new_tokens):
        logits = ours(step, users, **cached(cache), use_cache=True)
        step = logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, step], 1)
    texts = [language_model.tokenizer.decode(row[prompt_length:].tolist()) for row in ids]
    return {user or "": text for user, text in zip(users, texts, strict=True)}
