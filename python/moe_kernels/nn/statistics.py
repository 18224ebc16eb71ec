"""Who was used, and by which tokens: :class:`ModuleStatistics`."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_kernels._checks import shape_error, value_error
from moe_kernels.nn.feed_forward import MoEFeedForward, Routed, recomputes

_OP = "ModuleStatistics"


class ModuleStatistics:
    """Counts, for every mixture-of-experts layer of a model, which experts tokens of which kind take.

    ::

        with ModuleStatistics(model) as statistics:
            with statistics.label(0):
                model(harmless)
            with statistics.label(1):
                model(refused)
        statistics.counts["layers.3.mlp"]           # [2, num_experts]

    Serves :class:`MoEFeedForward` and the expert modules of transformers, whose forward takes ``hidden_states,
    top_k_index, top_k_weights``, whatever runs them. A checkpointed forward counts once.

    Args:
        model: the model, or one layer.

    Attributes:
        counts: layer name -> [num_labels, num_experts] int64: tokens that took the expert. UNCURL prunes by these.
        weights: layer name -> [num_labels, num_experts] float64: the sum of their routing weights.
        tokens: layer name -> [num_labels] int64: tokens that the layer saw.
    """

    def __init__(self, model: nn.Module):
        self.counts: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}
        self._layers = {name: module for name, module in model.named_modules() if _num_experts(module) is not None}
        if not self._layers:
            raise value_error(_OP, "model", "one with mixture-of-experts layers", type(model).__name__)
        self._handles: list = []
        self._labels: int | Tensor = 0

    def __enter__(self) -> "ModuleStatistics":
        for name, module in self._layers.items():
            if isinstance(module, MoEFeedForward):
                self._handles.append(module.register_routing_hook(self._routing_hook(name)))
            else:
                hook = self._experts_hook(name)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def label(self, labels: int | Tensor) -> Iterator[None]:
        """Files what runs inside under a kind: one number for all tokens, or a tensor with one for each token.

        Args:
            labels: integer(s) from 0 on; -1 in a tensor leaves a token (padding) out. Any shape with as many elements
                as the layers see tokens: token ids, task numbers, positions.
        """
        before, self._labels = self._labels, labels
        try:
            yield
        finally:
            self._labels = before

    def all_reduce(self, group: "torch.distributed.ProcessGroup | None" = None) -> None:
        """Adds up what the ranks of a group (None: all) have counted, each over its own tokens; all of them must call.

        Every rank then has the counts of the whole batch. The ranks may have seen different kinds.
        """
        heard: list = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(heard, (self.counts, self.weights, self.tokens), group=group)
        self.counts, self.weights, self.tokens = {}, {}, {}
        for tables in heard:
            for name, counts in tables[0].items():
                self._grow(name, *counts.shape)
                for total, table in zip((self.counts, self.weights, self.tokens), tables, strict=True):
                    total[name][: len(table[name])] += table[name]

    def share(self, name: str) -> Tensor:
        """``counts / tokens``: the share of each kind's tokens that took each expert, 0 where no token was seen."""
        return self.counts[name] / self.tokens[name].clamp(min=1)[:, None]

    def distinctive(self, label: int, against: int) -> list[tuple[str, int, float]]:
        """All experts as (layer, expert, difference of :meth:`share`), those that ``label`` uses more first (MoTE)."""
        found = []
        for name in self.counts:
            share = self.share(name)
            if max(label, against) >= share.shape[0]:
                raise value_error(_OP, "label", f"below the {share.shape[0]} that were seen", max(label, against))
            difference = (share[label] - share[against]).tolist()
            found += [(name, expert, amount) for expert, amount in enumerate(difference)]
        return sorted(found, key=lambda entry: -entry[2])  # stable: layers and experts in order among equals

    def _routing_hook(self, name: str):
        def hook(routed: Routed) -> None:
            self._add(name, routed.topk_ids, routed.topk_weights)

        return hook

    def _experts_hook(self, name: str):
        def hook(_, args: tuple, kwargs: dict) -> None:
            if not recomputes():
                named = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
                self._add(name, named["top_k_index"], named["top_k_weights"])

        return hook

    @torch.no_grad()
    def _add(self, name: str, topk_ids: Tensor, topk_weights: Tensor) -> None:
        num_experts = _num_experts(self._layers[name])
        topk_ids, topk_weights = topk_ids.cpu().long(), topk_weights.detach().cpu().double()
        num_tokens, top_k = topk_ids.shape
        if isinstance(self._labels, int):
            labels = torch.full((num_tokens,), self._labels)
        else:
            labels = self._labels.detach().cpu().long().flatten()
            if labels.numel() != num_tokens:
                raise shape_error(_OP, "labels", f"[num_tokens={num_tokens}]", labels)
        num_labels = max(int(labels.max()) + 1 if num_tokens else 0, 0)
        self._grow(name, num_labels, num_experts)
        seen = labels >= 0
        self.tokens[name].index_add_(0, labels[seen], torch.ones_like(labels[seen]))
        taken = seen[:, None] & (topk_ids >= 0) & (topk_ids < num_experts)
        cells = (labels[:, None] * num_experts + topk_ids)[taken]
        self.counts[name].view(-1).index_add_(0, cells, torch.ones_like(cells))
        self.weights[name].view(-1).index_add_(0, cells, topk_weights[taken])

    def _grow(self, name: str, num_labels: int, num_experts: int) -> None:
        if name not in self.counts:
            self.counts[name] = torch.zeros(0, num_experts, dtype=torch.int64)
            self.weights[name] = torch.zeros(0, num_experts, dtype=torch.float64)
            self.tokens[name] = torch.zeros(0, dtype=torch.int64)
        for table in (self.counts, self.weights, self.tokens):
            old = table[name]
            if old.shape[0] < num_labels:
                table[name] = torch.cat([old, old.new_zeros(num_labels - old.shape[0], *old.shape[1:])])


def _num_experts(module: nn.Module) -> int | None:
    """Number of experts of a layer whose routing can be seen, else None."""
    if isinstance(module, MoEFeedForward):
        return module.num_experts + module.num_identity_experts + module.num_null_experts
    down_proj = getattr(module, "down_proj", None)
    if isinstance(down_proj, Tensor) and down_proj.dim() == 3:
        return down_proj.shape[0]
    return None
