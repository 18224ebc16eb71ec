"""A new adapter, ready to be trained."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from moe_kernels.integrations.peft.folder import PREFIX


def new_peft_adapter(
    model: nn.Module,
    path: str | Path,
    target_modules: Sequence[str],
    *,
    rank: int = 8,
    lora_alpha: float | None = None,
    seed: int = 0,
) -> None:
    """Writes a folder with a LoRA adapter that leaves the model as it is: A at random, B zero, as PEFT starts one.

    :func:`load_peft_adapters` reads it and :meth:`PeftAdapters.parameters` trains it, together with others.

    Args:
        model: the base model, for the shapes and the dtype.
        path: the folder; its two files are written over.
        target_modules: names of linear layers, or the ends of their names.
        rank: of every layer.
        lora_alpha: the scale is ``lora_alpha / rank``; default: twice the rank.
        seed: of A.

    Raises:
        ValueError: a target that no linear layer of the model has.
    """
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors, missing = {}, set(target_modules)
    for name, module in model.named_modules():
        found = [target for target in target_modules if name == target or name.endswith("." + target)]
        if not found or not isinstance(module, nn.Linear):
            continue
        missing -= set(found)
        # nn.Linear's own start: uniform within 1 / sqrt(in)
        a = (2 * torch.rand(rank, module.in_features, generator=generator) - 1) / math.sqrt(module.in_features)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.to(module.weight.dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.zeros(module.out_features, rank, dtype=module.weight.dtype)
    if missing or not tensors:
        unmatched = ", ".join(sorted(missing)) or "none"
        raise ValueError(f"new_peft_adapter: target_modules must be names of linear layers, got {unmatched}")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", "") or None,
        "r": rank,
        "lora_alpha": 2 * rank if lora_alpha is None else lora_alpha,
        "target_modules": list(target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    Path(path).mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(Path(path) / "adapter_model.safetensors"), metadata={"format": "pt"})
    (Path(path) / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
