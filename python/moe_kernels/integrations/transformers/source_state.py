"""One source of a fusion while it generates: a model, what it has read, and its key/value cache."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_kernels._checks import shape_error, value_error


@dataclass(frozen=True)
class FusionSource:
    """A model and what it reads before the tokens that are generated.

    Attributes:
        model: None is the model that generates.
        input_ids: [1 or batch_size, length] token ids of its own prompt; None is the prompt of the call, "last_token"
            that prompt's last token alone, which is what guidance without a negative prompt has always meant.
        attention_mask: like ``input_ids``, 1 where a token counts; padding is on the left.
    """

    model: PreTrainedModel | None = None
    input_ids: Tensor | Literal["last_token"] | None = None
    attention_mask: Tensor | None = None

    def prompt(
        self, op: str, name: str, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, repeats: int
    ) -> "Prompt":
        """What it reads before the first token, a row for each that is generated.

        Args:
            op, name: for errors.
            model, input_ids, attention_mask: of the call; ``repeats`` rows of ``input_ids`` stand for one prompt.
        """
        model = model if self.model is None else self.model
        if model.config.is_encoder_decoder:
            raise value_error(op, name, "a decoder-only model", type(model).__name__)
        if model.device != input_ids.device:
            raise value_error(op, name, f"on {input_ids.device}, as the prompt", model.device, "move it with .to()")
        if self.input_ids is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            if not mask[:, -1].all():
                raise value_error(op, f"{name}'s attention_mask", "1 at the end of each row", 0, "pad on the left")
            return Prompt(model, input_ids, mask.long())
        if isinstance(self.input_ids, str):
            return Prompt(model, input_ids[:, -1:], torch.ones_like(input_ids[:, -1:]))
        batch_size = input_ids.shape[0] // repeats
        ids, mask = self.input_ids, self.attention_mask
        if ids.dim() != 2 or ids.shape[0] not in (1, batch_size) or ids.shape[1] == 0:
            raise shape_error(op, f"{name}'s input_ids", f"[1 or batch_size={batch_size}, length >= 1]", ids)
        if mask is not None and mask.shape != ids.shape:
            raise shape_error(op, f"{name}'s attention_mask", f"{list(ids.shape)}, as its input_ids", mask)
        pad = model.config.get_text_config().pad_token_id
        if mask is None and pad is not None and (ids[:, 0] == pad).any():
            remedy = "give its attention_mask, be it of ones"
            raise value_error(
                op, f"{name}'s input_ids", "without padding where no mask is given", "a pad token", remedy
            )
        if mask is not None and not mask[:, -1].all():
            raise value_error(op, f"{name}'s attention_mask", "1 at the end of each row", 0, "pad on the left")
        mask = torch.ones_like(ids) if mask is None else mask.long()
        repeats = input_ids.shape[0] // ids.shape[0]
        return Prompt(model, *(each.to(input_ids.device).repeat_interleave(repeats, 0) for each in (ids, mask)))


class Prompt(NamedTuple):
    """A model and what it has to read: ``input_ids``, ``mask`` [num_rows, length] int64, padded on the left."""

    model: PreTrainedModel
    input_ids: Tensor
    mask: Tensor


class SourceState:
    """Logits of the next token, given those before.

    Attributes:
        unread: [num_rows, n] the tokens that the next :meth:`logits` reads.
    """

    def __init__(self, prompt: Prompt):
        self.model, self.unread, self._mask = prompt
        self._cache = None
        parameters = inspect.signature(self.model.forward).parameters
        # transformers 5.24 renamed it
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        if self._cache_name not in parameters:
            raise value_error("FusedGeneration", "models", "with a key/value cache", type(self.model).__name__)
        self._takes_positions = "position_ids" in parameters
        self._chooses_logits = "logits_to_keep" in parameters

    def append(self, tokens: Tensor) -> None:
        """Tokens [num_rows, n] follow."""
        self.unread = tokens if self.unread is None else torch.cat([self.unread, tokens], 1)
        self._mask = torch.cat([self._mask, torch.ones_like(tokens)], 1)

    def logits(self, num_positions: int = 1) -> Tensor:
        """[num_rows, num_positions, vocab]: after each of the last tokens, as the model's dtype has them."""
        tokens, self.unread = self.unread, None
        arguments = {"attention_mask": self._mask, self._cache_name: self._cache, "use_cache": True}
        if self._takes_positions:
            positions = (self._mask.cumsum(1) - 1).clamp(min=0)
            arguments["position_ids"] = positions[:, -tokens.shape[1] :]
        if self._chooses_logits:
            arguments["logits_to_keep"] = num_positions
        outputs = self.model(input_ids=tokens, **arguments)
        self._cache = outputs[self._cache_name]
        return outputs.logits[:, -num_positions:]

    def select(self, rows: Tensor) -> None:
        """Goes on with ``rows`` [n] of the present ones, in this order: reordered beams, rows that are left."""
        self._mask = self._mask[rows]
        self.unread = None if self.unread is None else self.unread[rows]
        self._cache.reorder_cache(rows)

    def read_prompt(self) -> None:
        """Reads all but the last token, so that :meth:`forget` can be called after each :meth:`logits`."""
        mask, last = self._mask, self.unread[:, -1:]
        if self.unread.shape[1] > 1:
            self.unread, self._mask = self.unread[:, :-1], mask[:, :-1]
            self.logits()
            # a window drops what leaves it; from here on it waits for forget
            if hasattr(self._cache, "activate_past_recording"):
                self._cache.activate_past_recording()
        self.unread, self._mask = last, mask

    def forget(self, num_tokens: int) -> None:
        """The last tokens that were read were not."""
        self._cache.crop(-num_tokens)  # none of them is a call too: a window drops what it kept to go back
        self._mask = self._mask[:, : self._mask.shape[1] - num_tokens]


def check_rows(has_token: Tensor, rows: Tensor) -> None:
    """Raises unless every row has a token to go on with; ``rows``: their numbers."""
    if not has_token.all():
        raise RuntimeError(
            f"FusedGeneration: the fused logits of row {rows[~has_token][0].item()} must have a token to choose, "
            "got none: all are -inf, or one is NaN; look at the sources' logits and at what processors leave"
        )


def check_tokenizers(op: str, tokenizers: Sequence) -> None:
    """Raises where tokenizers do not give every token that they share a place in all: fused ids would mean two things.

    One tokenizer may end before another (padding, added tokens); what they both have must be the same.
    """
    first, *others = (tokenizer.get_vocab() for tokenizer in tokenizers)
    by_id = {index: token for token, index in first.items()}
    for k, other in enumerate(others, 1):
        for token, index in other.items():
            if by_id.get(index, token) != token:
                expected = f"the vocabulary of tokenizers[0], where {index} is {by_id[index]!r}"
                raise value_error(op, f"tokenizers[{k}]", expected, repr(token), "fuse models of one tokenizer")
