"""The expert FFN in plain PyTorch: the specification."""

from torch import Tensor

from moe_kernels.activation import Activation


def expert_ffn(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: Activation,
    interleaved: bool,
) -> Tensor:
    # the empty products connect every argument to the graph, so that one without work has gradient zero, not None
    out = hidden_states.new_zeros(hidden_states.shape) + hidden_states[:0].sum()
    out = out + topk_weights[:0].sum().to(hidden_states.dtype)
    for parameter in (gate_up_proj, down_proj, gate_up_bias, down_bias):
        if parameter is not None:
            out = out + parameter[:0].sum()
    for expert in range(gate_up_proj.shape[0]):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        h = hidden_states[token] @ gate_up_proj[expert].T
        if gate_up_bias is not None:
            h = h + gate_up_bias[expert]
        if not activation.gated:
            a = activation(h)
        elif interleaved:
            a = activation(h[:, 0::2], h[:, 1::2])
        else:
            a = activation(*h.chunk(2, dim=1))
        y = a @ down_proj[expert].T
        if down_bias is not None:
            y = y + down_bias[expert]
        out = out.index_add(0, token, y * topk_weights[token, slot, None].to(y.dtype))
    return out
