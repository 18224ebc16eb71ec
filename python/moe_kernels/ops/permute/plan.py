"""The pair list that every routing method lowers to and every kernel reads."""

from typing import NamedTuple

from torch import Tensor


class DispatchPlan(NamedTuple):
    """Token-expert pairs in expert order (CSR).

    Attributes:
        expert_offsets: [num_experts + 1] int32, starts at 0; expert ``e`` owns permuted rows
            ``expert_offsets[e]`` to ``expert_offsets[e + 1]``.
        source_rows: [num_tokens * top_k] int32, permuted row -> token; -1 in the rows from ``expert_offsets[-1]`` on,
            which belong to nobody (their number is that of the skipped pairs, so no shape depends on the data).
        permuted_rows: [num_tokens, top_k] int32, the inverse; -1 where the pair is skipped.
    """

    expert_offsets: Tensor
    source_rows: Tensor
    permuted_rows: Tensor

    def cut(self, num_rows: int) -> "DispatchPlan":
        """The same pairs with the first ``num_rows`` rows: those behind must belong to nobody.

        For a caller that knows ``expert_offsets[-1]`` on the host and would rather not move the rows of skipped pairs.
        """
        return self._replace(source_rows=self.source_rows[:num_rows])
