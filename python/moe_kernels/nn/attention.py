"""Attention whose projections are experts: :class:`MoEAttention`."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels._checks import shape_error, value_error
from moe_kernels.ops.route import route_soft

_OP = "MoEAttention"


class MoEAttention(nn.Module):
    """Several attention layers, each with its own projections, mixed by a router for every token.

    ::

        out[t] = sum_e w[t, e] * o_proj[e] @ attention(q_proj[e] @ x, k_proj[e] @ x, v_proj[e] @ x)[t]
        w      = routing(router(x)), by default the softmax over all experts

    Every expert attends for every token, because its keys and values are read by all later ones; an expert that the
    routing leaves out has weight 0 but is computed. With ``share_kv`` the experts read one set of keys and values.

    Args:
        hidden_size: size of a token.
        num_experts: number of experts.
        num_heads: attention heads of one expert.
        num_kv_heads: key and value heads of one expert; divides num_heads.
        head_dim: size of a head; None is hidden_size / num_heads.
        share_kv: whether the experts share keys and values.
        routing: any function from logits to ``topk_ids`` and ``topk_weights``; BAM mixes softly.

    Attributes:
        q_proj: [num_experts, num_heads * head_dim, hidden_size].
        k_proj, v_proj: [num_experts, num_kv_heads * head_dim, hidden_size], the first dimension 1 with ``share_kv``.
        o_proj: [num_experts, hidden_size, num_heads * head_dim].
        router: ``nn.Linear`` from hidden_size to num_experts.

    Source: Zhang et al., "BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts",
    arXiv 2408.08274.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        share_kv: bool = False,
        routing: Callable[[Tensor], tuple[Tensor, Tensor]] = route_soft,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise value_error(_OP, "num_kv_heads", f"a divisor of num_heads={num_heads}", num_kv_heads)
        if head_dim is None and hidden_size % num_heads:
            raise value_error(
                _OP, "num_heads", f"a divisor of hidden_size={hidden_size}", num_heads, "or give head_dim"
            )
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.routing = routing
        place = {"device": device, "dtype": dtype}
        num_kv = 1 if share_kv else num_experts
        self.q_proj = nn.Parameter(torch.empty(num_experts, num_heads * self.head_dim, hidden_size, **place))
        self.k_proj = nn.Parameter(torch.empty(num_kv, num_kv_heads * self.head_dim, hidden_size, **place))
        self.v_proj = nn.Parameter(torch.empty(num_kv, num_kv_heads * self.head_dim, hidden_size, **place))
        self.o_proj = nn.Parameter(torch.empty(num_experts, hidden_size, num_heads * self.head_dim, **place))
        self.router = nn.Linear(hidden_size, num_experts, bias=False, **place)
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        return self.q_proj.shape[0]

    def reset_parameters(self) -> None:
        """Draws every weight as ``nn.Linear`` does: uniform in ±1/sqrt(fan_in)."""
        for weight in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            bound = weight.shape[2] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        self.router.reset_parameters()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Maps [batch, sequence, hidden_size] to the same shape.

        Args:
            hidden_states: [batch, sequence, hidden_size].
            position_embeddings: cosines and sines, [batch or 1, sequence, head_dim], of rotary embeddings in the layout
                of the Llama family (the two halves of a head rotate together); None rotates nothing.
            attention_mask: as ``F.scaled_dot_product_attention`` takes it, broadcast to [batch, heads, sequence,
                sequence]; None is causal.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.q_proj.shape[2]:
            raise shape_error(_OP, "hidden_states", f"[batch, sequence, {self.q_proj.shape[2]}]", hidden_states)
        batch, length, _ = hidden_states.shape
        shares = self._shares(hidden_states).view(batch, length, self.num_experts, 1)
        out = 0
        for expert in range(self.num_experts):
            if expert < self.k_proj.shape[0]:
                keys = self._heads(hidden_states, self.k_proj[expert], position_embeddings)
                values = self._heads(hidden_states, self.v_proj[expert], None)
            queries = self._heads(hidden_states, self.q_proj[expert], position_embeddings)
            attended = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=attention_mask, is_causal=attention_mask is None, enable_gqa=True
            )
            attended = attended.transpose(1, 2).reshape(batch, length, -1)
            out = out + shares[:, :, expert] * F.linear(attended, self.o_proj[expert])
        return out

    def _shares(self, hidden_states: Tensor) -> Tensor:
        """Weight of each expert for each token, [num_tokens, num_experts]."""
        topk_ids, topk_weights = self.routing(self.router(hidden_states.flatten(0, 1)))
        skipped = (topk_ids < 0) | (topk_ids >= self.num_experts)
        shares = topk_weights.new_zeros(topk_ids.shape[0], self.num_experts)
        shares = shares.scatter_add(1, topk_ids.masked_fill(skipped, 0).long(), topk_weights.masked_fill(skipped, 0))
        return shares.to(hidden_states.dtype)

    def _heads(self, hidden_states: Tensor, weight: Tensor, positions: tuple[Tensor, Tensor] | None) -> Tensor:
        heads = F.linear(hidden_states, weight).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        if positions is None:
            return heads
        cosines, sines = (table[:, None].to(heads.dtype) for table in positions)
        first, second = heads.chunk(2, dim=-1)
        return heads * cosines + torch.cat([-second, first], dim=-1) * sines

    @classmethod
    @torch.no_grad()
    def from_attentions(
        cls, attentions: Sequence[nn.Module], num_heads: int, num_kv_heads: int, *, share_kv: bool = False, **options
    ) -> "MoEAttention":
        """Makes each of several attention layers an expert (BAM).

        Args:
            attentions: modules with ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` (``nn.Linear`` without bias), as in
                the Llama family of transformers; they are not changed. Layers that normalise queries or keys are
                refused.
            num_heads, num_kv_heads: of one of them.
            share_kv: share the mean of their key and value projections.
            options: ``routing``.
        """
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        for attention in attentions:
            for name in names:
                if (
                    not isinstance(getattr(attention, name, None), nn.Linear)
                    or getattr(attention, name).bias is not None
                ):
                    raise value_error(_OP, f"attention.{name}", "an nn.Linear without bias", type(attention).__name__)
            if hasattr(attention, "q_norm") or hasattr(attention, "k_norm"):
                raise value_error(_OP, "attention", "without q_norm and k_norm", type(attention).__name__)
        if not attentions:
            raise value_error(_OP, "attentions", "at least one", 0)
        stacks = {name: torch.stack([getattr(attention, name).weight for attention in attentions]) for name in names}
        num_experts, size, hidden_size = stacks["q_proj"].shape
        place = {"device": stacks["q_proj"].device, "dtype": stacks["q_proj"].dtype}
        sizes = {"head_dim": size // num_heads, "share_kv": share_kv}
        mixture = cls(hidden_size, num_experts, num_heads, num_kv_heads, **sizes, **options, **place)
        for name, stack in stacks.items():
            parameter = getattr(mixture, name)
            parameter.copy_(stack if parameter.shape == stack.shape else stack.mean(0, keepdim=True))
        return mixture.train(attentions[0].training)
