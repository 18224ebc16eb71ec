"""Poly and multi-head routing: tasks that mix the factors of shared skills."""

import math

import torch
from torch import Tensor, nn

from moe_kernels import lora_expand, lora_shrink
from moe_kernels._checks import value_error
from moe_kernels.nn.multi_lora import AdapterRouting


class PolyLoRALinear(nn.Module):
    """Poly (arXiv 2202.13914), with ``num_splits > 1`` multi-head routing (2211.03831).

    A task z weighs the skills with ``w = sigmoid(Z[z]) / (sum sigmoid(Z[z]) + 1e-12)``, in training with a sample of
    the relaxed Bernoulli distribution of those logits. Inputs and outputs are cut into splits q of own weights::

        v    = sum_q (sum_e w[q, e] A[q, e]) x[q]
        y[q] = (W x + b)[q] + (sum_e w[q, e] B[q, e]) v / rank

    so factors are mixed, not outputs (:func:`moe_kernels.routed_lora`, ``combine="factor"``, is one split of it).

    Args:
        base_layer: the layer to add to.
        routing: whose ``adapter_ids`` are the tasks of the sequences; one object for all layers of a model. An id that
            is no task (-1) leaves its sequence to the base layer.
        temperature: of the relaxed distribution.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        num_tasks: int,
        num_skills: int,
        routing: AdapterRouting,
        *,
        rank: int = 8,
        num_splits: int = 1,
        temperature: float = 1.0,
    ):
        super().__init__()
        features = (base_layer.in_features, base_layer.out_features)
        if features[0] % num_splits or features[1] % num_splits:
            raise value_error("PolyLoRALinear", "num_splits", f"a divisor of in and out {features}", num_splits)
        self.base_layer, self.routing, self.rank, self.temperature = base_layer, routing, rank, temperature
        like = dict(dtype=base_layer.weight.dtype, device=base_layer.weight.device)
        self.task_logits = nn.Parameter(torch.empty(num_tasks, num_splits, num_skills, device=like["device"]))
        nn.init.uniform_(self.task_logits, -1e-3, 1e-3)
        a, b = (torch.zeros(num_splits, num_skills, rank, size // num_splits, **like) for size in features)
        self.lora_a = nn.Parameter(a.uniform_(-1, 1) / math.sqrt(features[0]))
        self.lora_b_rows = nn.Parameter(b)  # in memory [.., rank, out], which the kernels read in place

    def weights(self, tasks: Tensor) -> Tensor:
        """[len(tasks), num_splits, num_skills], 0 for what is no task; in training each entry draws its own."""
        num_tasks = len(self.task_logits)
        logits = self.task_logits[tasks.long().clamp(0, num_tasks - 1)]
        if self.training:
            distribution = torch.distributions.RelaxedBernoulli(self.temperature, logits=logits)
            chosen = distribution.rsample()
        else:
            chosen = logits.sigmoid()
        weights = chosen / (chosen.sum(-1, keepdim=True) + 1e-12)
        return weights.masked_fill(((tasks < 0) | (tasks >= num_tasks))[:, None, None], 0)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer(x)
        if self.routing.adapter_ids is None:
            return base
        # drawn once a sequence, then laid out for its tokens
        rows = AdapterRouting()
        rows.set(torch.arange(len(self.routing.adapter_ids), device=x.device), per=self.routing.per)
        tokens = rows.of_tokens(x.shape[:-1])[0][:, 0]
        weights = self.weights(self.routing.adapter_ids)[tokens]
        num_splits, num_skills = self.lora_a.shape[:2]
        ids = torch.arange(num_skills, dtype=torch.int32, device=x.device).expand(len(tokens), -1)
        v = 0
        for q, part in enumerate(x.flatten(0, -2).chunk(num_splits, -1)):
            of_skills = lora_shrink(part, self.lora_a[q], ids)
            v = v + (weights[:, q, :, None].to(of_skills.dtype) * of_skills).sum(1)
        v = v[:, None].expand(-1, num_skills, -1)
        out = []
        for q, part in enumerate(base.flatten(0, -2).chunk(num_splits, -1)):
            lora_b = self.lora_b_rows[q].transpose(1, 2)
            out.append(lora_expand(v, lora_b, ids, weights[:, q], scaling=1 / self.rank, base=part))
        return torch.cat(out, -1).reshape(base.shape)
