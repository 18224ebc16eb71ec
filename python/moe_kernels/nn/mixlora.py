"""A gated feed-forward layer whose experts are adapters of one dense layer."""

import torch
from torch import Tensor, nn

from moe_kernels import balance_loss, route, routed_lora
from moe_kernels.nn.multi_lora import dropout_of


class MixLoRAFeedForward(nn.Module):
    """MixLoRA (arXiv 2404.15159): ``y = sum_k w_k W2_e (silu(W1_e x) * W3_e x)`` with ``W_e = W + s B_e A_e``.

    The three base products run once a token: ``sum_k w_k W2 a_k = W2 (sum_k w_k a_k)``, so only the adapters' share of
    the last one runs for every chosen expert. Experts are the top k of a softmax, renormalised.

    Args:
        gate_proj, up_proj, down_proj: the dense layer's three linear layers (W1, W3, W2), without biases; kept as they
            are.
        rank: of every adapter; a new expert is the dense layer (its B is zero).
        scaling: s.
        dropout: of the input of each of the three adapters in training mode; the router and the base see all of it.
    """

    def __init__(
        self,
        gate_proj: nn.Linear,
        up_proj: nn.Linear,
        down_proj: nn.Linear,
        num_experts: int,
        top_k: int = 2,
        *,
        rank: int = 8,
        scaling: float = 2.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        for name, layer in (("gate_proj", gate_proj), ("up_proj", up_proj), ("down_proj", down_proj)):
            if layer.bias is not None:
                raise ValueError(f"MixLoRAFeedForward: {name} must be a Linear without bias, got one with a bias")
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.top_k, self.scaling, self.dropout = top_k, scaling, dropout
        self._choice: tuple[Tensor, Tensor] | None = None
        hidden, like = gate_proj.in_features, dict(dtype=gate_proj.weight.dtype, device=gate_proj.weight.device)
        self.router = nn.Linear(hidden, num_experts, bias=False, **like)
        self.lora_a, self.lora_b_rows = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in (("gate", gate_proj), ("up", up_proj), ("down", down_proj)):
            a = torch.empty(num_experts, rank, layer.in_features, **like)
            self.lora_a[name] = nn.Parameter(nn.init.normal_(a, std=layer.in_features**-0.5))
            # in memory [num_experts, rank, out], which the kernels read in place
            self.lora_b_rows[name] = nn.Parameter(torch.zeros(num_experts, rank, layer.out_features, **like))

    def lora_b(self, name: str) -> Tensor:
        """[num_experts, out, rank] of "gate", "up" or "down"."""
        return self.lora_b_rows[name].transpose(1, 2)

    def aux_loss(self, token_mask: Tensor | None = None, *, coefficient: float = 1e-3) -> Tensor:
        """``coefficient * num_experts * sum_e F_e P_e`` of the last batch in training (Switch's loss, Mixtral's scale).

        F_e is how many of a token's choices are e, P_e the mean probability of e.
        """
        if self._choice is None:
            raise RuntimeError("MixLoRAFeedForward: aux_loss must be called after a forward in training mode, got none")
        return coefficient * balance_loss(*self._choice, token_mask=token_mask)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        logits = self.router(tokens)
        ids, weights = route(logits, self.top_k, renormalize=True)
        self._choice = (logits, ids) if self.training else None

        def pairs(name: str, base: Tensor) -> Tensor:  # [num_tokens, top_k, intermediate]
            factors = self.lora_a[name], self.lora_b(name)
            delta = routed_lora(tokens, *factors, ids, scaling=self.scaling, reduce=False, **dropout_of(self, tokens))
            return base[:, None] + delta

        act = nn.functional.silu(pairs("gate", self.gate_proj(tokens))) * pairs("up", self.up_proj(tokens))
        mixed = (act * weights.to(act.dtype)[..., None]).sum(1)
        factors = self.lora_a["down"], self.lora_b("down")
        out = routed_lora(
            act, *factors, ids, weights, scaling=self.scaling, base=self.down_proj(mixed), **dropout_of(self, act)
        )
        return out.reshape(x.shape)
