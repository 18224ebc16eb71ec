"""A dense feed-forward layer split into experts: :func:`split_dense`."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from moe_kernels._checks import shape_error, value_error
from moe_kernels.activation import KINDS, Activation
from moe_kernels.nn.feed_forward import MoEFeedForward
from moe_kernels.nn.split_models import split_model

_OP = "split_dense"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def split_dense(
    mlp: nn.Module,
    num_experts: int,
    top_k: int,
    calibration: Tensor,
    *,
    grouping: str = "importance",
    ridge: float = 1e-2,
    progress: Callable[[Iterable, str], Iterable] = lambda iterable, description: iterable,
) -> nn.Module:
    """Splits the neurons of a dense gated feed-forward layer into experts whose outputs add up to its output.

    Given a transformers model, it does so to every layer; see *Whole models*.

    With a_i(x) = activation(gate_proj_i · x) * (up_proj_i · x), the activation of neuron i, and d_i its column of
    down_proj::

        dense(x)    = sum_i a_i(x) d_i = sum_e f_e(x)          f_e sums over the neurons of expert e
        split(x)    = sum of f_e(x) over the top_k experts with the largest router score, each with weight 1

    so ``top_k == num_experts`` computes the dense layer, in another order of summation.

    *Which neurons share an expert.*

    * ``grouping="importance"``: they are sorted by ``mean(a_i²) * |d_i|²`` over the calibration tokens, the expected
      squared length of what a neuron adds, and dealt out in that order: neurons that always matter fill the first
      experts and no expert mixes them with neurons that can be skipped. That is the idea of shared experts carved out
      by activation statistics (CMoE, arXiv 2502.04416), carried through all experts.
    * ``grouping="order"``: neighbours, as the layer stores them (FactorLLM).
    * ``grouping="clusters"``: balanced k-means of the neurons' gate weights (MoEfication). Clusters start at the most
      important neurons; neurons and clusters are paired nearest first while a cluster has room, where MoEfication
      solves an assignment.

    *Which experts a token takes.* The router predicts ``log |f_e(x)|`` by ridge regression on the calibration tokens::

        router = argmin_{W, b} mean_x |W x + b - log |f(x)||² + ridge * mean(var(x)) |W|²

    The logarithm matters: lengths differ by orders of magnitude, and a fit of the lengths serves the longest alone.
    Nothing is trained; ``train_router`` trains the router on, by FactorLLM's loss.

    *Whole models.* The result is a copy of the model of a class of its own (``SplitLlamaForCausalLM``), each ``mlp``
    replaced by the layer's split. ``save_pretrained`` writes experts, routers and each layer's ``top_k``; after
    ``import moe_kernels.integrations.transformers``, ``AutoModelForCausalLM.from_pretrained`` reads them. Without that
    import transformers refuses the model type; it does not load the dense class with new layers.

    Sources: FactorLLM (arXiv 2408.11855) for the split; MoEfication (arXiv 2110.01786) for choosing experts by what
    they would add.

    Args:
        mlp: a module with ``gate_proj``, ``up_proj``, ``down_proj`` (``nn.Linear`` without bias) and ``act_fn``, as in
            the Llama family of transformers; or a whole transformers Llama, Mistral, Qwen2 or Qwen3. It is not changed,
            and shares no memory with the result.
        num_experts: divides the number of neurons.
        top_k: experts for each token; ``result.top_k`` can be changed later.
        calibration: [num_tokens, hidden_size], inputs of this layer on real text; more tokens than hidden_size. For a
            whole model: [num_windows, window_size], token ids of real text.
        grouping: "importance", "order" or "clusters".
        ridge: strength of the regression's penalty, relative to the inputs' mean variance.
        progress: wraps what takes long in a whole model, called as ``progress(iterable, description)``.

    Returns:
        A :class:`MoEFeedForward` with ``weighted=False``, or the model; device and dtype of ``mlp``. Deterministic.
    """
    if hasattr(mlp, "save_pretrained"):  # a layer of transformers holds its configuration too
        options = {"grouping": grouping, "ridge": ridge}
        return split_model(
            _OP,
            mlp,
            calibration,
            lambda layer, tokens: split_dense(layer, num_experts, top_k, tokens, **options),
            progress,
        )
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

    if grouping not in ("importance", "order", "clusters"):
        raise value_error(_OP, "grouping", "one of importance, order, clusters", repr(grouping))

    tokens = calibration.to(gate_proj)
    neuron_activations = activation(tokens @ gate_proj.T, tokens @ up_proj.T)
    if grouping == "importance":
        neurons = group_neurons(neuron_activations, down_proj, num_experts)
    elif grouping == "clusters":
        order = neuron_importance(neuron_activations, down_proj).argsort(descending=True, stable=True)
        neurons = cluster_neurons(gate_proj, order[:num_experts])
    else:
        neurons = torch.arange(num_neurons, device=gate_proj.device).view(num_experts, -1)
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
    return split.train(mlp.training)


def group_neurons(neuron_activations: Tensor, down_proj: Tensor, num_experts: int) -> Tensor:
    """Deals the neurons out to experts in falling order of ``mean(a_i²) * |d_i|²``.

    Args:
        neuron_activations: [num_tokens, num_neurons].
        down_proj: [hidden_size, num_neurons].

    Returns:
        [num_experts, num_neurons / num_experts] int64, the neurons of each expert in rising order.
    """
    order = neuron_importance(neuron_activations, down_proj).argsort(descending=True, stable=True)
    return order.view(num_experts, -1).sort(1).values


def neuron_importance(neuron_activations: Tensor, down_proj: Tensor) -> Tensor:
    """``mean(a_i²) * |d_i|²``, the expected squared length of what each neuron adds: [num_neurons] in float32."""
    return neuron_activations.float().square().mean(0) * down_proj.float().square().sum(0)


def cluster_neurons(weights: Tensor, starts: Tensor, *, num_rounds: int = 10) -> Tensor:
    """Balanced k-means of the rows of ``weights``, scaled to length 1.

    Each round pairs neurons with clusters, nearest pairs first, until every cluster is full, and moves the clusters to
    their means; it ends early when nothing moves.

    Args:
        weights: [num_neurons, size].
        starts: [num_clusters], the neurons where the clusters start; their number divides num_neurons.
        num_rounds: the most rounds.

    Returns:
        [num_clusters, num_neurons / num_clusters] int64, the neurons of each cluster in rising order. Deterministic.
    """
    rows = torch.nn.functional.normalize(weights.double(), dim=1).cpu()
    num_neurons, num_clusters = rows.shape[0], starts.numel()
    size = num_neurons // num_clusters
    centers, found = rows[starts.cpu()], None
    for _ in range(num_rounds):
        home, room = [-1] * num_neurons, [size] * num_clusters
        for pair in torch.cdist(rows, centers).flatten().argsort(stable=True).tolist():
            neuron, cluster = divmod(pair, num_clusters)
            if home[neuron] < 0 and room[cluster]:
                home[neuron] = cluster
                room[cluster] -= 1
        clusters = torch.tensor(home).argsort(stable=True).view(num_clusters, size)
        if found is not None and torch.equal(clusters, found):
            break
        found = clusters
        centers = rows[clusters].mean(1)
    return found.to(weights.device)


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
