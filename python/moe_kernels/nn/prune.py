"""Fewer experts from many: :func:`prune_experts` and :func:`merge_experts`."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels._checks import shape_error, value_error
from moe_kernels.nn.align import match_neurons
from moe_kernels.nn.layers import ExpertLayer, expert_layers, remix, set_num_experts


@torch.no_grad()
def prune_experts(
    model: nn.Module, counts: dict[str, Tensor], num_experts: int, *, merge: bool = False, align: bool = True
) -> nn.Module:
    """Keeps each layer's ``num_experts`` most used experts, and drops the others or merges them into those.

    ::

        kept    = the num_experts experts with the largest counts, lowest id first among equals, in rising order
        dropped = gone, with their rows of the router                                             merge=False
                  joined to the kept expert whose router row has the nearest direction            merge=True
        merged  = the members' mean, weighted by counts, as in merge_experts

    Counted on a task's tokens (:class:`ModuleStatistics`) this is task-specific pruning. UNCURL merges rather than
    drops, and found that dropping by usage alone hurts; it differs from this in that its groups come from spectral
    clustering of router logits. Give such groups, or any, to :func:`merge_experts`.

    Args:
        model: a model with :class:`MoEFeedForward` layers, such a layer, or a transformers Mixtral, OLMoE, Qwen2-MoE or
            Qwen3-MoE; it is not changed.
        counts: ``ModuleStatistics.counts``: layer name -> [num_experts] or [num_labels, num_experts] (added up).
        num_experts: experts to keep in every layer, at least top_k.
        merge: whether dropped experts are merged into kept ones.
        align: whether the neurons of merged experts are matched first, see :func:`merge_experts`.

    Returns:
        A copy of the model; it saves and loads as any model of its class. Statistics and router logits count anew from
        0 to num_experts - 1 in the order of the old ids.

    Source: Sarkar et al., "Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific Expert
    Pruning" (UNCURL), arXiv 2409.01483.
    """
    op = "prune_experts"
    pruned = copy.deepcopy(model)
    layers = expert_layers(op, pruned)
    for layer in layers:
        _check_top_k(op, layer, num_experts)
        usage = _usage(op, counts, layer)
        kept = usage.argsort(descending=True, stable=True)[:num_experts].sort().values
        mixing = F.one_hot(kept, layer.num_experts).double()
        if merge:
            directions = F.normalize(layer.router.weight[: layer.num_experts].double().cpu(), dim=1)
            home = (directions @ directions[kept].T).argmax(1)
            home[kept] = torch.arange(num_experts)
            groups = [(home == group).nonzero().flatten().tolist() for group in range(num_experts)]
            if align:
                _align(layer, groups, usage)
            mixing = _averaging(groups, usage)
        remix(layer, mixing)
    set_num_experts(op, pruned, layers)
    return pruned


@torch.no_grad()
def merge_experts(
    model: nn.Module,
    groups: list[list[int]] | dict[str, list[list[int]]],
    *,
    counts: dict[str, Tensor] | None = None,
    align: bool = True,
) -> nn.Module:
    """Makes one expert of each group: the mean of its members' weights and router rows, weighted by ``counts``.

    The order of the neurons in an expert is arbitrary, so a mean of unmatched neurons is a mean of strangers: with
    ``align`` each member's neurons are first put in the order that brings its gate, up and down weights nearest to the
    group's most used member (an assignment problem, solved exactly). That changes no member's function.

    Args:
        model: as for :func:`prune_experts`; it is not changed.
        groups: the new experts, each a list of old ones; every old expert is in one group. One list for all layers, or
            layer name -> list.
        counts: weights of the means, as for :func:`prune_experts`; None, or a group without any count, weighs equally.
        align: whether neurons are matched.

    Returns:
        A copy of the model; it saves and loads as any model of its class.

    Sources: UNCURL, arXiv 2409.01483; Ainsworth et al., "Git Re-Basin", arXiv 2209.04836 (weight matching).
    """
    op = "merge_experts"
    merged = copy.deepcopy(model)
    layers = expert_layers(op, merged)
    for layer in layers:
        own = groups[layer.name] if isinstance(groups, dict) else groups
        if sorted(expert for group in own for expert in group) != list(range(layer.num_experts)) or not all(own):
            raise value_error(op, "groups", f"a partition of the {layer.num_experts} experts", own)
        _check_top_k(op, layer, len(own))
        usage = _usage(op, counts, layer) if counts is not None else torch.ones(layer.num_experts)
        if align:
            _align(layer, own, usage)
        remix(layer, _averaging(own, usage))
    set_num_experts(op, merged, layers)
    return merged


def _usage(op: str, counts: dict[str, Tensor], layer: ExpertLayer) -> Tensor:
    if layer.name not in counts:
        raise value_error(op, "counts", f"with an entry for layer '{layer.name}'", sorted(counts))
    usage = counts[layer.name].double().cpu()
    usage = usage.sum(0) if usage.dim() == 2 else usage
    if usage.dim() != 1 or usage.shape[0] < layer.num_experts:
        raise shape_error(op, "counts", f"[num_experts={layer.num_experts}]", counts[layer.name])
    return usage[: layer.num_experts]  # identity and null experts follow


def _check_top_k(op: str, layer: ExpertLayer, num_experts: int) -> None:
    if not max(layer.top_k, 1) <= num_experts <= layer.num_experts:
        expected = f"in [top_k={layer.top_k}, num_experts={layer.num_experts}]"
        raise value_error(op, "num_experts", expected, num_experts)


def _averaging(groups: list[list[int]], usage: Tensor) -> Tensor:
    mixing = torch.zeros(len(groups), usage.shape[0], dtype=torch.float64)
    for row, group in zip(mixing, groups, strict=True):
        weights = usage[group].double()
        row[group] = weights / weights.sum() if weights.sum() > 0 else 1 / len(group)
    return mixing


def _align(layer: ExpertLayer, groups: list[list[int]], usage: Tensor) -> None:
    gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
    intermediate_size = down.shape[2]
    # [num_experts, neurons, gate, up and down weights]: what a neuron is
    neurons = torch.cat([*gate_up.split(intermediate_size, dim=1), down.transpose(1, 2)], dim=2).double().cpu()
    for group in groups:
        leader = max(group, key=lambda expert: (usage[expert].item(), -expert))
        for member in group:
            if member == leader:
                continue
            order = match_neurons(neurons[leader], neurons[member]).to(down.device)
            gate_up[member] = torch.cat([half[order] for half in gate_up[member].split(intermediate_size)])
            down[member] = down[member][:, order]
