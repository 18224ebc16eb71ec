"""Fusion from hidden states, where a mask spares most of the language model heads: :func:`fuse_heads`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels._checks import check_same_device, check_tensor, dtype_error, shape_error, value_error
from moe_kernels._dispatch import Backend
from moe_kernels.ops.logit_fusion.api import check_vocab, check_weights, fuse_logits
from moe_kernels.ops.logit_fusion.token_filter import TokenFilter

#: above this share of the vocabulary the whole head is multiplied: gathering rows costs a read and a write of each
#: (one core, 49152 x 576 float32, 1 to 64 rows: a quarter takes 0.3 to 0.7 of the whole head's time, half 1.2 to 4.7)
GATHERED_SHARE = 0.25


def fuse_heads(
    hidden_states: Sequence[Tensor],
    heads: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    *,
    mask: TokenFilter,
    anchor: int = 0,
    neg_inf: str = "mask",
    vocab: int | None = None,
    out: str = "log_probs",
    backend: Backend = "auto",
    **options,
) -> Tensor:
    """:func:`moe_kernels.fuse_logits` under an anchor's mask, from hidden states: other heads see candidates only.

    ::

        l_anchor = h_anchor head_anchor^T        all tokens
        C        = what ``mask`` keeps of l_anchor, in any row
        l_k      = h_k head_k[C]^T               k other than the anchor
        result   = fuse_logits([l_anchor, l_k, ...], weights, mask=mask)

    Contrastive decoding's plausible tokens are a handful of tens of thousands, so of every head but the anchor's almost
    nothing is read. Where the rows' candidates together are more than a quarter of the vocabulary, whole heads are.

    Args:
        hidden_states: K tensors [num_rows, hidden_size_k], after the last norm, and any scale that the model applies.
        heads: K tensors [vocab_k, hidden_size_k], each of its hidden states' dtype.
        weights, anchor, mask, vocab, out, backend: as for :func:`moe_kernels.fuse_logits`, linear mode.
        neg_inf: "mask" or "zero"; a floor would need the whole row.
        options: of :func:`moe_kernels.fuse_logits`: ``temperature``, ``keep``, ``request_ids``, ``seed``, ``step``.

    Returns:
        as :func:`moe_kernels.fuse_logits`. Differentiable in hidden states, heads, weights and temperature; the choice
        of the candidates is a constant. On a GPU the host waits for their number.

    Source: the masks of contrastive decoding, arXiv 2210.15097; DExperts, arXiv 2105.03023; CGE, arXiv 2410.14765.
    """
    op = "fuse_heads"
    hidden_states, heads = list(hidden_states), list(heads)
    _check(op, hidden_states, heads)
    if not 0 <= anchor < len(heads):
        raise value_error(op, "anchor", f"in [0, num_sources={len(heads)})", anchor)
    if neg_inf not in ("mask", "zero"):
        raise value_error(op, "neg_inf", "one of mask, zero", repr(neg_inf), "a floor would need every logit of a row")
    for name in ("mode", "floor", "rows"):
        if name in options:
            raise value_error(op, name, "left out", options[name], "use fuse_logits, on the logits of whole heads")
    vocab = check_vocab(op, vocab, {f"heads[{k}]": head.T for k, head in enumerate(heads)})
    logits = F.linear(hidden_states[anchor], heads[anchor][:vocab])
    weights = check_weights(op, weights, logits.shape[0], len(heads), logits)

    with torch.no_grad():
        filtered = fuse_logits([logits], [1.0], keep=mask, out="logits", backend=backend)
        # where the anchor has no weight it masks nothing
        kept = (filtered > -torch.inf) | (weights[:, anchor : anchor + 1] == 0)
        broken = filtered.isnan().any(1, keepdim=True)
        tokens = kept.any(0).nonzero()[:, 0]
    some = 0 < tokens.numel() <= GATHERED_SHARE * vocab
    tokens = tokens if some else torch.arange(vocab, device=logits.device)
    sources = []
    for k, (hidden, head) in enumerate(zip(hidden_states, heads, strict=True)):
        if k != anchor:
            sources.append(F.linear(hidden, head.index_select(0, tokens) if some else head[:vocab]))
            continue
        chosen, stays = (each.index_select(1, tokens) if some else each for each in (logits, kept))
        sources.append(torch.where(broken, torch.nan, chosen.masked_fill(~stays, -torch.inf)))
    fused = fuse_logits(sources, weights, anchor=anchor, neg_inf=neg_inf, out=out, backend=backend, **options)
    if not some:
        return fused
    if out in ("argmax", "sample"):
        return torch.where(fused >= 0, tokens[fused.clamp(min=0)], -1)
    absent = torch.full((fused.shape[0], vocab), 0.0 if out == "probs" else -torch.inf, dtype=fused.dtype)
    whole = absent.to(fused.device).index_copy(1, tokens, fused)
    return torch.where(fused.isnan().any(1, keepdim=True), torch.nan, whole)


def _check(op: str, hidden_states: list[Tensor], heads: list[Tensor]) -> None:
    if not hidden_states or len(hidden_states) != len(heads):
        raise value_error(op, "heads", "as many as hidden_states, at least one", f"{len(heads)}, {len(hidden_states)}")
    named = {f"hidden_states[{k}]": hidden for k, hidden in enumerate(hidden_states)}
    for k, (name, hidden) in enumerate(named.items()):
        check_tensor(op, name, hidden)
        check_tensor(op, f"heads[{k}]", heads[k])
        if hidden.dim() != 2 or hidden.shape[0] != hidden_states[0].shape[0]:
            raise shape_error(op, name, f"[num_rows={hidden_states[0].shape[0]}, hidden_size]", hidden)
        if heads[k].dim() != 2 or heads[k].shape[1] != hidden.shape[1] or heads[k].shape[0] == 0:
            raise shape_error(op, f"heads[{k}]", f"[vocab_size >= 1, hidden_size={hidden.shape[1]}]", heads[k])
        if heads[k].dtype != hidden.dtype:
            raise dtype_error(op, f"heads[{k}]", f"{hidden.dtype}, as {name}", heads[k])
    check_same_device(op, **named, **{f"heads[{k}]": head for k, head in enumerate(heads)})
