"""``demo taskvector``: a model fine-tuned on two texts; what each changed, compressed, merged, switched and undone."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_kernels import PackedDelta, compare, compress
from moe_kernels.demo.lora import sequence_losses
from moe_kernels.demo.model import LanguageModel
from moe_kernels.demo.perplexity import windows_of
from moe_kernels.demo.settings import TaskVectorSettings
from moe_kernels.demo.text import Texts
from moe_kernels.demo.timing import in_turn
from moe_kernels.integrations.safetensors import load_task_vectors, save_task_vectors
from moe_kernels.nn import ExpertSwitcher

State = dict[str, Tensor]


def run(
    language_model: LanguageModel,
    kinds: Mapping[str, Texts],
    settings: TaskVectorSettings,
    seed: int,
    folder: Path,
    progress,
) -> dict:
    """Fine-tunes on each text, compresses each task vector at several densities, and reads with them.

    Args:
        kinds: name -> its text; fine-tuned on the calibration part and measured on the evaluation part.
        folder: where the compressed task vectors are written, and read from.

    Returns:
        ``loss`` of the base and of each fine-tune on each text; ``rows``, for each text and density: bytes, bits a
        parameter, and the loss on that text at each alpha; ``merged``: of both at once; ``agreement`` of the two;
        ``milliseconds`` of switches, ``undo_bytes``, and ``restored``: whether every bit of the base came back.
    """
    # the weights are changed in place, and a task vector fits any model of these weights, so bfloat16 will do
    model = nn.Module.to(language_model.model, torch.bfloat16)  # transformers refuses to cast what came from GGUF
    names = list(kinds)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name: language_model.encode(kinds[name].calibration) for name in names}
    windows = {
        name: windows_of(
            language_model.encode(kinds[name].evaluation), settings.evaluation_windows, settings.window_size
        )
        for name in names
    }
    result: dict = {"model": language_model.name, "settings": asdict(settings), "kinds": names}
    result["num_parameters"] = sum(parameter.numel() for parameter in model.parameters())
    result["loss"] = {"base": losses(model, windows)}

    switcher = ExpertSwitcher(model)
    result["rows"], vectors = [], {}
    for name in names:
        tuned = finetune(model, trained[name], settings, seed, progress, name)
        model.load_state_dict(tuned)
        result["loss"][name] = losses(model, windows)
        model.load_state_dict(base)
        deltas = {key: tuned[key].float() - base[key].float() for key in parameters(model)}
        del tuned
        for density in progress(settings.densities, f"compressing {name}"):
            path = folder / f"{name}-{density:g}.safetensors"
            save_task_vectors(path, compress(deltas, density), {"density": f"{density:g}", "text": name})
            vectors[name, density] = load_task_vectors(path)
            switcher.add(f"{name}-{density:g}", vectors[name, density])
            size = sum(delta.nbytes for delta in vectors[name, density].values())
            result["rows"].append({"kind": name, "density": density, "bytes": size})

    for row in progress(result["rows"], "reading with each density and alpha"):
        expert = f"{row['kind']}-{row['density']:g}"
        row["bits"] = 8 * row["bytes"] / sum(delta.numel for delta in vectors[row["kind"], row["density"]].values())
        row["losses"] = {}
        for alpha in settings.alphas:
            switcher.switch({expert: alpha})
            row["losses"][alpha] = losses(model, {row["kind"]: windows[row["kind"]]})[row["kind"]]
        row["alpha"] = min(row["losses"], key=row["losses"].get)
    best = {
        name: min((row for row in result["rows"] if row["kind"] == name), key=lambda row: min(row["losses"].values()))
        for name in names
    }
    both = {f"{name}-{best[name]['density']:g}": best[name]["alpha"] for name in names}
    switcher.switch(both)
    result["merged"] = {"experts": both, "loss": losses(model, windows)}
    result["undo_bytes"] = switcher.undo_bytes
    density = max(settings.densities)
    result["agreement"] = agreement(*(vectors[name, density] for name in names[:2])) | {"density": density}
    result["milliseconds"] = in_turn(
        {
            f"switch to {names[0]}": lambda: switcher.switch({next(iter(both)): 1.0}),
            "switch to both": lambda: switcher.switch(both),
            "restore the base": switcher.restore,
        },
        settings.repeats,
        progress,
        "switching",
    )
    switcher.restore()
    state = model.state_dict()
    result["restored"] = all(torch.equal(state[key].view(torch.int16), base[key].view(torch.int16)) for key in base)
    return result


def parameters(model: nn.Module) -> list[str]:
    """Names of the parameters, those that are tied once."""
    return [name for name, _ in model.named_parameters()]


def finetune(
    model: nn.Module, ids: Tensor, settings: TaskVectorSettings, seed: int, progress, description: str
) -> State:
    """The state dict after some steps of Adam on windows of the text; the moments are float32, the weights too."""
    trained = nn.Module.to(model, torch.float32).train()
    try:
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(trained.parameters(), lr=settings.learning_rate)
        for _ in progress(range(settings.num_steps), f"fine-tuning on {description}"):
            starts = torch.randint(ids.numel() - settings.window_size, (settings.batch_size,), generator=generator)
            batch = torch.stack([ids[start : start + settings.window_size] for start in starts.tolist()])
            loss = sequence_losses(trained(batch, use_cache=False).logits, batch).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        return {name: tensor.to(torch.float32).clone() for name, tensor in trained.state_dict().items()}
    finally:
        nn.Module.to(model, torch.bfloat16).eval()


@torch.inference_mode()
def losses(model: nn.Module, windows: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean loss on each text, window by window."""
    return {
        name: math.fsum(sequence_losses(model(one[None], use_cache=False).logits, one[None]).item() for one in of)
        / len(of)
        for name, of in windows.items()
    }


def agreement(first: Mapping[str, PackedDelta], second: Mapping[str, PackedDelta]) -> dict:
    """Shares of the kept entries, over all tensors."""
    found = compare(first, second)
    return {
        "both": found.both / max(sum(delta.nnz for delta in first.values()), 1),
        "opposite": (found.both - found.agree) / max(found.both, 1),
    }
