"""A reward model in two levels: a router chooses the task, adapters read the input for each of its capabilities."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_kernels._checks import shape_error
from moe_kernels.nn.multi_lora import AdapterRouting


class DMoERewardModel(nn.Module):
    """DMoERM (arXiv 2403.01197): ``reward = W1 PReLU(W0 [z_1; ..; z_K] + b0) + b1`` of the task that a router chooses.

    ``z_i`` is the last token's hidden state with capability adapter i of the task. The outer level is the argmax of a
    linear map of the last hidden state without adapters. All K readings of all sequences, whatever their tasks, are one
    batch; the released code runs the model once for each adapter.

    Args:
        encode: token ids [batch, length] -> hidden states [batch, length, hidden_size]; its layers share ``routing``.
        capabilities: [num_tasks, K] int32, the adapter of each capability of each task.
        inner_size: rows of W0.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        routing: AdapterRouting,
        capabilities: Tensor,
        hidden_size: int,
        *,
        inner_size: int = 64,
    ):
        super().__init__()
        if capabilities.dim() != 2:
            raise shape_error("DMoERewardModel", "capabilities", "[num_tasks, num_capabilities]", capabilities)
        self.encode, self.routing = encode, routing
        num_tasks, num_capabilities = capabilities.shape
        self.register_buffer("capabilities", capabilities.int())
        self.router = nn.Linear(hidden_size, num_tasks)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(num_capabilities * hidden_size, inner_size), nn.PReLU(), nn.Linear(inner_size, 1))
            for _ in range(num_tasks)
        )

    def forward(self, token_ids: Tensor, lengths: Tensor | None = None, tasks: Tensor | None = None) -> Tensor:
        """Rewards [batch].

        Args:
            token_ids: [batch, length], padded on the right.
            lengths: [batch], tokens that count; None: all.
            tasks: [batch], the outer choice where it is known (training); None: the router's.
        """
        batch, length = token_ids.shape
        lengths = token_ids.new_full((batch,), length) if lengths is None else lengths
        if tasks is None:
            self.routing.set(None)
            tasks = self.router(self._last(token_ids, lengths)).argmax(1)
        adapters = self.capabilities[tasks]
        repeats = adapters.shape[1]
        self.routing.set(adapters.flatten())
        z = self._last(token_ids.repeat_interleave(repeats, 0), lengths.repeat_interleave(repeats))
        self.routing.set(None)
        z = z.reshape(batch, -1)
        rewards = torch.stack([head(z)[:, 0] for head in self.heads], 1)  # the heads are tiny beside the model
        return rewards.gather(1, tasks[:, None])[:, 0]

    def _last(self, token_ids: Tensor, lengths: Tensor) -> Tensor:
        hidden_states = self.encode(token_ids)
        return hidden_states[torch.arange(len(lengths), device=lengths.device), lengths - 1]
