"""The Triton kernel of a merge; its bits are those of the reference."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from moe_kernels.ops.merge.recipe import ALL, DIVISORS, ELECTIONS, Recipe, Undecided
from moe_kernels.ops.task_vector.ternary import TernaryDelta

BLOCK = 512  # elements of a program: 4 a thread; with 8 a quarter of the occupancy (255 registers)


@triton.jit
def _divide(a, b, ACC: tl.constexpr):
    """Rounded to nearest: `/` of float32 is not."""
    if ACC == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def random_bits(key, row, first, BLOCK: tl.constexpr):
    """[BLOCK] uint32 of a row's elements from ``first``, a multiple of 4, on: one block of Philox serves four."""
    at = first // 4 + tl.arange(0, BLOCK // 4)
    zero = tl.zeros((BLOCK // 4,), tl.uint32)
    low, high = (at & 0xFFFFFFFF).to(tl.uint32), (at >> 32).to(tl.uint32)
    row_low, row_high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    key_low, key_high = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a, b, c, d = philox_impl(low, high, row_low + zero, row_high + zero, key_low + zero, key_high + zero)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))


@triton.jit
def _term(
    expert_ptr,
    bounds,  # lower, lower_end, upper, upper_end, keep_below
    key_ptr,
    factors,  # rescale, before, after, divisor, scale of a task vector
    from_base,
    first,
    numel,
    IS_TERNARY: tl.constexpr,
    HAS_RANDOM: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """e_k of recipe.py for a block of elements; 0 beyond the last."""
    elements = first + tl.arange(0, BLOCK)
    valid = elements < numel
    if IS_TERNARY:
        words = expert_ptr + elements // 64 * 2
        nonzero = (tl.load(words, mask=valid, other=0) >> (elements % 64)) & 1
        negative = (tl.load(words + 1, mask=valid, other=0) >> (elements % 64)) & 1
        scale = tl.load(factors + 4)
        t = tl.where(nonzero != 0, tl.where(negative != 0, -scale, scale), 0.0)
    else:
        t = tl.load(expert_ptr + elements, mask=valid, other=0.0).to(ACC) - from_base
    lower, upper = tl.load(bounds), tl.load(bounds + 2)
    magnitude = (t.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
    kept = (magnitude > lower) | ((magnitude == lower) & (elements < tl.load(bounds + 1)))
    kept &= (magnitude < upper) | ((magnitude == upper) & (elements >= tl.load(bounds + 3)))
    kept |= (lower == 0) & (upper == 0x7FFFFFFF)  # no bounds: NaN stays
    if HAS_RANDOM:
        kept &= random_bits(tl.load(key_ptr), tl.full((), 0, tl.int64), first, BLOCK).to(tl.int64) < tl.load(bounds + 4)
    t = _divide(tl.where(kept, t, 0.0), tl.load(factors), ACC)
    return tl.where(valid, t * tl.load(factors + 1), 0.0)


@triton.jit
def _merge_kernel(
    base_ptr,
    experts_ptrs,  # a tuple: weights, or planes
    bounds_ptr,  # [num_experts, 5]
    keys_ptr,  # [num_experts]
    factors_ptr,  # [num_experts, 5]
    rule_ptr,  # constant, zero_sign, lambda
    out_ptr,
    found_ptr,  # [programs, 2] int32: undecided elements, the sum of the signs
    numel,
    NUM_EXPERTS: tl.constexpr,
    ARE_TERNARY: tl.constexpr,  # bit k: of expert k
    HAS_RANDOM: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ELECTION: tl.constexpr,
    DIVISOR: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The experts are read twice where there is an election, the second time from the cache."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    elements = first + tl.arange(0, BLOCK)
    base = tl.zeros((BLOCK,), ACC)
    if HAS_BASE:
        base = tl.load(base_ptr + elements, mask=elements < numel, other=0.0).to(ACC)
    elected, total, count = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
    if ELECTION != 0:
        some = tl.zeros((BLOCK,), tl.int32)
        for k in tl.static_range(NUM_EXPERTS):
            t = _term(
                experts_ptrs[k], bounds_ptr + 5 * k, keys_ptr + k, factors_ptr + 5 * k, base, first, numel,
                (ARE_TERNARY >> k) & 1, HAS_RANDOM, ACC, BLOCK,
            )  # fmt: skip
            elected += t
            some |= (t != 0).to(tl.int32)
        if ELECTION == 1:
            found = found_ptr + 2 * tl.program_id(0)
            tl.store(found, tl.sum(tl.where(elected == 0, some, 0), 0))
            tl.store(found + 1, tl.sum((elected > 0).to(tl.int32) - (elected < 0).to(tl.int32), 0))
            elected = tl.where(elected == 0, tl.load(rule_ptr + 1), elected)
    for k in tl.static_range(NUM_EXPERTS):
        t = _term(
            experts_ptrs[k], bounds_ptr + 5 * k, keys_ptr + k, factors_ptr + 5 * k, base, first, numel,
            (ARE_TERNARY >> k) & 1, HAS_RANDOM, ACC, BLOCK,
        )  # fmt: skip
        weighted = t * tl.load(factors_ptr + 5 * k + 2)
        if ELECTION == 0:
            total += weighted
        else:
            plus = elected > 0
            if ELECTION == 2:
                plus = elected >= 0
            agrees = (plus & (t > 0)) | ((elected < 0) & (t < 0))
            total += tl.where(agrees, weighted, tl.where(t == t, 0.0, t))  # NaN is not lost
            count += tl.where(agrees, tl.load(factors_ptr + 5 * k + 3), 0.0)
    if DIVISOR == 1:
        total = _divide(total, tl.where(count < 1, 1.0, count), ACC)
    elif DIVISOR == 2:
        total = _divide(total, tl.where(count == 0, 1.0, count), ACC)
    elif DIVISOR == 3:
        total = _divide(total, tl.load(rule_ptr), ACC)
    total = total * tl.load(rule_ptr + 2)
    if HAS_BASE:
        total = base + total
    tl.store(out_ptr + elements, total.to(out_ptr.dtype.element_ty), mask=elements < numel)


def merge(base: Tensor | None, experts: list[Tensor | TernaryDelta], recipe: Recipe) -> tuple[Tensor, Undecided | None]:
    """The host waits for the device where an election may leave elements undecided."""
    like = experts[0] if base is None else base
    acc = torch.float64 if like.dtype == torch.float64 else torch.float32
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    if like.numel() == 0:
        return out, None
    tensors = [expert.planes if isinstance(expert, TernaryDelta) else expert for expert in experts]

    def to_device(values: list, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device="cpu").to(like.device)

    are_ternary = sum(isinstance(expert, TernaryDelta) << k for k, expert in enumerate(experts))
    has_random = any(source.keep_below < ALL for source in recipe.sources)
    scales = [expert.scale if isinstance(expert, TernaryDelta) else 1.0 for expert in experts]
    sources = [
        to_device([source.bounds for source in recipe.sources], torch.int64),
        to_device([source.key for source in recipe.sources], torch.int64),
        to_device([(*source.factors, scale) for source, scale in zip(recipe.sources, scales, strict=True)], acc),
    ]
    rule = to_device([recipe.constant, recipe.zero_sign, recipe.lambda_], acc)
    programs = triton.cdiv(like.numel(), BLOCK)
    found = torch.zeros(programs, 2, dtype=torch.int32, device=like.device)
    with torch.cuda.device_of(like):
        _merge_kernel[(programs,)](
            like, tuple(tensors), *sources, rule, out, found, like.numel(),
            NUM_EXPERTS=len(experts), ARE_TERNARY=are_ternary, HAS_RANDOM=has_random, HAS_BASE=base is not None,
            ELECTION=ELECTIONS.index(recipe.election), DIVISOR=DIVISORS.index(recipe.divisor),
            ACC=tl.float64 if acc == torch.float64 else tl.float32, BLOCK=BLOCK,
            enable_fp_fusion=False,  # the products are rounded, as everywhere
        )  # fmt: skip
    if recipe.election != "sign_of_sum" or recipe.zero_sign != 0:
        return out, None
    undecided, signs = found.sum(0).tolist()
    return out, Undecided(found, signs) if undecided else None


def decide_(merged: Tensor, undecided: Undecided, base: Tensor | None, experts: list, recipe: Recipe) -> None:
    merged.copy_(merge(base, experts, recipe)[0])
