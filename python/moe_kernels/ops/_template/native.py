"""Schema, fake and handle of the compiled template op (csrc/ops/_template)."""

import torch
from torch import Tensor

torch.library.define("moe_kernels::scale_rows", "(Tensor rows, Tensor weights) -> Tensor")

scale_rows = torch.ops.moe_kernels.scale_rows.default


@torch.library.register_fake("moe_kernels::scale_rows")
def _(rows: Tensor, weights: Tensor):
    return rows.new_empty(rows.shape)
