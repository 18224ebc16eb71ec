"""The routed feed-forward layer: :class:`MoEFeedForward`."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_kernels._checks import shape_error, value_error
from moe_kernels.activation import Activation
from moe_kernels.nn.quantized_experts import expert_weights
from moe_kernels.ops.expert_ffn import expert_ffn
from moe_kernels.ops.quantize import QuantizedWeights
from moe_kernels.ops.route import expert_counts, identity_weights, route, route_forced, update_expert_bias_

_OP = "MoEFeedForward"
_SILU = Activation()


class Routed(NamedTuple):
    """What a layer's router decided, for losses and statistics.

    Attributes:
        logits: [num_tokens, num_experts + num_identity_experts + num_null_experts].
        topk_ids: [num_tokens, top_k] int32.
        topk_weights: [num_tokens, top_k].
    """

    logits: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


class MoEFeedForward(nn.Module):
    """A router, the experts it chooses from, and what every token gets besides.

    ::

        ids, s = routing(router(x))
        out    = sum_k w[k] * down_proj[ids[k]] @ activation(gate_up_proj[ids[k]] @ x)
                 + (sum of w over the identity experts) * x
                 + sigmoid(shared_gate · x) * shared expert(x)                    without a gate, 1 for the sigmoid
        w      = s if weighted else 1

    Args:
        hidden_size: size of a token.
        intermediate_size: size of one expert.
        num_experts: number of experts.
        top_k: experts for each token, 0 to the number of logits. An attribute, free to change between calls.
        activation: what an expert does between its two projections.
        weighted: whether the router weighs the experts it chooses. Without weights it learns nothing from the output.
        renormalize: whether the weights of a token's experts are divided by their sum.
        router_bias: whether the router has a bias.
        router: any module from [num_tokens, hidden_size] to logits (:class:`CosineRouter`); None is an ``nn.Linear``.
        routing: any function from logits to ``topk_ids`` and ``topk_weights``, for example
            ``partial(route_top_p, top_p=0.4)``; None is ``route(logits, top_k, renormalize=renormalize)``. An
            attribute. In a balanced layer it is also given ``expert_bias``.
        num_identity_experts: experts that return their input (LongCat-Flash); their logits follow the experts'.
        num_null_experts: experts that return nothing (AdaMoE); their logits come last.
        shared_intermediate_size: size of the expert that every token runs through; 0 for none.
        shared_gate: whether a sigmoid weighs the shared expert (Qwen2-MoE).
        balanced: whether ``expert_bias`` is there to balance the experts without a loss; see
            :meth:`update_expert_bias`.

    Attributes:
        gate_up_proj: [num_experts, 2 * intermediate_size, hidden_size], gate rows before up rows (ungated:
            [num_experts, intermediate_size, hidden_size]).
        down_proj: [num_experts, hidden_size, intermediate_size].
        shared_gate_up_proj, shared_down_proj: the shared expert, shaped like one expert of the above, or None.
        shared_gate: [1, hidden_size] or None.
        expert_bias: [number of logits] float32, whatever the layer's dtype, saved with the layer; or None.
        expert_counts: [number of logits] int64, picks since the last :meth:`update_expert_bias`; not saved; or None.
        run_experts: :func:`run_experts`, or what :func:`add_expert_lora` or
            :class:`moe_kernels.distributed.ExpertParallel` put in its place.
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
        router: nn.Module | None = None,
        routing: Callable[..., tuple[Tensor, Tensor]] | None = None,
        num_identity_experts: int = 0,
        num_null_experts: int = 0,
        shared_intermediate_size: int = 0,
        shared_gate: bool = False,
        balanced: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        num_logits = num_experts + num_identity_experts + num_null_experts
        if not 0 <= top_k <= num_logits:
            raise value_error(_OP, "top_k", f"in [0, num_experts={num_logits}]", top_k)
        if shared_gate and not shared_intermediate_size:
            raise value_error(_OP, "shared_gate", "False where there is no shared expert", shared_gate)
        self.top_k = top_k
        self.activation = activation
        self.weighted = weighted
        self.renormalize = renormalize
        self.routing = routing
        self.num_identity_experts = num_identity_experts
        self.num_null_experts = num_null_experts
        self.run_experts: Callable[..., tuple[Tensor, Tensor | None]] = run_experts
        place = {"device": device, "dtype": dtype}
        rows = 2 if activation.gated else 1
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, rows * intermediate_size, hidden_size, **place))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, **place))
        self.router = nn.Linear(hidden_size, num_logits, bias=router_bias, **place) if router is None else router
        self.shared_gate_up_proj = self.shared_down_proj = self.shared_gate = None
        if shared_intermediate_size:
            size = shared_intermediate_size
            self.shared_gate_up_proj = nn.Parameter(torch.empty(1, rows * size, hidden_size, **place))
            self.shared_down_proj = nn.Parameter(torch.empty(1, hidden_size, size, **place))
        if shared_gate:
            self.shared_gate = nn.Parameter(torch.empty(1, hidden_size, **place))
        bias = torch.zeros(num_logits, dtype=torch.float32, device=device) if balanced else None
        counts = torch.zeros(num_logits, dtype=torch.int64, device=device) if balanced else None
        self.register_buffer("expert_bias", bias)
        self.register_buffer("expert_counts", counts, persistent=False)
        self._routing_hooks: OrderedDict[int, Callable[[Routed], None]] = OrderedDict()
        self._reset_experts()  # a router has its weights, its own or those it came with

    @property
    def num_experts(self) -> int:
        return self.gate_up_proj.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.gate_up_proj.shape[2]

    def reset_parameters(self) -> None:
        """Draws every weight as ``nn.Linear`` does: uniform in ±1/sqrt(fan_in). A router draws its own, if it can."""
        self._reset_experts()
        if hasattr(self.router, "reset_parameters"):
            self.router.reset_parameters()

    def _reset_experts(self) -> None:
        own = (self.gate_up_proj, self.down_proj, self.shared_gate_up_proj, self.shared_down_proj, self.shared_gate)
        for weight in own:
            if weight is not None:
                bound = weight.shape[-1] ** -0.5 if weight.shape[-1] else 0.0
                nn.init.uniform_(weight, -bound, bound)

    def forward(
        self, hidden_states: Tensor, expert_ids: Tensor | None = None, *, return_routed: bool = False
    ) -> Tensor | tuple[Tensor, Routed]:
        """Maps [..., hidden_size] to the same shape.

        Args:
            hidden_states: [..., hidden_size].
            expert_ids: [num_tokens] or [num_tokens, top_k], the experts to take in place of the router's choice
                (:func:`route_forced`); it still weighs them. Tokens are counted over all leading dimensions.
            return_routed: whether a :class:`Routed` is returned beside the output.
        """
        if hidden_states.dim() == 0 or hidden_states.shape[-1] != self.hidden_size:
            raise shape_error(_OP, "hidden_states", f"[..., hidden_size={self.hidden_size}]", hidden_states)
        tokens = hidden_states.reshape(-1, self.hidden_size)
        logits = self.router(tokens)
        if expert_ids is not None:
            topk_ids, topk_weights = route_forced(expert_ids, logits=logits, renormalize=self.renormalize)
        elif self.routing is not None:
            bias = {} if self.expert_bias is None else {"expert_bias": self.expert_bias}
            topk_ids, topk_weights = self.routing(logits, **bias)
        else:
            options = {"expert_bias": self.expert_bias, "num_null_experts": self.num_null_experts}
            topk_ids, topk_weights = route(logits, self.top_k, renormalize=self.renormalize, **options)
        if not self.weighted:
            topk_weights = torch.ones_like(topk_weights)
        if self.num_null_experts:  # however they were chosen: what follows may not count them as identity experts
            topk_weights = topk_weights.masked_fill(topk_ids >= self.num_experts + self.num_identity_experts, 0)
        routed = Routed(logits, topk_ids, topk_weights)
        self._observe(routed)

        experts = (expert_weights(self.gate_up_proj), expert_weights(self.down_proj))
        beside = partial(self._shared_expert, tokens)
        out, shared = self.run_experts(
            tokens, topk_ids, topk_weights, *experts, activation=self.activation, beside=beside
        )
        if self.num_identity_experts:
            share = identity_weights(topk_ids, topk_weights, self.num_experts)
            out = out + share[:, None].to(out.dtype) * tokens.to(out.dtype)
        if shared is not None:
            out = out + shared
        out = out.view(hidden_states.shape)
        return (out, routed) if return_routed else out

    def _shared_expert(self, tokens: Tensor) -> Tensor | None:
        if self.shared_gate_up_proj is None:
            return None
        first = torch.zeros(tokens.shape[0], 1, dtype=torch.int32, device=tokens.device)
        if self.shared_gate is None:
            weights = torch.ones(first.shape, dtype=torch.float32, device=tokens.device)
        else:
            weights = nn.functional.linear(tokens, self.shared_gate).sigmoid()
        shared = (self.shared_gate_up_proj, self.shared_down_proj)
        return expert_ffn(tokens, first, weights, *shared, activation=self.activation)

    def _observe(self, routed: Routed) -> None:
        if recomputes():
            return
        if self.training and self.expert_counts is not None:
            self.expert_counts += expert_counts(routed.topk_ids, self.expert_counts.numel())
        for hook in self._routing_hooks.values():
            hook(routed)

    def register_routing_hook(self, hook: Callable[[Routed], None]) -> RemovableHandle:
        """Calls ``hook(routed)`` in each forward (once under activation checkpointing) until the handle is removed."""
        handle = RemovableHandle(self._routing_hooks)
        self._routing_hooks[handle.id] = hook
        return handle

    @torch.no_grad()
    def update_expert_bias(
        self, *, rate: float = 1e-3, center: bool = False, group: "torch.distributed.ProcessGroup | None" = None
    ) -> None:
        """Moves ``expert_bias`` towards balance, once an optimizer step, and starts to count anew.

        Picks are counted in training mode, over all forwards since the last call: accumulated batches count together,
        and activation checkpointing does not count twice. See :func:`update_expert_bias_`.

        Args:
            rate: size of a step.
            center: keep the sum of the biases.
            group: the data-parallel ranks whose counts are added up; None for this rank alone.
        """
        if self.expert_counts is None:
            raise RuntimeError(f"{_OP}: update_expert_bias needs a balanced layer; make it with balanced=True")
        if group is not None:
            torch.distributed.all_reduce(self.expert_counts, group=group)
        update_expert_bias_(self.expert_bias, self.expert_counts, rate=rate, center=center)
        self.expert_counts.zero_()

    def _apply(self, fn, recurse: bool = True):
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias.dtype != torch.float32:
            # a bias in bfloat16 would lose the steps that balance it
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def extra_repr(self) -> str:
        num_experts, hidden_size, intermediate_size = self.down_proj.shape
        return (
            f"hidden_size={hidden_size}, intermediate_size={intermediate_size}, num_experts={num_experts}, "
            f"top_k={self.top_k}, weighted={self.weighted}"
        )


def run_experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor | QuantizedWeights,
    down_proj: Tensor | QuantizedWeights,
    *,
    activation: Activation,
    beside: Callable[[], Tensor | None],
) -> tuple[Tensor, Tensor | None]:
    """:func:`expert_ffn`, and what ``beside`` returns, which does not depend on it."""
    weights = (gate_up_proj, down_proj)
    return expert_ffn(hidden_states, topk_ids, topk_weights, *weights, activation=activation), beside()


def recomputes() -> bool:
    """Whether this forward is activation checkpointing's second, which runs inside a backward pass."""
    # in a compiled graph the recomputation is the compiler's, and side effects stay in the first forward
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
