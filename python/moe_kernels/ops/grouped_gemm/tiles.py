"""Tile planner of the Triton kernels: a pure function of sizes, without a tuned file.

A tile of an output is ``rows`` permuted rows of one expert by ``columns`` output features, and is summed ``depth``
features at a time. Every plan sums in the same order (steps of 16 features into one accumulator), so the plan may
follow the batch without changing a bit of a row.
"""

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def power_of_2(size: int, low: int, high: int) -> int:
    """The smallest power of two that is at least ``size``, within [low, high]."""
    return min(max(1 << max(size - 1, 0).bit_length(), low), high)


def plan_tiles(
    num_pairs: int,
    num_experts: int,
    columns: int,
    depth: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    num_operands: int = 1,
) -> Tiles:
    """Tiles of ``out[pair] = rows[pair] @ weights[expert].T``.

    Args:
        num_pairs: token-expert pairs of the batch (their number is known on the host, their experts are not).
        num_experts: experts that share them.
        columns: output features. depth: input features.
        dtype: of rows and weights.
        capability: of the GPU.
        num_operands: weight matrices that a tile multiplies with at once: 2 for gate and up.
    """
    rows_per_expert = num_pairs / max(min(num_experts, num_pairs), 1)
    if dtype in (torch.bfloat16, torch.float16):
        if capability[0] == 9:
            # measured on an H200; below 64 rows mma.sync multiplies instead of wgmma, with the same bits
            rows = power_of_2(int(rows_per_expert), 16, 128)
            wide, warps = (256, 8) if rows == 128 else (128, 4)
            tiles = Tiles(rows, wide // num_operands, 64, warps, 4)
        else:
            rows = power_of_2(int(rows_per_expert), 16, 128)
            warps = 8 if rows == 128 else 4
            tiles = Tiles(rows, 128 // num_operands, 64 if rows <= 32 else 32, warps, 3)
    elif dtype == torch.float32:
        tiles = Tiles(power_of_2(int(rows_per_expert), 16, 64), 64 // num_operands, 32, 4, 2)
    else:
        tiles = Tiles(16, 32 // num_operands, 16, 4, 1)
    return tiles._replace(columns=power_of_2(columns, 16, tiles.columns), depth=power_of_2(depth, 16, tiles.depth))


def plan_weight_grad_tiles(columns: int, depth: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """Tiles of ``out[expert] = left.T @ right`` over the expert's rows: ``columns`` of left by ``depth`` of right,
    summed ``rows`` at a time."""
    if dtype in (torch.bfloat16, torch.float16):
        tiles = Tiles(64, 128, 256, 8, 4) if capability[0] == 9 else Tiles(32, 128, 128, 8, 3)
    elif dtype == torch.float32:
        tiles = Tiles(32, 64, 64, 4, 2)
    else:
        tiles = Tiles(16, 32, 32, 4, 1)
    return tiles._replace(columns=power_of_2(columns, 16, tiles.columns), depth=power_of_2(depth, 16, tiles.depth))


def num_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """As many tiles as the pairs can need, however they fall to the experts: each may leave one tile partly empty."""
    return -(-num_pairs // rows) + min(num_experts, num_pairs)
