"""Layers that serve many LoRA adapters in one batch: :class:`MultiLoRALinear`, :class:`MultiLoRAEmbedding`."""

from typing import Literal

import torch
from torch import Tensor, nn

from moe_kernels import lora_expand, routed_lora
from moe_kernels._checks import shape_error, value_error
from moe_kernels.nn.adapter_pool import AdapterPool


class AdapterRouting:
    """Which adapters the tokens of the next call use, shared by all layers of a model.

    The ids are data: another batch with other adapters runs the same compiled code.
    """

    def __init__(self):
        self.adapter_ids: Tensor | None = None
        self.adapter_weights: Tensor | None = None
        self.per: Literal["sequence", "token"] = "sequence"

    def set(
        self,
        adapter_ids: Tensor | None,
        adapter_weights: Tensor | None = None,
        *,
        per: Literal["sequence", "token"] = "sequence",
    ) -> None:
        """Sets what the next calls use; None: the base model alone.

        Args:
            adapter_ids: [batch] or [batch, top_k] for ``per="sequence"``, [num_tokens] or [num_tokens, top_k] in the
                order of the flattened tokens for ``per="token"``; -1 is no adapter.
            adapter_weights: of the same shape.
        """
        if per not in ("sequence", "token"):
            raise value_error("AdapterRouting", "per", "'sequence' or 'token'", repr(per))
        if adapter_weights is not None and (adapter_ids is None or adapter_weights.shape != adapter_ids.shape):
            expected = "None" if adapter_ids is None else str(list(adapter_ids.shape))
            raise shape_error("AdapterRouting", "adapter_weights", expected, adapter_weights)
        self.adapter_ids, self.adapter_weights, self.per = adapter_ids, adapter_weights, per

    def of_tokens(self, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        """adapter_ids and adapter_weights [num_tokens, top_k] for tokens of this leading shape."""
        ids, weights = self.adapter_ids, self.adapter_weights
        if ids.dim() == 1:
            ids, weights = ids[:, None], None if weights is None else weights[:, None]
        num_tokens = shape.numel()
        if self.per == "sequence" and len(shape) > 1 and ids.shape[0] == shape[0]:
            repeats = num_tokens // max(1, shape[0])
            ids = ids.repeat_interleave(repeats, 0)
            weights = None if weights is None else weights.repeat_interleave(repeats, 0)
        if ids.shape[0] != num_tokens:
            expected = f"[{shape[0] if self.per == 'sequence' else num_tokens}] for tokens of shape {list(shape)}"
            raise shape_error("AdapterRouting", "adapter_ids", expected, self.adapter_ids)
        return ids, weights


def dropout_of(module: nn.Module, x: Tensor) -> dict:
    """What ``routed_lora`` is told of a module's dropout: in training mode, with a new seed of torch's generator.

    A tensor on the device of ``x``: nothing waits for a GPU, and a checkpoint's second forward draws the same.
    """
    if not module.training or module.dropout == 0:
        return {}
    return dict(dropout=module.dropout, seed=torch.randint(2**63 - 1, (), device=x.device))


class MultiLoRALinear(nn.Module):
    """A linear layer whose tokens each use their own adapters: ``y = W x + b + sum_k w_k s_k B_k A_k x``.

    DoRA adapters of the pool also scale the rows of ``W x + s B A x`` (:func:`moe_kernels.routed_lora`, ``row_scale``).

    Args:
        base_layer: the layer to wrap; its weight stays as it is.
        pool: the adapters of this layer.
        routing: who uses which; one object for all layers of a model.
        dropout: of the adapters' input in training mode (PEFT's ``lora_dropout``); of DoRA's, the adapters' product
            alone, while PEFT's base product sees it too.
    """

    def __init__(self, base_layer: nn.Linear, pool: AdapterPool, routing: AdapterRouting, *, dropout: float = 0.0):
        super().__init__()
        self.base_layer, self.pool, self.routing, self.dropout = base_layer, pool, routing, dropout

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.routing.adapter_ids is None:
            return self.base_layer(x)
        pool, bias = self.pool, self.base_layer.bias
        adapter_ids, adapter_weights = self.routing.of_tokens(x.shape[:-1])
        apart = pool.row_scale is not None and bias is not None  # DoRA scales what comes before the bias
        base = nn.functional.linear(x, self.base_layer.weight) if apart else self.base_layer(x)
        out = routed_lora(
            x.flatten(0, -2),
            pool.lora_a,
            pool.lora_b,
            adapter_ids,
            adapter_weights,
            scaling=pool.scaling,
            ranks=pool.ranks,
            rank_starts=pool.rank_starts,
            max_rank=pool.max_rank,
            row_scale=pool.row_scale,
            base=base.flatten(0, -2),
            **dropout_of(self, x),
        ).reshape(base.shape)
        return out + bias if apart else out


class MultiLoRAEmbedding(nn.Module):
    """An embedding with adapters: ``y = E[i] + sum_k w_k s_k B_k A_k[:, i]``. The pool's ``in`` is the vocabulary."""

    def __init__(self, base_layer: nn.Embedding, pool: AdapterPool, routing: AdapterRouting):
        super().__init__()
        if type(base_layer).forward is not nn.Embedding.forward:
            # Gemma's multiplies by a scale: an adapter beside it would be added unscaled
            name = type(base_layer).__name__
            raise value_error("MultiLoRAEmbedding", "base_layer", "an Embedding with torch's own forward", name)
        self.base_layer, self.pool, self.routing = base_layer, pool, routing

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        base = self.base_layer(token_ids)
        if self.routing.adapter_ids is None:
            return base
        pool = self.pool
        adapter_ids, adapter_weights = self.routing.of_tokens(token_ids.shape)
        # column i of A_k is a gather; rows past an adapter's rank are not read by lora_expand
        rank = torch.arange(pool.max_rank, device=token_ids.device)
        rows = pool.rank_starts[adapter_ids.clamp_min(0).long()][..., None] + rank
        v = pool.lora_a[rows.clamp_max(len(pool.lora_a) - 1), token_ids.reshape(-1, 1, 1)].float()
        out = lora_expand(
            v.double() if base.dtype == torch.float64 else v,
            pool.lora_b,
            adapter_ids,
            adapter_weights,
            scaling=pool.scaling,
            ranks=pool.ranks,
            rank_starts=pool.rank_starts,
            base=base.flatten(0, -2),
        )
        return out.reshape(base.shape)
