"""Schemas, fakes and handles of the compiled merge ops (csrc/ops/merge)."""

import torch
from torch import Tensor

from moe_kernels.ops.merge.recipe import DIVISORS, ELECTIONS, Expert, Recipe, Undecided, held
from moe_kernels.ops.task_vector.native import count_magnitudes, count_window, end_of_ties

__all__ = ["count_magnitudes", "count_window", "decide_", "elected_signs", "end_of_ties", "kept_magnitudes", "merge"]

_SOURCES = "Tensor? base, Tensor[] experts, float[] scales, int[] bounds, int[] keys, float[] factors"
_RULE = "int election, int divisor, float constant, int zero_sign, float lambda_"
torch.library.define("moe_kernels::merge_experts", f"({_SOURCES}, {_RULE}) -> (Tensor, Tensor, int)")
torch.library.define("moe_kernels::merge_ranges", f"(Tensor(a!) out, Tensor ranges, {_SOURCES}, {_RULE}) -> ()")
torch.library.define("moe_kernels::elected_signs", f"({_SOURCES}) -> int")
torch.library.define("moe_kernels::kept_magnitudes", f"({_SOURCES}) -> Tensor")

merge_experts = torch.ops.moe_kernels.merge_experts.default
merge_ranges = torch.ops.moe_kernels.merge_ranges.default
elected_signs_op = torch.ops.moe_kernels.elected_signs.default
kept_magnitudes_op = torch.ops.moe_kernels.kept_magnitudes.default


@torch.library.register_fake("moe_kernels::merge_experts")
def _(base, experts, *rest):
    like = experts[0] if base is None else base
    ranges = like.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)
    return like.new_empty(like.numel()), ranges, 0


@torch.library.register_fake("moe_kernels::merge_ranges")
def _(out, ranges, *rest):
    return None


@torch.library.register_fake("moe_kernels::kept_magnitudes")
def _(base, experts, *rest):
    return experts[0].new_empty((len(experts), 2), dtype=torch.float64)


def _sources(experts: list[Expert], recipe: Recipe) -> tuple:
    tensors = [held(expert) for expert in experts]
    scales = [1.0 if isinstance(expert, Tensor) else expert.scale for expert in experts]
    bounds = [bound for source in recipe.sources for bound in source.bounds]
    factors = [float(factor) for source in recipe.sources for factor in source.factors]
    return tensors, scales, bounds, [source.key for source in recipe.sources], factors


def merge(base: Tensor | None, experts: list[Expert], recipe: Recipe) -> tuple[Tensor, Undecided | None]:
    merged, undecided, signs = merge_experts(base, *_sources(experts, recipe), *_rule(recipe))
    merged = merged.view((experts[0] if base is None else base).shape)
    return merged, Undecided(undecided, signs) if undecided.numel() else None


def decide_(merged: Tensor, undecided: Undecided, base: Tensor | None, experts: list[Expert], recipe: Recipe) -> None:
    """The elements that waited for a ``zero_sign``, which the recipe has now."""
    merge_ranges(merged, undecided.where, base, *_sources(experts, recipe), *_rule(recipe))


def _rule(recipe: Recipe) -> tuple:
    rule = (ELECTIONS.index(recipe.election), DIVISORS.index(recipe.divisor), float(recipe.constant))
    return *rule, recipe.zero_sign, float(recipe.lambda_)


def elected_signs(base: Tensor | None, experts: list[Expert], recipe: Recipe) -> int:
    return elected_signs_op(base, *_sources(experts, recipe))


def kept_magnitudes(base: Tensor | None, experts: list[Expert], recipe: Recipe) -> Tensor:
    return kept_magnitudes_op(base, *_sources(experts, recipe))
