"""Triton kernels for test_triton.py."""

import triton
import triton.language as tl


@triton.jit
def scale_shift_relu(x, scale, shift, out, n, C: tl.constexpr, BLOCK: tl.constexpr):
    """out = max(x * scale[c] + shift[c], 0), channels innermost."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, inside, 0.0).to(tl.float32) * tl.load(scale + at % C) + tl.load(shift + at % C)
    tl.store(out + at, tl.maximum(value, 0.0).to(out.dtype.element_ty), inside)


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr):
    """One row per program."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(x + row * columns + column, inside, float("-inf"))
    value = tl.exp(value - tl.max(value, 0))
    tl.store(out + row * columns + column, value / tl.sum(value, 0), inside)


@triton.jit
def matrix_product(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a b, row-major; N and K are multiples of the blocks."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None], other=0.0)
        right = tl.load(b + k[:, None] * N + n[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + m[:, None] * N + n[None, :], total, mask=(m < M)[:, None])
