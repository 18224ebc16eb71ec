"""Low-rank adapters of a layer's experts, one for each: :func:`add_expert_lora`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moe_kernels._checks import value_error
from moe_kernels.activation import Activation
from moe_kernels.nn.feed_forward import MoEFeedForward
from moe_kernels.nn.quantized_experts import QuantizedExperts
from moe_kernels.ops.grouped_gemm import grouped_gemm
from moe_kernels.ops.permute import permute, plan_dispatch, unpermute
from moe_kernels.ops.quantize import QuantizedWeights
from moe_kernels.ops.routed_lora import sgmv


class ExpertLoRA(nn.Module):
    """The adapters of one layer, and the layer's ``run_experts`` with them.

    ::

        gate_up_proj[e] + scaling * gate_up_b[e] @ gate_up_a[e]       in place of gate_up_proj[e]; down_proj likewise

    Attributes:
        gate_up_a, down_a: [num_experts, rank, in].
        gate_up_b_rows, down_b_rows: [num_experts, rank, out], which the kernels read in place.
        scaling: a number, ``alpha / rank`` as a rule.
    """

    def __init__(self, layer: MoEFeedForward, rank: int, scaling: float):
        super().__init__()
        self.scaling = scaling
        like = {"dtype": _dtype(layer), "device": next(layer.router.parameters()).device}
        for name in ("gate_up", "down"):
            num_experts, out, features = getattr(layer, f"{name}_proj").shape
            a = nn.init.uniform_(torch.empty(num_experts, rank, features, **like), -(features**-0.5), features**-0.5)
            self.register_parameter(f"{name}_a", nn.Parameter(a))
            # zero: the layer is what it was
            self.register_parameter(f"{name}_b_rows", nn.Parameter(torch.zeros(num_experts, rank, out, **like)))

    def factors(self) -> list[Tensor]:
        """As :func:`expert_ffn_with_lora` takes them."""
        return [self.gate_up_a, self.gate_up_b_rows, self.down_a, self.down_b_rows]

    def run_experts(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        gate_up_proj: Tensor | QuantizedWeights,
        down_proj: Tensor | QuantizedWeights,
        *,
        activation: Activation,
        beside: Callable[[], Tensor | None],
    ) -> tuple[Tensor, Tensor | None]:
        batch, weights = (hidden_states, topk_ids, topk_weights), (gate_up_proj, down_proj)
        how = {"activation": activation, "scaling": self.scaling}
        return expert_ffn_with_lora(*batch, *weights, self.factors(), **how), beside()


def add_expert_lora(module: nn.Module, rank: int, *, scaling: float = 1.0) -> list[str]:
    """Gives every expert of every :class:`MoEFeedForward` in ``module`` a low-rank adapter, in place.

    The experts themselves are frozen; the layer's output does not change until its adapters (``layer.expert_lora``)
    are trained. Add them before the experts are quantised, and before they are spread over ranks.

    Args:
        module: a layer, or a model that holds some.
        rank: of every adapter.
        scaling: what an adapter is multiplied by.

    Returns:
        The names of the layers.

    Raises:
        ValueError: a rank below 1, a layer that has adapters, is quantised, or whose experts are spread over ranks.
    """
    op = "add_expert_lora"
    if rank < 1:
        raise value_error(op, "rank", "at least 1", rank)
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, MoEFeedForward)]
    for name, layer in layers:
        if hasattr(layer, "expert_parallel"):
            raise value_error(op, f"experts of {name!r}", "on one device", "experts over ranks", "call it before")
        if hasattr(layer, "expert_lora"):
            raise value_error(op, f"experts of {name!r}", "without adapters", "experts with adapters", "train those")
        if isinstance(layer.gate_up_proj, QuantizedExperts) and layer.gate_up_proj().num_splits == 2:
            remedy = "add adapters before quantize_experts, which then keeps gate and up rows together"
            raise value_error(op, f"experts of {name!r}", "plain", "quantised for the fused kernels", remedy)
    for _, layer in layers:
        for weight in (layer.gate_up_proj, layer.down_proj):
            weight.requires_grad_(False)
        layer.expert_lora = ExpertLoRA(layer, rank, scaling)
        layer.run_experts = layer.expert_lora.run_experts
    return [name for name, _ in layers]


def expert_ffn_with_lora(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor | QuantizedWeights,
    down_proj: Tensor | QuantizedWeights,
    factors: Sequence[Tensor],
    *,
    activation: Activation,
    scaling: float,
) -> Tensor:
    """:func:`moe_kernels.expert_ffn` whose experts have adapters, as permute, grouped_gemm, sgmv and unpermute.

    Args:
        factors: gate_up_a, gate_up_b_rows, down_a, down_b_rows of :class:`ExpertLoRA`, dtype of ``hidden_states``.

    Returns:
        [num_tokens, hidden_size]. Each of the two products, and its sum with its adapter's, is rounded to the dtype.
        Differentiable in everything but quantised weights.
    """
    plan = plan_dispatch(topk_ids, gate_up_proj.shape[0])
    experts = torch.arange(gate_up_proj.shape[0], dtype=torch.int32, device=hidden_states.device)

    def project(rows: Tensor, weights: Tensor | QuantizedWeights, lora_a: Tensor, lora_b_rows: Tensor) -> Tensor:
        base = grouped_gemm(rows, weights, plan.expert_offsets)
        adapters = (lora_a, lora_b_rows.transpose(1, 2))
        return sgmv(rows, *adapters, plan.expert_offsets, experts, scaling, base=base)

    h = project(permute(hidden_states, plan), gate_up_proj, *factors[:2])
    act = activation(*h.chunk(2, dim=1)) if activation.gated else activation(h)
    return unpermute(project(act, down_proj, *factors[2:]), plan, topk_weights)


def _dtype(layer: MoEFeedForward) -> torch.dtype:
    """Quantised experts take rows of any dtype: the router's parameters then say which is the layer's."""
    quantized = isinstance(layer.gate_up_proj, QuantizedExperts)
    return next(layer.router.parameters()).dtype if quantized else layer.gate_up_proj.dtype
