"""All sources of a generation, those of one model in one batch: :class:`JointSources`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.integrations.transformers.source_state import Prompt, SourceState


class JointSources:
    """Logits of K sources. A model that reads several prompts reads them as rows of one batch.

    At each step its weights are then read once. The shorter prompts are padded for that, and a padded place costs at
    most what a token that is read alone does: prompts are joined where they are padded by no more than may be written.

    Args:
        prompts: one for each source, all of as many rows.
        num_new: how many tokens may follow.
    """

    def __init__(self, prompts: Sequence[Prompt], num_new: int):
        self.num_sources, self.num_rows = len(prompts), prompts[0].input_ids.shape[0]
        groups: list[list[int]] = []
        for k, prompt in enumerate(prompts):
            for group in groups:
                joined = [prompts[j] for j in (*group, k)]
                if prompts[group[0]].model is prompt.model and _padding(joined) <= num_new:
                    group.append(k)
                    break
            else:
                groups.append([k])
        self._groups = [(group, SourceState(_join([prompts[k] for k in group]))) for group in groups]

    def logits(self) -> list[Tensor]:
        """Of each source [num_rows, vocab]: after the last token."""
        found: dict[int, Tensor] = {}
        for group, state in self._groups:
            found |= zip(group, state.logits()[:, -1].split(self.num_rows), strict=True)
        return [found[k] for k in range(self.num_sources)]

    def append(self, tokens: Tensor) -> None:
        """Tokens [num_rows, 1] follow in every source."""
        for group, state in self._groups:
            state.append(tokens.repeat(len(group), 1))

    def select(self, rows: Tensor) -> None:
        """Goes on with ``rows`` [n] of the present ones, in this order: reordered beams, rows that are left."""
        for group, state in self._groups:
            state.select(torch.cat([rows + part * self.num_rows for part in range(len(group))]))
        self.num_rows = rows.numel()


def _padding(prompts: Sequence[Prompt]) -> int:
    lengths = [prompt.input_ids.shape[1] for prompt in prompts]
    return max(lengths) * len(lengths) - sum(lengths)


def _join(prompts: Sequence[Prompt]) -> Prompt:
    """Rows of the first prompt, then of the second, padded on the left to the longest."""
    longest = max(prompt.input_ids.shape[1] for prompt in prompts)
    padded = ([F.pad(each, (longest - each.shape[1], 0)) for each in prompt[1:]] for prompt in prompts)
    ids, masks = zip(*padded, strict=True)
    return Prompt(prompts[0].model, torch.cat(ids), torch.cat(masks))
