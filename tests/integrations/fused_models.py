"""Language models small enough to build in milliseconds, padded prompts, and fusion without any cache."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

PAD, VOCAB_SIZE = 0, 61
#: many, so that some rows finish before others
EOS = list(range(2, 10))


def tiny(seed: int, vocab_size: int = VOCAB_SIZE, **more) -> LlamaForCausalLM:
    """Random weights, large enough that tokens differ; every model with shapes of its own."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16 + 16 * (seed % 2),
        intermediate_size=24,
        num_hidden_layers=1 + seed % 2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=EOS,
        initializer_range=0.6,
        **more,
    )
    return LlamaForCausalLM(config).eval()


def prompts(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(len(EOS) + 2, VOCAB_SIZE, (length,), generator=generator)
        mask[row, longest - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def last_logits(model, tokens: Tensor) -> Tensor:
    """Of one row without padding, from nothing."""
    return model(input_ids=tokens[None], use_cache=False).logits[:, -1].float()


class Recompute(LogitsProcessor):
    """Fused log-probabilities of each row from nothing: no cache, no padding, nothing kept between steps."""

    def __init__(self, model, inputs: dict[str, Tensor], fuse, others: list, repeats: int):
        self.model, self.fuse, self.others, self.repeats = model, fuse, others, repeats
        self.prompts = [ids[mask.bool()] for ids, mask in zip(*inputs.values(), strict=True)]
        self.length = inputs["input_ids"].shape[1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = []
        for row, ids in enumerate(input_ids):
            item, new = row // self.repeats, ids[self.length :]
            logits = [last_logits(self.model, torch.cat([self.prompts[item], new]))]
            for model, own in self.others:
                begin = self.prompts[item] if own is None else own[item]
                logits.append(last_logits(model or self.model, torch.cat([begin, new])))
            rows.append(self.fuse(*logits, out="log_probs"))
        return torch.cat(rows)
