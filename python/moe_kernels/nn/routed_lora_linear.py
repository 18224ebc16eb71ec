"""Linear layers whose tokens choose among adapters, and the published ways to choose."""

import math

import torch
from torch import Tensor, nn

from moe_kernels import balance_loss, localized_balance_loss, route, routed_lora
from moe_kernels._checks import shape_error, value_error
from moe_kernels.nn.multi_lora import dropout_of


class RoutedLoRALinear(nn.Module):
    """``y = W x + b + sum_k w_k s_k B_k A_k x`` over the adapters that a router chooses for each token.

    Args:
        base_layer: the layer to add to; its weight stays as it is.
        lora_a: [num_adapters, rank, in]; lora_b: [num_adapters, out, rank].
        router: module from tokens [num_tokens, in] to adapter_ids and adapter_weights [num_tokens, top_k].
        scaling: [num_adapters] or a number.
        combine: see :func:`moe_kernels.routed_lora`.
        dropout: of the adapters' input in training mode (PEFT's ``lora_dropout``); the router sees all of it.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        lora_a: Tensor,
        lora_b: Tensor,
        router: nn.Module,
        *,
        scaling: Tensor | float = 1.0,
        combine: str = "output",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.base_layer, self.router, self.combine, self.dropout = base_layer, router, combine, dropout
        self.lora_a = nn.Parameter(lora_a)
        # in memory [num_adapters, rank, out], which the kernels read in place
        self.lora_b_rows = nn.Parameter(lora_b.transpose(1, 2).contiguous())
        self.register_buffer("scaling", torch.as_tensor(scaling, dtype=torch.float32).expand(len(lora_a)).clone())

    @property
    def lora_b(self) -> Tensor:
        return self.lora_b_rows.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        base, tokens = self.base_layer(x), x.flatten(0, -2)
        ids, weights = self.router(tokens)
        out = routed_lora(
            tokens, self.lora_a, self.lora_b, ids, weights, scaling=self.scaling, base=base.flatten(0, -2),
            combine=self.combine, **dropout_of(self, x),
        )  # fmt: skip
        return out.reshape(base.shape)


class PhatgooseRouter(nn.Module):
    """PHATGOOSE (arXiv 2402.05859): ``softmax over the top k of LN(x) . LN(v_e) / sqrt(in)``, LN without affine part.

    With ``global_scores`` it is GLIDER (2410.07172): ``gamma * cos(query, expert)`` of the caller's text embeddings
    joins the local scores, for each token's own query, so that one batch may mix tasks.

    Args:
        gates: [num_adapters, in], one trained gate vector for each adapter.
        gamma: weight of the global scores.
    """

    def __init__(self, gates: Tensor, top_k: int = 2, *, gamma: float = 1.0):
        super().__init__()
        self.gates, self.top_k, self.gamma = nn.Parameter(gates), top_k, gamma
        self.global_scores: Tensor | None = None

    def set_queries(self, queries: Tensor | None, experts: Tensor | None = None) -> None:
        """Scores of the next calls: cosines of queries [num_tokens, dim] and experts [num_adapters, dim]; None: 0."""
        if queries is None:
            self.global_scores = None
            return
        normalize = nn.functional.normalize
        self.global_scores = normalize(queries.float(), dim=-1) @ normalize(experts.float(), dim=-1).T

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        width = x.shape[-1:]
        norm = nn.functional.layer_norm
        logits = norm(x.float(), width) @ norm(self.gates.float(), width).T / math.sqrt(width[0])
        if self.global_scores is not None:
            if self.global_scores.shape != logits.shape:
                expected = f"[num_tokens={len(x)}, dim], a row for each token"
                raise shape_error("PhatgooseRouter", "queries", expected, self.global_scores)
            logits = logits + self.gamma * self.global_scores
        return route(logits, self.top_k, renormalize=True)


class PhatgooseGate(nn.Module):
    """How PHATGOOSE trains a gate after its adapter: ``y = W x + s B A x * sigmoid(v . x)``, v alone being trained.

    A router of one adapter for :class:`RoutedLoRALinear`.
    """

    def __init__(self, in_features: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(in_features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.sigmoid(x @ self.gate.to(x.dtype))[:, None]
        return torch.zeros(len(x), 1, dtype=torch.int32, device=x.device), weights


class ArrowRouter(nn.Module):
    """Arrow (arXiv 2405.11157): ``softmax over the top k of |x . p_e| / temperature``; nothing is trained.

    The prototype ``p_e`` is the direction of the input that ``B_e A_e`` lengthens most: a right singular vector.

    Args:
        lora_a: [num_adapters, rank, in]; lora_b: [num_adapters, out, rank].
    """

    def __init__(self, lora_a: Tensor, lora_b: Tensor, top_k: int = 3, *, temperature: float = 1.0):
        super().__init__()
        if temperature <= 0:
            raise value_error("ArrowRouter", "temperature", "above 0", temperature)
        self.top_k, self.temperature = top_k, temperature
        self.register_buffer("prototypes", self.prototypes_of(lora_a, lora_b))

    @staticmethod
    @torch.no_grad()
    def prototypes_of(lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """[num_adapters, in], float32, through decompositions of the size of the rank."""
        basis, triangle_a = torch.linalg.qr(lora_a.float().transpose(1, 2))
        triangle_b = torch.linalg.qr(lora_b.float()).R
        _, _, right = torch.linalg.svd(triangle_b @ triangle_a.transpose(1, 2))
        return (basis @ right[:, :1].transpose(1, 2))[..., 0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = (x.float() @ self.prototypes.T).abs()
        return route(scores / self.temperature, self.top_k, renormalize=True)


class LoRAMoERouter(nn.Module):
    """LoRAMoE (arXiv 2312.09979): every adapter, weighted by ``softmax(W_g x)``."""

    def __init__(self, in_features: int, num_adapters: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_adapters, in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self._weights: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = (x @ self.weight.to(x.dtype).T).float().softmax(-1)
        self._weights = weights if self.training else None
        return torch.arange(weights.shape[1], dtype=torch.int32, device=x.device).expand(weights.shape), weights

    def balance_loss(self, expert_types: Tensor, sample_types: Tensor, *, delta: float = 0.1, form="paper") -> Tensor:
        """:func:`moe_kernels.localized_balance_loss` of the last batch in training, whose samples are equally long."""
        weights = _of_training("LoRAMoERouter", self._weights)
        importance = weights.unflatten(0, (len(sample_types), -1)).sum(1)
        return localized_balance_loss(importance, expert_types, sample_types, delta=delta, form=form)


class NullAdapterRouter(nn.Module):
    """MoLA with AdaMoE's null experts (arXiv 2406.13233): the top k of true and null adapters; nulls are no work.

    Softmax over all; the chosen true adapters share weight 1, and a token that chose nulls alone keeps its base.

    Args:
        top_k: chosen of ``num_adapters + num_null``, so that a token has from 0 to ``top_k`` adapters.
    """

    def __init__(self, in_features: int, num_adapters: int, num_null: int, top_k: int = 2):
        super().__init__()
        if not 1 <= top_k <= num_adapters + num_null:
            raise value_error("NullAdapterRouter", "top_k", f"in [1, {num_adapters + num_null}]", top_k)
        self.num_null, self.top_k = num_null, top_k
        self.weight = nn.Parameter(torch.empty(num_adapters + num_null, in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self._logits: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = (x @ self.weight.to(x.dtype).T).float()
        self._logits = logits if self.training else None
        ids, weights = route(logits, self.top_k, num_null_experts=self.num_null, renormalize=True)
        return torch.where(ids < len(self.weight) - self.num_null, ids, -1), weights

    def balance_loss(self, token_mask: Tensor | None = None) -> Tensor:
        """Switch's loss of the last batch in training; nulls share the mean of their load."""
        logits = _of_training("NullAdapterRouter", self._logits)
        chosen = logits.topk(self.top_k, dim=1).indices
        return balance_loss(logits, chosen, token_mask=token_mask, num_null_experts=self.num_null)


def _of_training(op: str, kept: Tensor | None) -> Tensor:
    if kept is None:
        raise RuntimeError(f"{op}: balance_loss must be called after a forward in training mode, got none")
    return kept
