"""Whole models small enough to build in milliseconds: one for each way that experts are laid out or dispatched."""

from collections.abc import Callable

import torch
import transformers
from transformers import PreTrainedModel

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

#: model class -> its configuration class and arguments
_MODELS: dict[str, tuple[str, dict]] = {
    "MixtralForCausalLM": ("MixtralConfig", {"num_local_experts": 4}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {"moe_intermediate_size": 24, "num_experts": 4}),
    "GptOssForCausalLM": ("GptOssConfig", {"num_local_experts": 4, "layer_types": ["full_attention"] * 2}),
    "DeepseekV3ForCausalLM": (
        "DeepseekV3Config",
        {
            **_LATENT_ATTENTION,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "NemotronHForCausalLM": (
        "NemotronHConfig",
        {
            "n_routed_experts": 4,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "layers_block_type": ["attention", "moe"],
        },
    ),
    "Llama4ForCausalLM": (
        "Llama4TextConfig",
        {"num_local_experts": 4, "intermediate_size_mlp": 24, "moe_layers": [0, 1]},
    ),
    "DbrxForCausalLM": (
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
    ),
    "LongcatFlashForCausalLM": (
        "LongcatFlashConfig",
        {
            **_LATENT_ATTENTION,
            "ffn_hidden_size": 24,
            "expert_ffn_hidden_size": 24,
            "num_layers": 2,
            "num_hidden_layers": 4,
            "n_routed_experts": 4,
            "zero_expert_num": 3,
            "moe_topk": 3,
        },
    ),
    "JetMoeForCausalLM": ("JetMoeConfig", {"kv_channels": 8, "num_local_experts": 4}),
    "DogeForCausalLM": ("DogeConfig", {"is_moe": True, "num_experts": 16}),
    "NllbMoeForConditionalGeneration": (
        "NllbMoeConfig",
        {
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "num_experts": 4,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 1,
        },
    ),
    "SwitchTransformersForConditionalGeneration": (
        "SwitchTransformersConfig",
        {"d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4, "num_experts": 4},
    ),
}
# names of their own for what _COMMON holds
_OWN_NAMES = {"DbrxConfig", "JetMoeConfig", "NllbMoeConfig", "SwitchTransformersConfig"}
_KEPT = {
    "JetMoeConfig": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads"),
}


def build_model(name: str) -> PreTrainedModel:
    """A tiny model in eval mode, eager experts, weights of a size that makes logits differ."""
    config_name, own = _MODELS[name]
    common = _COMMON
    if config_name in _OWN_NAMES:
        kept = _KEPT.get(config_name, ("vocab_size",)) + ("bos_token_id", "eos_token_id", "pad_token_id")
        common = {key: value for key, value in _COMMON.items() if key in kept}
    config = getattr(transformers, config_name)(**{**common, **own})
    build: Callable = getattr(transformers, name)
    model = build(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    model.config._experts_implementation = "eager"
    return model
