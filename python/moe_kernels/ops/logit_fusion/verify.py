"""Speculative decoding with a fused target: :func:`fused_verify`, and :func:`verify_draft` of any two distributions."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_kernels._checks import check_same_device, check_tensor, dtype_error, shape_error, value_error
from moe_kernels._dispatch import Backend
from moe_kernels.ops.logit_fusion import reference
from moe_kernels.ops.logit_fusion.api import check_draw, fuse_logits
from moe_kernels.ops.logit_fusion.token_filter import TokenFilter


class Verified(NamedTuple):
    """What of a draft stays, and the token after it.

    Attributes:
        num_accepted: [num_rows] int64: the first so many of ``draft_tokens`` stay.
        token: [num_rows] int64: the one that follows them; -1 where the target there has no token or NaN.
    """

    num_accepted: Tensor
    token: Tensor


def fused_verify(
    sources: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    draft_tokens: Tensor,
    *,
    draft: int,
    draft_temperature: float = 1.0,
    draft_keep: TokenFilter | None = None,
    temperature: float | Tensor = 1.0,
    request_ids: Tensor,
    seed: int,
    step: int = 0,
    backend: Backend = "auto",
    **options,
) -> Verified:
    """Verifies drafted tokens against the fusion of several models' logits, the drafting model being one of them.

    With q_t the fused distribution after t drafted tokens, p_t the draft's and x_t the token drafted there::

        x_t stays with probability min(1, q_t(x_t) / p_t(x_t)), for as long as all before it do
        at the first t that goes     token ~ (q_t - p_t)+ / sum (q_t - p_t)+
        where all stay               token ~ q_n

    so that the tokens that come out are distributed as if each had been drawn from q. In emulated fine-tuning the small
    tuned model drafts, in contrastive decoding the amateur: its logits are needed for q anyway.

    Args:
        sources: K tensors [num_rows, num_draft + 1, vocab_k]: logits before each drafted token and after the last.
        weights: K numbers, or a tensor [K] or [num_rows, K].
        draft_tokens: [num_rows, num_draft] int64; -1 is no draft: the token there is drawn from q.
        draft: which source drafted.
        draft_temperature, draft_keep: with which it did; 0 is its likeliest token.
        temperature: of the fusion, a number or [num_rows]; the number 0 makes q its likeliest token.
        request_ids, seed, step: as for :func:`moe_kernels.fuse_logits`; position t counts as step + t. The draws are
            others than those of ``fuse_logits`` under the same numbers, with which the tokens may have been drafted.
        options: of :func:`moe_kernels.fuse_logits`.

    Not differentiable.

    Source: Leviathan et al., arXiv 2211.17192.
    """
    op, sources = "fused_verify", list(sources)
    _check_draft_tokens(op, draft_tokens)
    num_rows, num_draft = draft_tokens.shape
    for k, source in enumerate(sources):
        check_tensor(op, f"sources[{k}]", source)
        if source.dim() != 3 or source.shape[:2] != (num_rows, num_draft + 1):
            expected = f"[num_rows={num_rows}, num_draft + 1 = {num_draft + 1}, vocab_size]"
            raise shape_error(op, f"sources[{k}]", expected, source)
    if not 0 <= draft < len(sources):
        raise value_error(op, "draft", f"in [0, num_sources={len(sources)})", draft)

    flat = [source.detach().flatten(0, 1) for source in sources]
    if isinstance(weights, Tensor) and weights.dim() == 2:
        weights = weights.repeat_interleave(num_draft + 1, 0)
    if isinstance(temperature, Tensor):
        temperature = temperature.repeat_interleave(num_draft + 1, 0)
    target = _probs(flat, weights, temperature, backend=backend, **options)
    # a draft's tokens past the shared vocabulary keep their share of p: q has none there
    drafted = sources[draft].detach()[:, :num_draft].flatten(0, 1)
    draft_probs = _probs([drafted], [1.0], draft_temperature, keep=draft_keep, backend=backend)
    return verify_draft(
        target.unflatten(0, (num_rows, num_draft + 1)),
        draft_probs[:, : target.shape[1]].unflatten(0, (num_rows, num_draft)),
        draft_tokens,
        request_ids=request_ids,
        seed=seed,
        step=step,
    )


def verify_draft(
    target_probs: Tensor, draft_probs: Tensor, draft_tokens: Tensor, *, request_ids: Tensor, seed: int, step: int = 0
) -> Verified:
    """The rule of :func:`fused_verify` for probabilities that are there already, of a preset for example.

    Args:
        target_probs: [num_rows, num_draft + 1, vocab].
        draft_probs: [num_rows, num_draft, vocab]; a row may sum to less than 1, where the draft knows more tokens.
        draft_tokens, request_ids, seed, step: as for :func:`fused_verify`.
    """
    op = "verify_draft"
    _check_draft_tokens(op, draft_tokens)
    num_rows, num_draft = draft_tokens.shape
    for name, probs, length in (
        ("target_probs", target_probs, num_draft + 1),
        ("draft_probs", draft_probs, num_draft),
    ):
        check_tensor(op, name, probs)
        if probs.dim() != 3 or probs.shape != (num_rows, length, target_probs.shape[2]):
            raise shape_error(op, name, f"[num_rows={num_rows}, {length}, vocab_size]", probs)
        if not probs.is_floating_point():
            raise dtype_error(op, name, "a float", probs)
    check_draw(op, request_ids, num_rows, seed, step)
    check_same_device(
        op, target_probs=target_probs, draft_probs=draft_probs, draft_tokens=draft_tokens, request_ids=request_ids
    )
    steps = step + torch.arange(num_draft + 1, device=request_ids.device)
    requests = request_ids[:, None].expand(-1, num_draft + 1)
    accept, resample = (
        reference.uniforms(requests, seed, steps, draw) for draw in (reference.ACCEPT_DRAW, reference.RESAMPLE_DRAW)
    )
    return Verified(*reference.verify(target_probs, draft_probs, draft_tokens, accept[:, :num_draft], resample))


def _probs(sources: list[Tensor], weights, temperature: float | Tensor, **options) -> Tensor:
    """The fused distribution; at temperature 0 all of it is on one token."""
    if isinstance(temperature, Tensor) or temperature != 0:
        return fuse_logits(sources, weights, temperature=temperature, out="probs", **options)
    tokens = fuse_logits(sources, weights, out="argmax", **options)
    vocab = options.get("vocab") or min(source.shape[1] for source in sources)
    return (tokens[:, None] == torch.arange(vocab, device=tokens.device)).float()


def _check_draft_tokens(op: str, draft_tokens: Tensor) -> None:
    check_tensor(op, "draft_tokens", draft_tokens)
    if draft_tokens.dim() != 2 or draft_tokens.shape[1] == 0:
        raise shape_error(op, "draft_tokens", "[num_rows, num_draft >= 1]", draft_tokens)
    if draft_tokens.dtype != torch.int64:
        raise dtype_error(op, "draft_tokens", torch.int64, draft_tokens)
