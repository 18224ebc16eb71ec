"""Generation by several models, or by one on several prompts: :class:`FusedGeneration` for ``custom_generate=``."""

from collections.abc import Callable, Sequence
from itertools import count

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from moe_kernels._checks import shape_error, value_error
from moe_kernels.integrations.transformers.fused_beams import search_beams
from moe_kernels.integrations.transformers.fused_speculation import speculate
from moe_kernels.integrations.transformers.joint_sources import JointSources
from moe_kernels.integrations.transformers.source_state import FusionSource, Prompt, check_rows, check_tokenizers
from moe_kernels.ops.logit_fusion import fuse_logits

#: what ``generate`` hands on that has no meaning for the fusion, which owns every cache, mask and position
_OURS = {"attention_mask", "position_ids", "cache", "past_key_values", "use_cache", "logits_to_keep"}
_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
_OP = "FusedGeneration"


class FusedGeneration:
    """Tokens from the fused logits of several sources, each with a key/value cache of its own.

    ::

        fusion = FusedGeneration(partial(presets.guidance, scale=1.5), [FusionSource(input_ids=negative)])
        model.generate(**inputs, custom_generate=fusion, num_beams=4)

    The first source is the model that generates, on its own prompt. At each step every source reads the token that
    was chosen, prompts of one model as rows of one batch; ``fuse`` makes one distribution of their logits, then come
    the processors that ``generate`` made of its arguments (temperature, top-k, penalties), then the choice. Caches
    follow the beams, and finished rows leave them. A draw is a function of seed, request and step alone
    (:func:`moe_kernels.fuse_logits`), so a row is the same beside any others, as far as the models' own logits are.
    Beams are those of transformers' beam search; beams that sample draw from PyTorch's generator as they do there.

    Arguments of ``generate`` that belong to it: ``seed`` in [0, 2**32) (by default one that PyTorch's generator draws)
    and ``request_ids`` ([batch_size] int64 below 2**32; by default the place in the batch). transformers 5.24 keeps
    ``streamer`` from a callable: give it as ``custom_generate=partial(fusion, streamer=streamer)``.

    With ``draft`` one of the others writes ``num_draft`` tokens ahead, the rest read them at once, and those stay that
    leave the distribution as it was (:func:`moe_kernels.fused_verify`): for one row, whose caches can go back.

    Args:
        fuse: called as ``fuse(*logits, **options)`` with logits [num_rows, vocab] of the generating model and of each
            of ``others``, and ``out``, ``request_ids``, ``seed`` and ``step`` of :func:`moe_kernels.fuse_logits`,
            which it passes on: a preset, or a function of your own.
        others: the sources besides the generating model.
        tokenizers: of all models, if their vocabularies shall be compared: ids that mean two things are refused.
        draft: position in ``others`` of the source that drafts; none by default.
        num_draft: how many tokens at a time.

    Raises:
        ValueError: what would be wrong in silence: other inputs than token ids, padding on the right, an encoder, a
            vocabulary that does not fit, a filled cache, outputs that are not kept, a streamer with beams.
        RuntimeError: a row has no token left, or NaN.
    """

    def __init__(
        self,
        fuse: Callable[..., Tensor],
        others: Sequence[FusionSource],
        *,
        tokenizers: Sequence | None = None,
        draft: int | None = None,
        num_draft: int = 4,
    ):
        if tokenizers is not None:
            check_tokenizers(_OP, tokenizers)
        self.fuse, self.others = fuse, list(others)
        if draft is not None and not 0 <= draft < len(self.others):
            raise value_error(_OP, "draft", f"in [0, {len(self.others)}), the other sources", draft)
        if num_draft < 1:
            raise value_error(_OP, "num_draft", "at least 1", num_draft)
        self.draft, self.num_draft = draft, num_draft

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer=None,
        synced_gpus: bool = False,
        seed: int | None = None,
        request_ids: Tensor | None = None,
        **model_kwargs,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What ``generate`` calls; returns [num_rows, length] token ids or transformers' output."""
        _refuse(generation_config, model_kwargs, synced_gpus)
        _refuse_positions(model_kwargs, input_ids)
        repeats = max(generation_config.num_beams, generation_config.num_return_sequences)
        prompts = self._prompts(model, input_ids, model_kwargs.get("attention_mask"), repeats)
        if self.draft is not None and (input_ids.shape[0] > 1 or generation_config.return_dict_in_generate):
            actual = f"{input_ids.shape[0]} rows, return_dict_in_generate={generation_config.return_dict_in_generate}"
            raise value_error(_OP, "a drafted generation", "one row, and token ids", actual, "leave out draft=")
        sources = JointSources(prompts, generation_config.max_length - input_ids.shape[1])
        if generation_config.num_beams > 1:
            return search_beams(
                model, sources, self.fuse, input_ids, logits_processor, stopping_criteria, generation_config
            )
        request_ids = _request_ids(request_ids, input_ids, repeats)
        if seed is None and generation_config.do_sample:
            seed = torch.randint(2**32, ()).item()
        rest = (input_ids, logits_processor, stopping_criteria, generation_config, streamer, seed, request_ids)
        if self.draft is not None:
            return speculate(prompts, self.fuse, self.draft + 1, self.num_draft, *rest)
        return self._generate(sources, *rest)

    def _prompts(
        self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, repeats: int
    ) -> list[Prompt]:
        sources = [FusionSource(), *self.others]
        names = ["the generating model", *(f"others[{k}]" for k in range(len(self.others)))]
        return [
            source.prompt(_OP, name, model, input_ids, attention_mask, repeats)
            for name, source in zip(names, sources, strict=True)
        ]

    def _generate(
        self,
        joint: JointSources,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer,
        seed: int | None,
        request_ids: Tensor,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        num_rows = input_ids.shape[0]
        running = torch.arange(num_rows, device=input_ids.device)
        out = "sample" if config.do_sample else "argmax"
        keeps_scores = config.return_dict_in_generate and config.output_scores
        scores: list[Tensor] = []
        for step in count():
            logits = joint.logits()
            draw = {"out": out}
            if config.do_sample:
                draw |= {"request_ids": request_ids[running], "seed": seed, "step": step}
            if len(processors) or keeps_scores:
                log_probs = self.fuse(*logits, out="log_probs")
                # processors know rows by their place: each keeps its own, also where others are finished
                all_rows = log_probs.new_zeros(num_rows, log_probs.shape[1])
                all_rows[running] = log_probs
                all_rows = processors(input_ids, all_rows)
                tokens = fuse_logits([all_rows[running]], [1.0], **draw)
                scores += [all_rows] if keeps_scores else []
            else:
                tokens = self.fuse(*logits, **draw)
            check_rows(tokens >= 0, running)
            column = _padding(config, running, input_ids)
            column[running] = tokens
            input_ids = torch.cat([input_ids, column[:, None]], 1)
            if streamer is not None:
                streamer.put(column.cpu())
            goes_on = ~stopping_criteria(input_ids, tuple(scores))[running]
            if not goes_on.any():
                break
            joint.append(tokens[:, None])
            if not goes_on.all():
                joint.select(goes_on.nonzero()[:, 0])
            running = running[goes_on]
        if streamer is not None:
            streamer.end()
        if not config.return_dict_in_generate:
            return input_ids
        return GenerateDecoderOnlyOutput(sequences=input_ids, scores=tuple(scores) if keeps_scores else None)


def _padding(config: GenerationConfig, running: Tensor, input_ids: Tensor) -> Tensor:
    """[num_rows] what finished rows get."""
    if running.numel() == input_ids.shape[0]:
        return torch.empty_like(input_ids[:, 0])
    pad = config.pad_token_id
    if pad is None:
        pad = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    if pad is None:
        raise value_error(_OP, "pad_token_id", "given where rows finish one by one", None, "pass it to generate")
    return torch.full_like(input_ids[:, 0], pad)


def _request_ids(request_ids: Tensor | None, input_ids: Tensor, repeats: int) -> Tensor:
    """[num_rows]: sequences of one request draw as requests 2**32 apart."""
    batch_size = input_ids.shape[0] // repeats
    if request_ids is None:
        request_ids = torch.arange(batch_size, device=input_ids.device)
    if request_ids.shape != (batch_size,):
        raise shape_error(_OP, "request_ids", f"[batch_size={batch_size}]", request_ids)
    sequences = torch.arange(repeats, device=input_ids.device) << 32
    return (request_ids.to(input_ids.device)[:, None] + sequences).flatten()


def _refuse(config: GenerationConfig, model_kwargs: dict, synced_gpus: bool) -> None:
    others = sorted(name for name, value in model_kwargs.items() if value is not None and name not in _OURS)
    if others:
        raise value_error(_OP, "the model's inputs", "input_ids and attention_mask", ", ".join(others))
    cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
    if cache is not None and cache.get_seq_length() > 0:
        raise value_error(_OP, "the cache", "empty", "one with tokens", "the other sources have not read them")
    mode = config.get_generation_mode()
    if mode not in _MODES:
        raise value_error(_OP, "the generation", f"one of {', '.join(each.value for each in _MODES)}", mode.value)
    for name, refused in (
        ("guidance_scale", config.guidance_scale not in (None, 1)),  # a second guidance, whose cache nobody reorders
        ("use_cache", config.use_cache is False),
        ("synced_gpus", synced_gpus),
        ("prefill_chunk_size", config.prefill_chunk_size is not None),
        ("output_attentions", config.output_attentions),
        ("output_hidden_states", config.output_hidden_states),
        ("output_logits", config.output_logits and config.num_beams == 1),
    ):
        if refused:
            raise value_error(_OP, name, "left at its default", getattr(config, name, True))


def _refuse_positions(model_kwargs: dict, input_ids: Tensor) -> None:
    """``generate`` counts tokens itself; positions of the caller would have no meaning for other prompts."""
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if positions is None:
        return
    mask = torch.ones_like(input_ids) if mask is None else mask
    if positions.dim() != 2 or ((positions != mask.cumsum(1) - 1) & (mask == 1)).any():
        raise value_error(_OP, "position_ids", "left out, or the places of the tokens", "others")
