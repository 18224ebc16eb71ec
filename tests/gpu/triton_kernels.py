"""Triton kernels whose compiled PTX calibrates the bench: Triton's code generation is proven on hardware."""

import triton
import triton.language as tl


@triton.jit
def grouped_gemm(
    rows, weights, out, offsets, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[r] = rows[r] @ weights[expert of r].T; one program for each tile of each expert."""
    expert = tl.program_id(2)
    first, last = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    if first + tl.program_id(0) * BLOCK_M < last:
        m = first + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, depth, BLOCK_K):
            a = tl.load(rows + m[:, None] * depth + (start + k)[None, :], mask=(m < last)[:, None], other=0.0)
            b = tl.load(weights + expert * columns * depth + n[None, :] * depth + (start + k)[:, None])
            total = tl.dot(a, b, total)
        tl.store(out + m[:, None] * columns + n[None, :], total.to(out.dtype.element_ty), mask=(m < last)[:, None])


@triton.jit
def matmul(
    a, b, c, depth, columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of a @ b, with b as [depth, columns] or [columns, depth]: every data type that tensor cores take."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), OUT)
    for start in range(0, depth, BLOCK_K):
        left = tl.load(a + m[:, None] * depth + (start + k)[None, :])
        if TRANSPOSED:
            right = tl.load(b + n[None, :] * depth + (start + k)[:, None])
        else:
            right = tl.load(b + (start + k)[:, None] * columns + n[None, :])
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=OUT)
    tl.store(c + m[:, None] * columns + n[None, :], total)


@triton.jit
def descriptor_matmul(
    a, b, c, num_rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """a @ b.T through tensor descriptors, a fixed number of programs going over the tiles."""
    tiles_n = columns // BLOCK_N
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M) * tiles_n, PROGRAMS):
        m, n = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, depth, BLOCK_K):
            total = tl.dot(a.load([m, k]), b.load([n, k]).T, total)
        c.store([m, n], total.to(tl.bfloat16))


@triton.jit
def softmax_topk(logits, weights, ids, columns: tl.constexpr, K: tl.constexpr):
    """The K largest of each row by repeated argmax, and their softmax among all columns."""
    row = tl.program_id(0)
    column = tl.arange(0, columns)
    values = tl.load(logits + row * columns + column).to(tl.float32)
    largest = tl.max(values, 0)
    total = tl.sum(tl.exp(values - largest), 0)
    for k in tl.static_range(K):
        best = tl.argmax(values, 0)
        tl.store(ids + row * K + k, best.to(tl.int32))
        tl.store(weights + row * K + k, tl.exp(tl.max(values, 0) - largest) / total)
        values = tl.where(column == best, float("-inf"), values)


@triton.jit
def histogram(ids, counts, places, n, BLOCK: tl.constexpr):
    """A count and an arrival number for each id, by atomics."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(ids + i, mask=i < n, other=0)
    place = tl.atomic_add(counts + value, 1, mask=i < n)
    tl.store(places + i, place, mask=i < n)


@triton.jit
def sort_and_scan(x, ordered, sums, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(ordered + i, tl.sort(value))
    tl.store(sums + i, tl.cumsum(value, 0))


@triton.jit
def gather_rows(hidden_states, source_rows, out, hidden_size, BLOCK: tl.constexpr):
    """out[r] = hidden_states[source_rows[r]]"""
    row = tl.program_id(0)
    source = tl.load(source_rows + row).to(tl.int64)
    for start in range(0, hidden_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < hidden_size
        value = tl.load(hidden_states + source * hidden_size + column, mask=mask)
        tl.store(out + row.to(tl.int64) * hidden_size + column, value, mask=mask)


@triton.jit
def activation(gate, up, out, n, BLOCK: tl.constexpr):
    """silu(gate) * up in float32."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < n).to(tl.float32)
    u = tl.load(up + i, mask=i < n).to(tl.float32)
    tl.store(out + i, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=i < n)
