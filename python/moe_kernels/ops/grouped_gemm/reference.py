"""Grouped matrix multiplication in plain PyTorch: the specification."""

import torch
from torch import Tensor


def grouped_gemm(rows: Tensor, expert_weights: Tensor, expert_offsets: Tensor, bias: Tensor | None) -> Tensor:
    offsets = expert_offsets.tolist()
    if offsets[0] != 0 or any(b < a for a, b in zip(offsets, offsets[1:], strict=False)) or offsets[-1] > len(rows):
        raise RuntimeError(
            f"grouped_gemm: expert_offsets must be 0 at first, never fall and end at or below num_permuted={len(rows)},"
            f" got {offsets[:4]}…{offsets[-1]}"
        )
    out = []
    for expert, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        product = rows[begin:end] @ expert_weights[expert].T
        out.append(product if bias is None else product + bias[expert])
    # the empty sums connect every argument to the graph also where no expert has rows
    tail = rows.new_zeros(len(rows) - offsets[-1], expert_weights.shape[1]) + rows[:0].sum() + expert_weights[:0].sum()
    out.append(tail if bias is None else tail + bias[:0].sum())
    return torch.cat(out)
