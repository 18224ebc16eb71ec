"""Fusion as a logits processor: :class:`FusionLogitsProcessor`, for loops that take no ``custom_generate``."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from moe_kernels._checks import value_error
from moe_kernels.integrations.transformers.source_state import FusionSource, SourceState, check_tokenizers

_OP = "FusionLogitsProcessor"


class FusionLogitsProcessor(LogitsProcessor):
    """Fuses the scores of the generating model with the logits of other sources, one token a step.

    A processor sees tokens and scores alone: it is told neither that beams were reordered nor that a generation is
    over. So it serves one call of ``generate``, greedy or sampling, and refuses the rest, which
    :class:`FusedGeneration` does.
    The scores are log-probabilities of what the processors before it left.

    Args:
        fuse, tokenizers: as for :class:`FusedGeneration`.
        others: the sources besides the generating model; each names its model. A prompt of its own has one row, or one
            for each row that is generated.
        attention_mask: of the call's prompt, where it is padded and a source reads it.

    Raises:
        ValueError: a source without a model, a prompt that is padded without a mask, vocabularies that do not fit.
        RuntimeError: the tokens do not go on from those of the step before: beams, or a second generation.
    """

    def __init__(
        self,
        fuse: Callable[..., Tensor],
        others: Sequence[FusionSource],
        *,
        attention_mask: Tensor | None = None,
        tokenizers: Sequence | None = None,
    ):
        if tokenizers is not None:
            check_tokenizers(_OP, tokenizers)
        self.fuse, self.others, self.attention_mask = fuse, list(others), attention_mask
        for k, source in enumerate(self.others):
            if source.model is None:
                remedy = "a processor does not see the model that generates"
                raise value_error(_OP, f"others[{k}]'s model", "given", None, remedy)
        self.states = None
        self.read: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[num_rows, vocab] log-probabilities of the next token."""
        if self.states is None:
            self.states = [self._start(k, source, input_ids) for k, source in enumerate(self.others)]
        elif torch.equal(self.read, input_ids[:, :-1]):
            for state in self.states:
                state.append(input_ids[:, -1:])
        else:
            raise RuntimeError(
                f"{_OP}: input_ids must be those of the last step and one token more, got others; beams need "
                "generate(custom_generate=FusedGeneration(...)), another generation a new processor"
            )
        self.read = input_ids
        return self.fuse(scores, *(state.logits()[:, -1] for state in self.states), out="log_probs")

    def _start(self, k: int, source: FusionSource, input_ids: Tensor) -> SourceState:
        name, mask = f"others[{k}]", self.attention_mask
        if source.input_ids is None and mask is None:
            # the call's prompt, which may be padded, is checked like a prompt of the source's own
            source = FusionSource(source.model, input_ids)
        return SourceState(source.prompt(_OP, name, source.model, input_ids, mask, repeats=1))
