"""Which tokens of a row of logits stay: top-k, top-p and min-p as one threshold."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenFilter:
    """Keeps the tokens whose logit is at least a threshold of their row.

    The threshold is the largest of three, in this order, as samplers apply them::

        top_k   the top_k-th largest logit
        top_p   the smallest logit such that the tokens strictly above it, of those that top_k left, hold less than
                top_p of their probability
        min_p   the largest logit + log(min_p): tokens at least min_p times as likely as the likeliest

    and at most the min_keep-th largest logit. Tokens of equal logits stay or go together, so that the choice does not
    depend on the order of the vocabulary: at a tie more than top_k tokens stay.

    Attributes:
        top_k: 0 keeps all.
        top_p: in (0, 1]; 1 keeps all.
        min_p: in [0, 1]; 0 keeps all.
        min_keep: at least 1.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_keep: int = 1

    def __post_init__(self):
        for name, expected, holds in (
            ("top_k", "at least 0", self.top_k >= 0),
            ("top_p", "in (0, 1]", 0 < self.top_p <= 1),
            ("min_p", "in [0, 1]", 0 <= self.min_p <= 1),
            ("min_keep", "at least 1", self.min_keep >= 1),
        ):
            if not holds:
                raise ValueError(f"TokenFilter: {name} must be {expected}, got {getattr(self, name)}")

    @property
    def numbers(self) -> list[float]:
        """What the kernels take; empty where every token stays."""
        if self.top_k == 0 and self.top_p == 1 and self.min_p == 0:
            return []
        return [float(self.top_k), float(self.top_p), float(self.min_p), float(self.min_keep)]
