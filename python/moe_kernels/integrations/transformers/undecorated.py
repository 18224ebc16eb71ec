"""Mixture-of-experts modules that transformers does not dispatch, written with our ops.

An adapter takes the place of one class's ``forward``. It restates what that forward computes, so it serves only the
code that it restates: each entry of :data:`ADAPTERS` holds fingerprints of the forwards it stands for, and a module
whose code differs is refused. Parameters are read in place, and submodules that an adapter calls (routers, shared
experts) run as they are.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_kernels.integrations.transformers.experts import run
from moe_kernels.integrations.transformers.gates import Gate, fingerprint, recognise_gated, recognise_plain
from moe_kernels.ops.grouped_gemm import grouped_gemm
from moe_kernels.ops.permute import permute, plan_dispatch, unpermute


class Adapter(NamedTuple):
    """How one class is replaced.

    Attributes:
        forward: takes the module and what its own forward takes.
        code: submodule ("" is the module itself) -> fingerprint of its class's forward, which ``forward`` restates or
            relies on.
        gate: the gate of a module, None where it runs unfused.
        bypassed: submodules whose forward is no longer called.
    """

    forward: Callable
    code: dict[str, str]
    gate: Callable[[nn.Module], Gate | None]
    bypassed: tuple[str, ...] = ()

    def refusal(self, module: nn.Module) -> str | None:
        """Why this adapter cannot stand for ``module``, or None when it can."""
        for path, known in self.code.items():
            part = module.get_submodule(path)
            if fingerprint(type(part).forward) != known:
                return f"the code of {type(part).__name__}.forward is not the one that is known here"
        for path in ("", *self.bypassed):
            part = module.get_submodule(path)
            if "forward" in part.__dict__:
                return f"the forward of {path or 'the module'} is already replaced on the instance"
        for path in self.bypassed:
            part = module.get_submodule(path)
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
                return f"{path} has hooks, which would no longer run"
        return None


def _gated(act_fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def own_gate(pre_activation: Tensor) -> Tensor:
        gate, up = pre_activation.chunk(2, dim=-1)
        return act_fn(gate) * up

    return own_gate


def llama4_moe(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4 weighs an expert's input: ``out[t] = shared(x[t]) + sum_e expert_e(score[t, e] * x[t])``.

    Its own forward runs every expert on every token, on zeros where the score is zero; a gate of zeros gives zeros.
    """
    hidden_states = hidden_states.reshape(-1, self.hidden_dim)
    router_scores, router_logits = self.router(hidden_states)
    topk_ids = router_logits.topk(self.top_k, dim=1).indices
    scaled = hidden_states[:, None] * router_scores.gather(1, topk_ids)[..., None]
    experts = self.experts
    routed = run(
        scaled.flatten(0, 1),
        topk_ids.reshape(-1, 1),
        torch.ones_like(topk_ids.reshape(-1, 1), dtype=scaled.dtype),
        experts.gate_up_proj.transpose(1, 2),
        experts.down_proj.transpose(1, 2),
        gate=recognise_plain(experts.act_fn),
        own_gate=_gated(experts.act_fn),
    )
    return self.shared_expert(hidden_states) + routed.view(scaled.shape).sum(1), router_logits


def dbrx_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """DBRX keeps gate and up apart: three grouped GEMMs, since joining the two would copy them."""
    batch_size = hidden_states.shape[0]
    shape = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
    dtype = hidden_states.dtype
    down_proj = self.mlp.w2.view(shape).transpose(1, 2)
    plan = plan_dispatch(top_k_index, self.num_experts)
    rows = permute(hidden_states.reshape(-1, self.hidden_size), plan)
    gate = grouped_gemm(rows, self.mlp.w1.view(shape), plan.expert_offsets)
    up = grouped_gemm(rows, self.mlp.v1.view(shape), plan.expert_offsets)
    rows = grouped_gemm((self.mlp.activation_fn(gate) * up).to(down_proj.dtype), down_proj, plan.expert_offsets)
    return unpermute(rows, plan, top_k_weights).to(dtype).view(batch_size, -1, self.hidden_size)


def longcat_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """LongCat's last experts give back their input: ``out[t] += x[t] * sum of the weights of those``."""
    num_routed = self.num_routed_experts
    kept = top_k_weights.masked_fill(top_k_index < num_routed, 0).sum(1, keepdim=True)
    identity = (hidden_states * kept).to(hidden_states.dtype)
    if self.gate_up_proj is None:
        return identity
    routed = run(
        hidden_states,
        top_k_index,  # ids from num_routed on are outside the experts given, so they are skipped
        top_k_weights,
        self.gate_up_proj[:num_routed],
        self.down_proj,
        gate=recognise_plain(self.act_fn),
        own_gate=_gated(self.act_fn),
    )
    return routed + identity


def step_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Step clamps after the activation: ``Activation.swiglu_step``."""
    return run(
        hidden_states,
        top_k_index,
        top_k_weights,
        self.gate_up_proj,
        self.down_proj,
        gate=recognise_gated(self),
        own_gate=self._apply_gate,
    )


def jetmoe_moe(self: nn.Module, layer_input: Tensor) -> Tensor:
    """JetMoE's router hands out sorted pairs; ``order`` brings them back to [num_tokens, top_k]."""
    tokens = layer_input.reshape(-1, self.input_size)
    order, _, gates, expert_size, _ = self.router(tokens)
    counts = torch.tensor(expert_size, device=order.device)
    sorted_ids = torch.arange(len(expert_size), device=order.device).repeat_interleave(counts)
    pairs = (tokens.shape[0], self.router.top_k)
    out = run(
        tokens,
        torch.zeros_like(order).scatter(0, order, sorted_ids).view(pairs),
        torch.zeros_like(gates).scatter(0, order, gates).view(pairs),
        self.input_linear.weight,
        self.output_linear.weight,
        gate=recognise_plain(self.activation),
        own_gate=_gated(self.activation),
    )
    return out.view(layer_input.shape) + self.bias


def jetmoe_parallel_experts(self: nn.Module, inputs: Tensor, expert_size: list[int]) -> Tensor:
    """One of the two projections of JetMoE's mixture of attention heads: a grouped GEMM over sorted rows."""
    ends = torch.tensor([0, *expert_size], device=inputs.device).cumsum(0, dtype=torch.int32)
    return grouped_gemm(inputs, self.weight, ends)


def doge_cdmoe(self: nn.Module, hidden_states: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    """Doge's experts are one neuron wide: row e of two embeddings is an expert [1, hidden_size] and [hidden_size, 1].

    The best pairs of two short lists of keys choose them (product keys); a shared FFN is added.
    """
    tokens = hidden_states.reshape(-1, self.hidden_size)
    router_logits = self.router_gate(hidden_states).view(2, tokens.shape[0], -1)
    (row_scores, column_scores), (rows, columns) = router_logits.topk(self.num_keys, dim=-1)
    scores = (row_scores[:, :, None] + column_scores[:, None]).flatten(1)
    ids = (rows[:, :, None] * self.num_keys + columns[:, None]).flatten(1)
    scores, best = scores.topk(self.top_k, dim=-1)
    topk_weights = scores.softmax(-1)
    if self.norm_topk_prob:
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
    routed = run(
        tokens,
        ids.gather(1, best),
        topk_weights,
        self.down_embed.weight[:, None, :],
        self.up_embed.weight[:, :, None],
        gate=recognise_plain(self.act_fn, gated=False),
        own_gate=self.act_fn,
    )
    shared = self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
    return shared + routed.view(hidden_states.shape), router_logits


_MODELS = "transformers.models."

#: class -> how it is replaced
ADAPTERS: dict[str, Adapter] = {
    _MODELS + "llama4.modeling_llama4.Llama4TextMoe": Adapter(
        llama4_moe,
        {"": "c429f639e115687b", "experts": "36bf06833adfa9b8", "router": "bb9c8094883fc0e6"},
        lambda module: recognise_plain(module.experts.act_fn),
        bypassed=("experts",),
    ),
    _MODELS + "dbrx.modeling_dbrx.DbrxExperts": Adapter(
        dbrx_experts, {"": "edf25118e117f78a", "mlp": "f348bc181ec8ec2d"}, lambda module: None, bypassed=("mlp",)
    ),
    _MODELS + "longcat_flash.modeling_longcat_flash.LongcatFlashExperts": Adapter(
        longcat_experts,
        {"": "3c5ecc785976ed7f"},
        lambda module: recognise_plain(module.act_fn),
        bypassed=("identity_expert",),
    ),
    _MODELS + "step3p7.modeling_step3p7.Step3p7Experts": Adapter(
        step_experts, {"": "af9847409fa27c4f"}, recognise_gated
    ),
    _MODELS + "jetmoe.modeling_jetmoe.JetMoeMoE": Adapter(
        jetmoe_moe,
        {
            "": "c5feae262d93c572",
            "router": "782f34a33f04bdaa",
            "input_linear": "1bda2193a6c48b60",
            "output_linear": "1bda2193a6c48b60",
        },
        lambda module: recognise_plain(module.activation),
        bypassed=("input_linear", "output_linear"),
    ),
    _MODELS + "jetmoe.modeling_jetmoe.JetMoeParallelExperts": Adapter(
        jetmoe_parallel_experts, {"": "1bda2193a6c48b60"}, lambda module: None
    ),
    _MODELS + "doge.modeling_doge.DogeCDMoE": Adapter(
        doge_cdmoe,
        {"": "f3d4f526ee7205f6"},
        lambda module: recognise_plain(module.act_fn, gated=False),
        bypassed=("down_embed", "up_embed"),
    ),
}

#: classes that look like experts and hold modules that :data:`ADAPTERS` knows, which are replaced one by one
CONTAINERS = (_MODELS + "jetmoe.modeling_jetmoe.JetMoeMoA",)

#: class -> why it is refused
REFUSED: dict[str, str] = {
    _MODELS + "llama4.modeling_llama4.Llama4TextExperts": "it is given every token for every expert; "
    "only its block, Llama4TextMoe, knows which are routed",
    _MODELS + "nllb_moe.modeling_nllb_moe.NllbMoeExperts": "its experts are separate modules (stacking them would copy "
    "the weights), and it may drop out whole expert outputs",
    _MODELS + "switch_transformers.modeling_switch_transformers.SwitchTransformersExperts": "its experts are separate "
    "modules; stacking them would copy the weights",
}
