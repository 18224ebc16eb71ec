"""Triton kernels of task vectors, under the names of the compiled ops (native.py); the bits and the undo are theirs.

Weights are read and written as integers, so that what is not changed keeps its bits. The planes of several vectors are
put into one tensor first, 0.5 bytes a weight and vector beside the 0.25 of reading them; any number of vectors will do.
Strings of bits are put together by atomics on integers: at most one element of each vector owns a bit, so their order
does not matter. Keeping an undo waits for the device twice, as in CUDA: for the lengths of what it returns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 64  # elements that share the two words of a plane
BLOCK_GROUPS = 64  # of a block of the undo
BLOCK_WARPS = 16  # with 4, 255 registers a thread and spills
APPLY_GROUPS = 16  # of one program of apply_ternary: 8 weights a thread

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_TRITON = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@triton.jit
def _bit(words, GROUP: tl.constexpr):
    """[groups] int64 to [groups, 64] of 0 and 1."""
    return ((words[:, None] >> tl.arange(0, GROUP).to(tl.int64)[None, :]) & 1).to(tl.int32)


@triton.jit
def _sum_deltas(
    planes_ptr,  # [num_deltas, num_groups, 2]
    values_ptr,  # [num_deltas]
    num_deltas,
    num_groups,
    numel,
    groups,
    ACC: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of some groups, sum_i value_i t_i, and 1 where any t is not zero."""
    sums = tl.zeros((GROUPS, GROUP), ACC)
    # of elements: as words, the loop would hand them on in a layout that every warp loads whole
    some = tl.zeros((GROUPS, GROUP), tl.int32)
    for i in range(num_deltas):
        first = planes_ptr + tl.cast(i, tl.int64) * num_groups * 2
        # both words at once: a warp asks for each sector of the planes once
        at = first + groups[:, None] * 2 + tl.arange(0, 2)[None, :]
        nonzero, negative = tl.split(tl.load(at, mask=(groups < num_groups)[:, None], other=0))
        value = tl.load(values_ptr + i)
        term = tl.where(_bit(negative, GROUP) != 0, -value, value)
        # + 0 where t is zero: no sum is -0, so that is itself
        bits = _bit(nonzero, GROUP)
        sums += tl.where(bits != 0, term, 0.0)
        some |= bits
    elements = groups[:, None] * GROUP + tl.arange(0, GROUP).to(tl.int64)[None, :]
    return sums, tl.where(elements < numel, some, 0), elements


@triton.jit
def _apply_kernel(
    weight_ptr,  # [numel], the bits
    planes_ptr,
    values_ptr,
    num_deltas,
    num_groups,
    numel,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    sums, touched, elements = _sum_deltas(
        planes_ptr, values_ptr, num_deltas, num_groups, numel, groups, ACC, GROUPS, GROUP
    )
    old = tl.load(weight_ptr + elements, mask=elements < numel, other=0)
    x = old.to(DTYPE, bitcast=True).to(ACC)
    new = (x + sums).to(DTYPE).to(old.dtype, bitcast=True)
    tl.store(weight_ptr + elements, tl.where((touched != 0) & (x == x), new, old), mask=elements < numel)


@triton.jit
def _count_kernel(
    planes_ptr,
    words_ptr,  # [num_blocks]: words that a string of the block may need
    num_deltas,
    num_groups,
    numel,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    groups = block * GROUPS + tl.arange(0, GROUPS)
    counts = tl.zeros((GROUPS,), tl.int32)
    for i in range(num_deltas):
        first = planes_ptr + tl.cast(i, tl.int64) * num_groups * 2
        counts += tl.sum(_bit(tl.load(first + groups * 2, mask=groups < num_groups, other=0), GROUP), 1)
    most = tl.minimum(tl.sum(counts, 0).to(tl.int64), numel - block * (GROUPS * GROUP))
    tl.store(words_ptr + block, (tl.minimum(most, GROUPS * GROUP) + 63) // 64)


@triton.jit
def _places(marks):
    """How many marks are before each element of a block."""
    of_group = tl.sum(marks, 1)
    return (tl.cumsum(of_group, 0) - of_group)[:, None] + tl.cumsum(marks, 1) - marks


@triton.jit
def _apply_undoable_kernel(
    weight_ptr,  # [numel], the bits
    planes_ptr,
    values_ptr,
    offsets_ptr,  # [num_blocks + 1], in words of 64 bits
    moved_ptr,  # halves of them, zero
    other_ptr,
    scratch_ptr,  # kept values of a block from 64 * its offset on
    kept_counts_ptr,  # [num_blocks]
    num_deltas,
    num_groups,
    numel,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    groups = block * GROUPS + tl.arange(0, GROUPS)
    sums, touched, elements = _sum_deltas(
        planes_ptr, values_ptr, num_deltas, num_groups, numel, groups, ACC, GROUPS, GROUP
    )
    old = tl.load(weight_ptr + elements, mask=elements < numel, other=0)
    x = old.to(DTYPE, bitcast=True).to(ACC)
    changes = (touched != 0) & (x == x)
    rounded = (x + sums).to(DTYPE)
    new = rounded.to(old.dtype, bitcast=True)
    step = old - (rounded.to(ACC) - sums).to(DTYPE).to(old.dtype, bitcast=True)
    moved = changes & ((step == 1) | (step == -1))
    other = changes & (step != 0) & (step != 1)
    tl.store(weight_ptr + elements, tl.where(changes, new, old), mask=elements < numel)
    offset = tl.load(offsets_ptr + block)
    places = _places(touched)
    at = 2 * offset + places // 32
    bit = tl.full((GROUPS, GROUP), 1, tl.int32) << (places % 32)
    tl.atomic_or(moved_ptr + at, bit, mask=moved, sem="relaxed")
    tl.atomic_or(other_ptr + at, bit, mask=other, sem="relaxed")
    kept = (other & (step != -1)).to(tl.int32)
    tl.store(scratch_ptr + 64 * offset + _places(kept), old, mask=kept != 0)
    tl.store(kept_counts_ptr + block, tl.sum(tl.sum(kept, 1), 0).to(tl.int64))


@triton.jit
def _collect_kernel(
    scratch_ptr,
    offsets_ptr,  # [num_blocks + 1]
    kept_offsets_ptr,  # [num_blocks + 1]
    kept_ptr,
    BLOCK: tl.constexpr,
):
    """Kept values from each block's part of the scratch to their places."""
    block = tl.program_id(0)
    source = 64 * tl.load(offsets_ptr + block)
    first = tl.load(kept_offsets_ptr + block)
    count = tl.load(kept_offsets_ptr + block + 1) - first
    for at in range(0, count.to(tl.int32), BLOCK):
        i = at + tl.arange(0, BLOCK)
        tl.store(kept_ptr + first + i, tl.load(scratch_ptr + source + i, mask=i < count, other=0), mask=i < count)


@triton.jit
def _unapply_kernel(
    weight_ptr,  # [numel], the bits
    planes_ptr,
    values_ptr,
    offsets_ptr,  # [num_blocks + 1], in words of 64 bits
    moved_ptr,  # halves of them
    other_ptr,
    kept_ptr,  # the bits
    kept_offsets_ptr,  # [num_blocks + 1]
    num_words,
    num_kept,
    num_deltas,
    num_groups,
    numel,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of an undo of other vectors, what lies outside the tensors counts as zero."""
    block = tl.program_id(0).to(tl.int64)
    groups = block * GROUPS + tl.arange(0, GROUPS)
    sums, touched, elements = _sum_deltas(
        planes_ptr, values_ptr, num_deltas, num_groups, numel, groups, ACC, GROUPS, GROUP
    )
    places = _places(touched)
    at = 2 * tl.load(offsets_ptr + block) + places // 32
    known = (touched != 0) & (at >= 0) & (at < 2 * num_words)
    moved = (tl.load(moved_ptr + at, mask=known, other=0) >> (places % 32)) & 1
    other = (tl.load(other_ptr + at, mask=known, other=0) >> (places % 32)) & 1
    kept = other & (1 - moved)
    source = tl.load(kept_offsets_ptr + block) + _places(kept)
    held = (kept != 0) & (source >= 0) & (source < num_kept)
    old = tl.load(weight_ptr + elements, mask=elements < numel, other=0)
    x = old.to(DTYPE, bitcast=True).to(ACC)
    back = (x - sums).to(DTYPE).to(old.dtype, bitcast=True) + (moved * (1 - 2 * other)).to(old.dtype)
    back = tl.where(kept != 0, tl.load(kept_ptr + source, mask=held, other=0), back)
    tl.store(weight_ptr + elements, tl.where((touched != 0) & (x == x), back, old), mask=elements < numel)


def apply_ternary(weight: Tensor, deltas: list[Tensor], values: list[float]) -> None:
    if weight.numel() == 0 or not deltas:
        return
    vectors, kinds = _vectors(weight, deltas, values)
    with torch.cuda.device_of(weight):
        grid = (triton.cdiv(vectors[3], APPLY_GROUPS),)
        _apply_kernel[grid](_bits(weight), *vectors, **kinds, GROUPS=APPLY_GROUPS, GROUP=GROUP)


def apply_ternary_undoable(weight: Tensor, deltas: list[Tensor], values: list[float]) -> tuple[Tensor, ...]:
    num_blocks = triton.cdiv(weight.numel(), BLOCK_GROUPS * GROUP)
    offsets, kept_offsets = weight.new_zeros((2, num_blocks + 1), dtype=torch.int64).unbind()
    if num_blocks == 0 or not deltas:
        return offsets, offsets.new_empty((2, 0)), weight.new_empty(0), kept_offsets
    (planes, values_, *sizes), kinds = _vectors(weight, deltas, values)
    with torch.cuda.device_of(weight):
        _count_kernel[(num_blocks,)](planes, offsets[1:], *sizes, GROUPS=BLOCK_GROUPS, GROUP=GROUP, num_warps=8)
        offsets = offsets.cumsum(0)
        num_words = int(offsets[-1])
        strings = offsets.new_zeros((2, num_words))
        scratch = _bits(weight).new_empty(64 * num_words)
        _apply_undoable_kernel[(num_blocks,)](
            _bits(weight), planes, values_, offsets, *_halves(strings), scratch, kept_offsets[1:], *sizes, **kinds,
            GROUPS=BLOCK_GROUPS, GROUP=GROUP, num_warps=BLOCK_WARPS,
        )  # fmt: skip
        kept_offsets = kept_offsets.cumsum(0)
        kept = weight.new_empty(int(kept_offsets[-1]))
        if kept.numel() > 0:
            _collect_kernel[(num_blocks,)](scratch, offsets, kept_offsets, _bits(kept), BLOCK=128)
    return offsets, strings, kept, kept_offsets


def unapply_ternary(
    weight: Tensor, deltas: list[Tensor], values: list[float],
    offsets: Tensor, strings: Tensor, kept: Tensor, kept_offsets: Tensor,
) -> None:  # fmt: skip
    if weight.numel() == 0 or not deltas:
        return
    (planes, values_, *sizes), kinds = _vectors(weight, deltas, values)
    with torch.cuda.device_of(weight):
        _unapply_kernel[(offsets.numel() - 1,)](
            _bits(weight), planes, values_, offsets, *_halves(strings), _bits(kept), kept_offsets, strings.shape[1],
            kept.numel(), *sizes, **kinds, GROUPS=BLOCK_GROUPS, GROUP=GROUP, num_warps=BLOCK_WARPS,
        )  # fmt: skip


def _vectors(weight: Tensor, deltas: list[Tensor], values: list[float]) -> tuple[tuple, dict]:
    """What every kernel takes of the vectors: planes, values, their number, groups, elements; and the dtypes."""
    acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
    planes = deltas[0] if len(deltas) == 1 else torch.stack(deltas)
    values = torch.tensor(values, dtype=acc, device="cpu").to(weight.device)
    return (planes, values, len(deltas), deltas[0].shape[0], weight.numel()), dict(
        DTYPE=_TRITON[weight.dtype], ACC=_TRITON[acc]
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(_BITS[tensor.dtype.itemsize])


def _halves(strings: Tensor) -> tuple[Tensor, Tensor]:
    """Both strings in words of 32 bits."""
    return strings.view(torch.int32).unbind()
