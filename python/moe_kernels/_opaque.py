"""Triton kernels as ops that torch.compile calls as they are, instead of tracing what plans and launches them."""

from collections.abc import Callable

import torch


def opaque(name: str, function: Callable) -> Callable:
    """``function`` as an op with the schema and the fake of ``moe_kernels::name``."""
    op = getattr(torch.ops.moe_kernels, name).default
    twin = f"moe_kernels_triton::{name}"
    torch.library.define(twin, "(" + str(op._schema).split("(", 1)[1])
    torch.library.impl(twin, ("CPU", "CUDA"))(function)  # on the CPU an interpreter runs it
    torch.library.register_fake(twin, op)
    return getattr(torch.ops.moe_kernels_triton, name).default
