"""The routed feed-forward layer: :class:`MoEFeedForward`."""

import torch
from torch import Tensor, nn

from moe_kernels._checks import shape_error, value_error
from moe_kernels.activation import Activation
from moe_kernels.ops.expert_ffn import expert_ffn
from moe_kernels.ops.route import route

_SILU = Activation()


class MoEFeedForward(nn.Module):
    """A router and the experts it chooses from.

    ::

        ids, s = route(router(x), top_k)                 s sums to 1 over the chosen experts if renormalize
        out    = sum_k w[k] * down_proj[ids[k]] @ activation(gate_up_proj[ids[k]] @ x)
        w      = s if weighted else 1

    Args:
        hidden_size: size of a token.
        intermediate_size: size of one expert.
        num_experts: number of experts.
        top_k: experts for each token, 0 to num_experts. An attribute, free to change between calls.
        activation: what an expert does between its two projections.
        weighted: whether the router weighs the experts it chooses. Without weights it learns nothing from the output.
        renormalize: whether the weights of a token's experts are divided by their sum.
        router_bias: whether the router has a bias.

    Attributes:
        gate_up_proj: [num_experts, 2 * intermediate_size, hidden_size], gate rows before up rows (ungated:
            [num_experts, intermediate_size, hidden_size]).
        down_proj: [num_experts, hidden_size, intermediate_size].
        router: ``nn.Linear`` from hidden_size to num_experts.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: Activation = _SILU,
        weighted: bool = True,
        renormalize: bool = True,
        router_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 0 <= top_k <= num_experts:
            raise value_error("MoEFeedForward", "top_k", f"in [0, num_experts={num_experts}]", top_k)
        self.top_k = top_k
        self.activation = activation
        self.weighted = weighted
        self.renormalize = renormalize
        place = {"device": device, "dtype": dtype}
        gate_up_size = (2 if activation.gated else 1) * intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, gate_up_size, hidden_size, **place))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, **place))
        self.router = nn.Linear(hidden_size, num_experts, bias=router_bias, **place)
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        return self.gate_up_proj.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.gate_up_proj.shape[2]

    def reset_parameters(self) -> None:
        """Draws every weight as ``nn.Linear`` does: uniform in ±1/sqrt(fan_in)."""
        for weight in (self.gate_up_proj, self.down_proj):
            bound = weight.shape[2] ** -0.5 if weight.shape[2] else 0.0
            nn.init.uniform_(weight, -bound, bound)
        self.router.reset_parameters()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps [..., hidden_size] to the same shape."""
        if hidden_states.dim() == 0 or hidden_states.shape[-1] != self.hidden_size:
            expected = f"[..., hidden_size={self.hidden_size}]"
            raise shape_error("MoEFeedForward", "hidden_states", expected, hidden_states)
        tokens = hidden_states.reshape(-1, self.hidden_size)
        topk_ids, topk_weights = route(self.router(tokens), self.top_k, renormalize=self.renormalize)
        if not self.weighted:
            topk_weights = torch.ones_like(topk_weights)
        out = expert_ffn(tokens, topk_ids, topk_weights, self.gate_up_proj, self.down_proj, activation=self.activation)
        return out.view(hidden_states.shape)

    def extra_repr(self) -> str:
        num_experts, hidden_size, intermediate_size = self.down_proj.shape
        return (
            f"hidden_size={hidden_size}, intermediate_size={intermediate_size}, num_experts={num_experts}, "
            f"top_k={self.top_k}, weighted={self.weighted}"
        )
