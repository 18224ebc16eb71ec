"""Transformers models whose feed-forward layers are split into experts, of classes that save and load."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from moe_kernels._checks import shape_error, value_error
from moe_kernels.activation import Activation
from moe_kernels.nn.feed_forward import MoEFeedForward

#: dense model types of transformers whose layers can be split: their decoder layers hold ``mlp``
DENSE_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def split_model(
    op: str, model: nn.Module, calibration: Tensor, split_layer: Callable[[nn.Module, Tensor], MoEFeedForward], progress
) -> nn.Module:
    """A copy of ``model`` with every feed-forward layer replaced by ``split_layer(mlp, the tokens it sees)``.

    Args:
        calibration: [num_windows, window_size] token ids.
        progress: wraps an iterable and shows how far it is; called as ``progress(iterable, description)``.
    """
    if model.config.model_type not in DENSE_TYPES:
        raise value_error(op, "mlp", f"a transformers {', '.join(DENSE_TYPES)}", model.config.model_type)
    if calibration.dim() != 2 or calibration.dtype not in (torch.int32, torch.int64):
        raise shape_error(op, "calibration", "[num_windows, window_size] token ids for a whole model", calibration)
    split = copy.deepcopy(model)
    mlps = [layer.mlp for layer in split.model.layers]
    with recorded_inputs(mlps) as seen:
        for window in progress(calibration.to(model.device), "calibration: reading"):
            split.model(window[None], use_cache=False)
    for layer, tokens in zip(progress(split.model.layers, "calibration: splitting"), seen, strict=True):
        layer.mlp = split_layer(layer.mlp, torch.cat(tokens))
        tokens.clear()
    split_class = split_classes()[model.config.model_type]
    dense_config = split.config
    fields = {
        name: value for name, value in dense_config.to_dict().items() if name not in ("model_type", "architectures")
    }
    config = split_class.config_class(**fields, split=describe(split))
    config._attn_implementation = dense_config._attn_implementation
    for module in split.modules():
        if getattr(module, "config", None) is dense_config:
            module.config = config
    split.__class__ = split_class
    return split


def describe(model: nn.Module) -> dict:
    """What makes the split layers of ``model`` anew, one entry a layer; plain values, for its configuration."""
    layers = [layer.mlp for layer in model.model.layers]
    return {
        "num_experts": [layer.num_experts for layer in layers],
        "intermediate_size": [layer.down_proj.shape[2] for layer in layers],
        "top_k": [layer.top_k for layer in layers],
        "activation": layers[0].activation.kind,
    }


@cache
def split_classes() -> dict[str, type]:
    """The class of the split model for each of :data:`DENSE_TYPES`, made when first asked for."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return {
        model_type: _split_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.for_model(model_type))])
        for model_type in DENSE_TYPES
    }


def _split_class(dense_class: type) -> type:
    dense_config_class = dense_class.config_class

    class Config(dense_config_class):
        # of its own, so that the dense class cannot load it with layers that are silently new
        model_type = f"moe_kernels_split_{dense_config_class.model_type}"

    class Split(dense_class):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            recipe = config.split
            for index, layer in enumerate(self.model.layers):
                layer.mlp = MoEFeedForward(
                    config.hidden_size,
                    recipe["intermediate_size"][index],
                    recipe["num_experts"][index],
                    recipe["top_k"][index],
                    activation=Activation(kind=recipe["activation"]),
                    weighted=False,
                    router_bias=True,
                )
            self.post_init()

        def save_pretrained(self, *arguments, **options):
            self.config.split = describe(self)  # top_k may have been changed since, or experts pruned
            return super().save_pretrained(*arguments, **options)

    for made, original in ((Config, dense_config_class), (Split, dense_class)):
        made.__name__ = made.__qualname__ = f"Split{original.__name__}"
    return Split


@contextmanager
def recorded_inputs(mlps: list[nn.Module]):
    """Collects, for each of ``mlps``, the tokens that it sees: a list of lists of [num_tokens, hidden_size]."""
    seen: list[list[Tensor]] = [[] for _ in mlps]

    def recorder(tokens: list[Tensor]):
        return lambda _, args: tokens.append(args[0].reshape(-1, args[0].shape[-1]).clone())

    hooks = [mlp.register_forward_pre_hook(recorder(tokens)) for mlp, tokens in zip(mlps, seen, strict=True)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
