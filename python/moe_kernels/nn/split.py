"""A dense feed-forward layer split into experts: :func:`split_dense`."""

import torch
from torch import Tensor, nn

from moe_kernels._checks import shape_error, value_error
from moe_kernels.activation import KINDS, Activation
from moe_kernels.nn.feed_forward import MoEFeedForward

_OP = "split_dense"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def split_dense(
    mlp: nn.Module, num_experts: int, top_k: int, calibration: Tensor, *, ridge: float = 1e-2
) -> MoEFeedForward:
    """Splits the neurons of a dense gated feed-forward layer into experts whose outputs add up to its output.

    With a_i(x) = activation(gate_proj_i · x) * (up_proj_i · x), the activation of neuron i, and d_i its column of
    down_proj::

        dense(x)    = sum_i a_i(x) d_i = sum_e f_e(x)          f_e sums over the neurons of expert e
        split(x)    = sum of f_e(x) over the top_k experts with the largest router score, each with weight 1

    so ``top_k == num_experts`` computes the dense layer, in another order of summation.

    *Which neurons share an expert.* They are sorted by ``mean(a_i²) * |d_i|²`` over the calibration tokens, the
    expected squared length of what a neuron adds, and dealt out in that order: neurons that always matter fill the
    first experts and no expert mixes them with neurons that can be skipped. That is the idea of shared experts carved
    out by activation statistics (CMoE, arXiv 2502.04416), carried through all experts.

    *Which experts a token takes.* The router predicts ``log |f_e(x)|`` by ridge regression on the calibration tokens::

        router = argmin_{W, b} mean_x |W x + b - log |f(x)||² + ridge * mean(var(x)) |W|²

    The logarithm matters: lengths differ by orders of magnitude, and a fit of the lengths serves the longest alone.
    Nothing is trained.

    Sources: FactorLLM (arXiv 2408.11855) for the split; MoEfication (arXiv 2110.01786) for choosing experts by what
    they would add.

    Args:
        mlp: a module with ``gate_proj``, ``up_proj``, ``down_proj`` (``nn.Linear`` without bias) and ``act_fn``, as in
            the Llama family of transformers; it is not changed, and shares no memory with the result.
        num_experts: divides the number of neurons.
        top_k: experts for each token; ``result.top_k`` can be changed later.
        calibration: [num_tokens, hidden_size], inputs of this layer on real text; more tokens than hidden_size.
        ridge: strength of the regression's penalty, relative to the inputs' mean variance.

    Returns:
        A :class:`MoEFeedForward` with ``weighted=False``, device and dtype of ``mlp``. Deterministic.
    """
    gate_proj, up_proj, down_proj = dense_weights(_OP, mlp)
    activation = recognize_activation(mlp.act_fn)
    num_neurons, hidden_size = gate_proj.shape
    if num_experts < 1 or num_neurons % num_experts:
        raise value_error(_OP, "num_experts", f"a divisor of the layer's {num_neurons} neurons", num_experts)
    if not 0 <= top_k <= num_experts:
        raise value_error(_OP, "top_k", f"in [0, num_experts={num_experts}]", top_k)
    if calibration.dim() != 2 or calibration.shape[1] != hidden_size or calibration.shape[0] <= hidden_size:
        expected = f"[num_tokens > {hidden_size}, hidden_size={hidden_size}]"
        raise shape_error(_OP, "calibration", expected, calibration)

    tokens = calibration.to(gate_proj)
    neuron_activations = activation(tokens @ gate_proj.T, tokens @ up_proj.T)
    neurons = group_neurons(neuron_activations, down_proj, num_experts)
    output_lengths = expert_output_lengths(neuron_activations, down_proj, neurons)
    weight, bias = fit_router(tokens, output_lengths, ridge)

    split = MoEFeedForward(
        hidden_size,
        num_neurons // num_experts,
        num_experts,
        top_k,
        activation=activation,
        weighted=False,
        router_bias=True,
        device=gate_proj.device,
        dtype=gate_proj.dtype,
    )
    split.gate_up_proj.copy_(torch.cat([gate_proj[neurons], up_proj[neurons]], dim=1))
    split.down_proj.copy_(down_proj.T[neurons].transpose(1, 2))
    split.router.weight.copy_(weight)
    split.router.bias.copy_(bias)
    return split


def group_neurons(neuron_activations: Tensor, down_proj: Tensor, num_experts: int) -> Tensor:
    """Deals the neurons out to experts in falling order of ``mean(a_i²) * |d_i|²``.

    Args:
        neuron_activations: [num_tokens, num_neurons].
        down_proj: [hidden_size, num_neurons].

    Returns:
        [num_experts, num_neurons / num_experts] int64, the neurons of each expert in rising order.
    """
    importance = neuron_activations.float().square().mean(0) * down_proj.float().square().sum(0)
    order = importance.argsort(descending=True, stable=True)
    return order.view(num_experts, -1).sort(1).values


def expert_output_lengths(neuron_activations: Tensor, down_proj: Tensor, neurons: Tensor) -> Tensor:
    """Length of what each expert adds to each token: [num_tokens, num_experts] in float32."""
    lengths = [(neuron_activations[:, members] @ down_proj[:, members].T).float().norm(dim=1) for members in neurons]
    return torch.stack(lengths, dim=1)


def fit_router(tokens: Tensor, output_lengths: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression from tokens to ``log(output_lengths)``, in float64, with an unpenalised intercept.

    Args:
        tokens: [num_tokens, hidden_size].
        output_lengths: [num_tokens, num_experts]; a length of zero counts as one millionth of the largest.

    Returns:
        weight [num_experts, hidden_size] and bias [num_experts].
    """
    tokens, output_lengths = tokens.double(), output_lengths.double()
    floor = 1e-6 * output_lengths.max().clamp_min(torch.finfo(torch.float32).tiny)
    target = output_lengths.clamp_min(floor).log()
    token_mean, target_mean = tokens.mean(0), target.mean(0)
    centered = tokens - token_mean
    covariance = centered.T @ centered / tokens.shape[0]
    penalty = ridge * covariance.diagonal().mean()
    covariance.diagonal().add_(penalty)
    weight = torch.linalg.solve(covariance, centered.T @ (target - target_mean) / tokens.shape[0]).T
    return weight, target_mean - weight @ token_mean


def recognize_activation(act_fn) -> Activation:
    """The :class:`Activation` that equals ``act_fn`` to float64 rounding on a grid; refuses any other function."""
    grid = torch.linspace(-12, 12, 241, dtype=torch.float64)
    values = act_fn(grid)
    for kind in KINDS:
        expected = Activation(kind=kind, gated=False)(grid)
        rounding = torch.finfo(torch.float64).eps * expected.abs().clamp_min(1)
        if values.shape == grid.shape and ((values - expected).abs() <= 4 * rounding).all():
            return Activation(kind=kind)
    name = getattr(act_fn, "__name__", type(act_fn).__name__)
    raise value_error(_OP, "mlp.act_fn", f"one of {', '.join(KINDS)}", name)


def dense_weights(op: str, mlp: nn.Module) -> list[Tensor]:
    """gate, up and down weights of a gated feed-forward layer without biases; refuses any other."""
    weights = []
    for name in _PROJECTIONS:
        projection = getattr(mlp, name, None)
        if not isinstance(projection, nn.Linear):
            raise value_error(op, f"mlp.{name}", "an nn.Linear", type(projection).__name__)
        if projection.bias is not None:
            raise value_error(op, f"mlp.{name}", "without bias", "one with bias")
        weights.append(projection.weight)
    if not hasattr(mlp, "act_fn"):
        raise value_error(op, "mlp.act_fn", "the activation of the layer", "a module without it")
    return weights
