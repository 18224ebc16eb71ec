"""A mixture of experts from dense models: :func:`upcycle`."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_kernels._checks import shape_error, value_error
from moe_kernels.nn.feed_forward import MoEFeedForward
from moe_kernels.nn.split import dense_weights, recognize_activation

_OP = "upcycle"

#: dense model types of transformers -> the mixture that computes the same but for its feed-forward layers
MIXTURES = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}


@torch.no_grad()
def upcycle(
    models: nn.Module | Sequence[nn.Module],
    num_experts: int,
    top_k: int,
    *,
    rest: str = "average",
    router_std: float = 0.02,
    seed: int = 0,
) -> nn.Module:
    """Makes a mixture of experts whose experts are the feed-forward layers of dense models.

    ::

        expert e = the feed-forward layer of models[e % len(models)]
        router   = drawn from a normal distribution of standard deviation router_std
        all else = models[0]'s, or the mean over the models (rest="average")

    Weights of a token's experts sum to 1, so the mixture of one model computes what that model does. Train from there.

    ====================================  ===========================================================================
    sparse upcycling                      one model
    CLIP-MoE (diversified multiplets)     models that were fine-tuned in turn, all but their feed-forward layers
                                          shared; ``rest="first"``
    Branch-Train-Mix, BAM's FFN experts   models that were trained apart, each on its domain; ``rest="average"``
    ====================================  ===========================================================================

    Args:
        models: a dense transformers model (Llama, Mistral, Qwen3) or several of one configuration; or plain gated
            layers with ``gate_proj``, ``up_proj``, ``down_proj`` and ``act_fn``. They are not changed.
        num_experts: a multiple of the number of models.
        top_k: experts for each token, 1 to num_experts.
        rest: "average" or "first".
        router_std: of the router's weights.
        seed: of the draw.

    Returns:
        For transformers models a Mixtral or Qwen3-MoE model (``save_pretrained``, ``from_pretrained``), for plain
        layers a :class:`MoEFeedForward`; dtype and device of the first.

    Sources: Komatsuzaki et al., "Sparse Upcycling", arXiv 2212.05055; CLIP-MoE, arXiv 2409.19291; BAM, arXiv
    2408.08274; Branch-Train-MiX, arXiv 2403.07816.
    """
    models = [models] if isinstance(models, nn.Module) else list(models)
    if not models:
        raise value_error(_OP, "models", "at least one", 0)
    if num_experts < 1 or num_experts % len(models):
        raise value_error(_OP, "num_experts", f"a multiple of the number of models, {len(models)}", num_experts)
    if not 1 <= top_k <= num_experts:
        raise value_error(_OP, "top_k", f"in [1, num_experts={num_experts}]", top_k)
    if rest not in ("average", "first"):
        raise value_error(_OP, "rest", "one of average, first", repr(rest))
    generator = torch.Generator().manual_seed(seed)
    if hasattr(models[0], "save_pretrained"):  # a layer of transformers holds its configuration too
        return _upcycle_model(models, num_experts, top_k, rest, router_std, generator)
    return _upcycle_layer(models, num_experts, top_k, router_std, generator)


def _upcycle_layer(mlps: list[nn.Module], num_experts: int, top_k: int, std: float, generator) -> MoEFeedForward:
    weights = [dense_weights(_OP, mlp) for mlp in mlps]
    gate_proj = weights[0][0]
    activation = recognize_activation(mlps[0].act_fn)
    layer = MoEFeedForward(
        gate_proj.shape[1],
        gate_proj.shape[0],
        num_experts,
        top_k,
        activation=activation,
        device=gate_proj.device,
        dtype=gate_proj.dtype,
    )
    for mlp, (gate, *_) in zip(mlps, weights, strict=True):
        if gate.shape != gate_proj.shape:
            raise shape_error(_OP, "gate_proj", f"{list(gate_proj.shape)} in every layer", gate)
        if recognize_activation(mlp.act_fn) != activation:
            raise value_error(_OP, "act_fn", f"{activation.kind} in every layer", type(mlp.act_fn).__name__)
    for expert in range(num_experts):
        gate, up, down = weights[expert % len(mlps)]
        layer.gate_up_proj[expert] = torch.cat([gate, up])
        layer.down_proj[expert] = down
    layer.router.weight.copy_(_normal(layer.router.weight, std, generator))
    return layer.train(mlps[0].training)


def _upcycle_model(models: list[nn.Module], num_experts: int, top_k: int, rest: str, std: float, generator):
    from transformers import AutoModelForCausalLM

    first = models[0]
    config = _mixture_config(first.config, num_experts, top_k)
    for model in models[1:]:
        if {k: v.shape for k, v in model.state_dict().items()} != {k: v.shape for k, v in first.state_dict().items()}:
            raise value_error(_OP, "models", "of one architecture", type(model).__name__)
    mixture = AutoModelForCausalLM.from_config(config, dtype=first.dtype).to(first.device)
    states = [model.state_dict() for model in models]
    target = mixture.state_dict()
    if "lm_head.weight" not in states[0]:
        raise value_error(_OP, "models", "with a language model's head", type(first).__name__)
    for name, value in target.items():
        if name.endswith("mlp.gate.weight"):
            value.copy_(_normal(value, std, generator))
        elif ".mlp.experts." in name:
            prefix = name[: name.index("experts.")]
            parts = ("down_proj",) if name.endswith("down_proj") else ("gate_proj", "up_proj")
            for expert in range(num_experts):
                state = states[expert % len(models)]
                value[expert] = torch.cat([state[f"{prefix}{part}.weight"] for part in parts])
        elif rest == "first":
            value.copy_(states[0][name])
        else:
            value.copy_(torch.stack([state[name].double() for state in states]).mean(0))
    mixture.generation_config = copy.deepcopy(first.generation_config)
    return mixture.train(first.training)


def _mixture_config(config, num_experts: int, top_k: int):
    from transformers import AutoConfig

    if config.model_type not in MIXTURES:
        raise value_error(_OP, "models", f"a transformers {', '.join(MIXTURES)}", config.model_type)
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False) and not (config.model_type == "qwen3" and name == "attention_bias"):
            raise value_error(_OP, f"config.{name}", "False: the mixture has no such bias", True)
    kept = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "layer_types", "max_window_layers"):
        kept.pop(name, None)
    sizes = {"num_experts_per_tok": top_k}
    if MIXTURES[config.model_type] == "mixtral":
        sizes |= {"num_local_experts": num_experts}
    else:
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            raise value_error(_OP, "config.layer_types", "full_attention in every layer", config.layer_types)
        sizes |= {
            "num_experts": num_experts,
            "moe_intermediate_size": config.intermediate_size,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return AutoConfig.for_model(MIXTURES[config.model_type], **(kept | sizes))


def _normal(like: Tensor, std: float, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator) * std
