"""Adapters that were trained beside a changed base, as plain LoRA of twice the rank on the unchanged one.

PiSSA, OLoRA and CorDA start from factors A0, B0 of the base and train beside ``W - s B0 A0``; the difference to W is
``s (B A - B0 A0) = s [B, -B0] [A; A0]``. KaSA trains ``s B diag(d) A`` beside W without its r smallest singular parts
``U S V``: ``s [B diag(d), -U S / s] [A; V]``. Both are exact. PEFT changes the base in place instead, so that such
adapters share no batch with others.

Sources: PiSSA arXiv 2404.02948, OLoRA 2406.01775, CorDA 2406.05223, KaSA 2412.06071; how PEFT 0.21 starts each.
"""

import math

import torch
from torch import Tensor

#: starts that leave the base as it is
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
#: starts that follow from the base alone; the others (corda, pissa_niter_N, …) need the adapter as it started
FROM_BASE = ("pissa", "olora")


def start_factors(start: str, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """lora_a [rank, in] and lora_b [out, rank] with which "pissa" or "olora" started on ``weight`` [out, in]."""
    weight = weight.detach().float()
    if start == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def without_start(a: Tensor, b: Tensor, start: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """``B A - B0 A0`` as factors of twice the rank."""
    return torch.cat([a, start[0].to(a)]), torch.cat([b, -start[1].to(b)], 1)


def without_tail(a: Tensor, b: Tensor, diagonal: Tensor, weight: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """KaSA's ``B diag(d) A`` less the parts of the base that it dropped, as factors of twice the rank."""
    u, s, v = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    rank = a.shape[0]
    tail = u[:, -rank:] * s[-rank:] / scaling
    return torch.cat([a, v[-rank:].to(a)]), torch.cat([(b.float() * diagonal.float()).to(b), -tail.to(b)], 1)


def doubled(config: dict) -> dict:
    """The config of a converted adapter: twice the rank at the same scale, a plain start."""
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    return config | {
        "r": 2 * config["r"],
        "lora_alpha": factor * config.get("lora_alpha", 8),
        "rank_pattern": {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
        "init_lora_weights": True,
        "kasa_config": None,
        "corda_config": None,
    }
