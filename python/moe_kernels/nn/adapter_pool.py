"""Memory for the adapters of one layer: packed at their true ranks, added and evicted while the others stay."""

import torch
from torch import Tensor, nn

from moe_kernels._checks import dtype_error, shape_error, value_error


class AdapterPool(nn.Module):
    """Slots for low-rank adapters of one linear layer, in two packed tensors and tables of where each adapter lies.

    An adapter of rank r takes r rows of ``lora_a`` and of ``lora_b`` and nothing more: no rank is padded, in memory or
    in arithmetic. Tensors are changed in place and never replaced, so that a captured CUDA graph or a compiled function
    sees an added adapter without being made again. A slot's weights are the bits that were given.

    Attributes:
        lora_a: [num_rows, in_features]; lora_b: [num_rows, out_features]. Parameters, frozen at first.
        rank_starts, ranks: [num_slots] int32, the first row and the number of rows of each slot; rank -1 is an empty
            slot, which :func:`moe_kernels.routed_lora` refuses, rank 0 an adapter that leaves this layer alone.
        scaling: [num_slots] float32.
        row_scale: [num_slots, out_features], DoRA's ``m / |W + s B A|``, 1 for other adapters; None until one has it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_slots: int = 8,
        num_rows: int = 128,
        max_rank: int = 64,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.max_rank = in_features, out_features, min(max_rank, num_rows)
        # uninitialised rows are never read: those of a slot are written when it is filled
        self.lora_a = nn.Parameter(torch.zeros(num_rows, in_features, dtype=dtype, device=device), requires_grad=False)
        self.lora_b = nn.Parameter(torch.zeros(num_rows, out_features, dtype=dtype, device=device), requires_grad=False)
        self.register_buffer("rank_starts", torch.zeros(num_slots, dtype=torch.int32, device=device))
        self.register_buffer("ranks", torch.full((num_slots,), -1, dtype=torch.int32, device=device))
        self.register_buffer("scaling", torch.ones(num_slots, dtype=torch.float32, device=device))
        self.register_buffer("row_scale", None)

    def extra_repr(self) -> str:
        rows, slots = len(self.lora_a), len(self.ranks)
        return f"{self.in_features}, {self.out_features}, num_slots={slots}, num_rows={rows}, max_rank={self.max_rank}"

    def free_rows(self) -> int:
        """Rows that no slot uses."""
        return len(self.lora_a) - int(self.ranks.clamp_min(0).sum())

    def check(self, adapter: str, slot: int, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor | None = None) -> int:
        """The first row where this adapter would go; raises where it does not fit. Changes nothing."""
        op = f"AdapterPool (adapter {adapter!r})"
        rank = lora_a.shape[0]
        self._check_slot(op, slot)
        if lora_a.shape != (rank, self.in_features):
            raise shape_error(op, "lora_a", f"[rank, in={self.in_features}]", lora_a)
        if lora_b.shape != (self.out_features, rank):
            raise shape_error(op, "lora_b", f"[out={self.out_features}, rank={rank}]", lora_b)
        for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b)):
            if tensor.dtype != self.lora_a.dtype:
                raise dtype_error(op, name, self.lora_a.dtype, tensor, "cast the adapter or the pool")
        if row_scale is not None and row_scale.shape != (self.out_features,):
            raise shape_error(op, "row_scale", f"[out={self.out_features}]", row_scale)
        if rank > self.max_rank:
            raise value_error(op, "rank", f"at most max_rank={self.max_rank}", rank, "make the pool with a larger one")
        start = self._free_run(rank, slot)
        if start is None:
            remedy = "evict another adapter or make the pool with more rows"
            raise value_error(op, "rank", "no more than the longest run of free rows", rank, remedy)
        return start

    @torch.no_grad()
    def fill(
        self,
        adapter: str,
        slot: int,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float = 1.0,
        row_scale: Tensor | None = None,
    ) -> None:
        """Puts an adapter into a slot, over what was there; the other slots keep their bits.

        Args:
            adapter: its name, for errors.
            lora_a: [rank, in_features]; lora_b: [out_features, rank], as PEFT stores them.
            scaling: ``alpha / rank``, not folded into the weights.
            row_scale: [out_features] for DoRA.
        """
        start, rank = self.check(adapter, slot, lora_a, lora_b, row_scale), lora_a.shape[0]
        self.lora_a[start : start + rank] = lora_a
        self.lora_b[start : start + rank] = lora_b.T
        self.rank_starts[slot], self.ranks[slot], self.scaling[slot] = start, rank, scaling
        if row_scale is not None and self.row_scale is None:
            shape = (len(self.ranks), self.out_features)
            self.row_scale = torch.ones(shape, dtype=self.lora_a.dtype, device=self.lora_a.device)
        if self.row_scale is not None:
            self.row_scale[slot] = 1 if row_scale is None else row_scale

    def leave_alone(self, slot: int) -> None:
        """Fills a slot with an adapter that does nothing to this layer: rank 0, no row scaled."""
        self._check_slot("AdapterPool", slot)
        self.ranks[slot] = 0
        if self.row_scale is not None:
            self.row_scale[slot] = 1

    def evict(self, slot: int) -> None:
        """Empties a slot: its rows may be given to others, and a batch that still names it is refused."""
        self._check_slot("AdapterPool", slot)
        self.ranks[slot] = -1

    def adapter(self, slot: int) -> tuple[Tensor, Tensor]:
        """lora_a [rank, in_features] and lora_b [out_features, rank] of a slot, views of the pool."""
        self._check_slot("AdapterPool", slot)
        start, rank = int(self.rank_starts[slot]), int(self.ranks[slot])
        if rank < 0:
            raise value_error("AdapterPool", "slot", "one that holds an adapter", slot)
        return self.lora_a[start : start + rank], self.lora_b[start : start + rank].T

    def _check_slot(self, op: str, slot: int) -> None:
        # -1 means no adapter everywhere else: as an index it would be the last slot's
        if not 0 <= slot < len(self.ranks):
            raise value_error(op, "slot", f"in [0, num_slots={len(self.ranks)})", slot)

    def _free_run(self, rank: int, slot: int) -> int | None:
        """The first run of ``rank`` rows that slots other than this one leave free."""
        table = zip(self.rank_starts.tolist(), self.ranks.tolist(), strict=True)
        used = sorted((start, start + length) for i, (start, length) in enumerate(table) if i != slot and length > 0)
        begin = 0
        for first, last in [*used, (len(self.lora_a),) * 2]:
            if first - begin >= rank:
                return begin
            begin = last
        return None
