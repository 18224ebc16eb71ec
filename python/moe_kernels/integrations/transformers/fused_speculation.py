"""Speculative decoding of a fusion, drafted by one of its own sources: :func:`speculate`."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from moe_kernels.integrations.transformers.source_state import Prompt, SourceState, check_rows
from moe_kernels.ops.logit_fusion import fuse_logits, verify_draft


def speculate(
    prompts: list[Prompt],
    fuse: Callable[..., Tensor],
    draft: int,
    num_draft: int,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer,
    seed: int | None,
    request_ids: Tensor,
) -> Tensor:
    """[1, length] token ids, distributed as those drawn one by one (greedy: the same).

    The source ``draft`` reads and draws ``num_draft`` tokens alone; then the others read them at once, and what of them
    stays is decided by :func:`moe_kernels.ops.logit_fusion.verify_draft`. Caches forget the rest.
    """
    states = [SourceState(prompt) for prompt in prompts]
    length = input_ids.shape[1]
    temperature = (config.temperature or 1.0) if config.do_sample else 0.0
    seed = seed or 0  # greedy, nothing is drawn that matters
    row = torch.zeros_like(request_ids)
    # no source can read a token that it does not know
    vocab = min(state.model.config.get_text_config().vocab_size for state in states)
    for state in states:
        state.read_prompt()
    while True:
        step = input_ids.shape[1] - length
        drafted, draft_logits = input_ids[:, :0], []
        for t in range(max(1, min(num_draft, config.max_length - input_ids.shape[1] - 1))):
            draft_logits.append(states[draft].logits()[:, -1])
            draw = {"out": "sample", "request_ids": request_ids, "seed": seed, "step": step + t}
            token = fuse_logits(draft_logits[-1:], [1.0], temperature=temperature, vocab=vocab, **draw)
            check_rows(token >= 0, row)
            drafted = torch.cat([drafted, token[:, None]], 1)
            states[draft].append(token[:, None])
        num_drafted = drafted.shape[1]
        logits = []
        for k, state in enumerate(states):
            if k == draft:
                logits.append(torch.cat([*draft_logits, state.logits()[:, -1]]))
            else:
                state.append(drafted)
                logits.append(state.logits(num_drafted + 1)[0])
        log_probs = fuse(*logits, out="log_probs")
        sequence = torch.cat([input_ids, drafted], 1)
        if len(processors):
            ends = range(input_ids.shape[1], sequence.shape[1] + 1)
            rows = [processors(sequence[:, :end], log_probs[t : t + 1]) for t, end in enumerate(ends)]
            log_probs = torch.cat(rows)
        shared = torch.cat(draft_logits)[:, :vocab]
        count, token = verify_draft(
            _probs(log_probs, config.do_sample)[None],
            _probs(shared, config.do_sample, temperature)[None, :, : log_probs.shape[1]],
            drafted,
            request_ids=request_ids,
            seed=seed,
            step=step,
        )
        check_rows(token >= 0, row)
        for new in (*drafted[:, : count.item()].unbind(1), token):
            input_ids = torch.cat([input_ids, new[:, None]], 1)
            if streamer is not None:
                streamer.put(new.cpu())
            if stopping_criteria(input_ids, None).all():
                if streamer is not None:
                    streamer.end()
                return input_ids
        for state in states:
            state.forget(num_drafted - count.item())
            state.append(token[:, None])


def _probs(logits: Tensor, do_sample: bool, temperature: float = 1.0) -> Tensor:
    """What tokens are drawn from; greedy, all is on one."""
    if do_sample:
        return fuse_logits([logits], [1.0], temperature=temperature, out="probs")
    likeliest = fuse_logits([logits], [1.0], out="argmax")
    return (likeliest[:, None] == torch.arange(logits.shape[1], device=logits.device)).float()
