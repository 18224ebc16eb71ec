"""Schemas, fakes and handles of the compiled merge ops (csrc/ops/merge)."""

import torch
from torch import Tensor

from moe_kernels.ops.merge.recipe import DIVISORS, ELECTIONS, Recipe
from moe_kernels.ops.task_vector.native import count_magnitudes, count_window, end_of_ties

__all__ = ["count_magnitudes", "count_window", "elected_signs", "end_of_ties", "kept_magnitudes", "merge"]

_SOURCES = "Tensor? base, Tensor[] experts, int[] bounds, int[] keys, float[] factors"
torch.library.define(
    "moe_kernels::merge",
    f"({_SOURCES}, int election, int divisor, float constant, int zero_sign, float lambda_) -> (Tensor, int)",
)
torch.library.define("moe_kernels::elected_signs", f"({_SOURCES}) -> int")
torch.library.define("moe_kernels::kept_magnitudes", f"({_SOURCES}) -> Tensor")

merge_op = torch.ops.moe_kernels.merge.default
elected_signs_op = torch.ops.moe_kernels.elected_signs.default
kept_magnitudes_op = torch.ops.moe_kernels.kept_magnitudes.default


@torch.library.register_fake("moe_kernels::merge")
def _(base, experts, *rest):
    return experts[0].new_empty(experts[0].numel()), 0


@torch.library.register_fake("moe_kernels::kept_magnitudes")
def _(base, experts, *rest):
    return experts[0].new_empty((len(experts), 2), dtype=torch.float64)


def _sources(recipe: Recipe) -> tuple[list[int], list[int], list[float]]:
    bounds = [bound for source in recipe.sources for bound in source.bounds]
    factors = [float(factor) for source in recipe.sources for factor in source.factors]
    return bounds, [source.key for source in recipe.sources], factors


def merge(base: Tensor | None, experts: list[Tensor], recipe: Recipe) -> tuple[Tensor, int]:
    rule = (ELECTIONS.index(recipe.election), DIVISORS.index(recipe.divisor), float(recipe.constant))
    merged, undecided = merge_op(base, experts, *_sources(recipe), *rule, recipe.zero_sign, float(recipe.lambda_))
    return merged.view(experts[0].shape), undecided


def elected_signs(base: Tensor | None, experts: list[Tensor], recipe: Recipe) -> int:
    return elected_signs_op(base, experts, *_sources(recipe))


def kept_magnitudes(base: Tensor | None, experts: list[Tensor], recipe: Recipe) -> Tensor:
    return kept_magnitudes_op(base, experts, *_sources(recipe))
