"""``max_pool_indices`` and ``max_unpool`` in Triton: 2x2 windows, a byte for the place of each maximum.

Both gradients are the other direction's kernel: every element is written once, by one program, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._layout import suggested_format
from ._windows import (
    Windows,
    check_maps,
    check_where,
    in_format,
    load_windows,
    maps_like,
    row_tile,
    store_windows,
)


@triton.jit
def take_larger(best, place, value, i: tl.constexpr):
    """The first of equal values stays; a NaN beats what came before it, as in torch."""
    take = (value > best) | (value != value)
    return tl.where(take, value, best), tl.where(take, i, place)


@triton.jit
def max_pool_kernel(
    x, out, where, rows, n, C, PLANE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out = the maximum of each window, where = its place, row by row."""
    row, col, valid = row_tile(rows, n, WIDE, BLOCK_ROWS, BLOCK_COLS)
    a, b, c, d = load_windows(x, row, col, valid, rows, n, C, PLANE, WIDE, ACC, BLOCK_ROWS, BLOCK_COLS)
    best, place = take_larger(a, tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.int32), b, 1)
    best, place = take_larger(best, place, c, 2)
    best, place = take_larger(best, place, d, 3)
    tl.store(out + row * n + col, best.to(out.dtype.element_ty), valid)
    tl.store(where + row * n + col, place.to(tl.uint8), valid)


@triton.jit
def max_unpool_kernel(
    y, where, out, rows, n, C, PLANE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out = y at its place, zero at the other three. Also the gradient of the pooling."""
    row, col, valid = row_tile(rows, n, WIDE, BLOCK_ROWS, BLOCK_COLS)
    value = tl.load(y + row * n + col, valid, 0.0)
    place = tl.load(where + row * n + col, valid, 0)
    a, b = tl.where(place == 0, value, 0.0), tl.where(place == 1, value, 0.0)
    c, d = tl.where(place == 2, value, 0.0), tl.where(place == 3, value, 0.0)
    store_windows(out, a, b, c, d, row, col, valid, rows, n, C, PLANE, WIDE, BLOCK_ROWS, BLOCK_COLS)


@triton.jit
def max_gather_kernel(
    dout, where, dy, rows, n, C, PLANE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dy = dout at the place. The gradient of the unpooling."""
    row, col, valid = row_tile(rows, n, WIDE, BLOCK_ROWS, BLOCK_COLS)
    a, b, c, d = load_windows(dout, row, col, valid, rows, n, C, PLANE, WIDE, ACC, BLOCK_ROWS, BLOCK_COLS)
    place = tl.load(where + row * n + col, valid, 0)
    value = tl.where(place == 1, b, tl.where(place == 2, c, tl.where(place == 3, d, a)))
    tl.store(dy + row * n + col, value.to(dy.dtype.element_ty), valid)


def max_pool_indices(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(out, where)`` of 2x2 windows, laid out as ``x`` suggests."""
    check_maps("max_pool_indices", "x", x, even=True)
    memory_format = suggested_format(x)
    out, where = (maps_like(x, x, x.shape[2] // 2, x.shape[3] // 2, dtype) for dtype in (None, torch.uint8))
    if out.numel():
        Windows.of(out, memory_format).launch(max_pool_kernel, out, x=in_format(x, memory_format), out=out, where=where)
    return out, where


def max_pool_indices_bwd(dout: Tensor, where: Tensor) -> Tensor:
    """``dx``, laid out like ``where``."""
    return _unpool("max_pool_indices_bwd", "dout", dout, where)


def max_unpool(y: Tensor, where: Tensor) -> Tensor:
    """``y`` at its places in maps of twice the size, laid out like ``where``."""
    return _unpool("max_unpool", "y", y, where)


def max_unpool_bwd(dout: Tensor, where: Tensor) -> Tensor:
    """``dy``, laid out like ``where``."""
    check_maps("max_unpool_bwd", "dout", dout, even=True)
    dy = maps_like(dout, where, dout.shape[2] // 2, dout.shape[3] // 2)
    check_where("max_unpool_bwd", where, tuple(dy.shape), dout.device)
    memory_format = suggested_format(where)
    if dy.numel():
        dout, where = in_format(dout, memory_format), in_format(where, memory_format)
        Windows.of(dy, memory_format).launch(max_gather_kernel, dy, dout=dout, where=where, dy=dy)
    return dy


def _unpool(op: str, name: str, y: Tensor, where: Tensor) -> Tensor:
    check_maps(op, name, y)
    check_where(op, where, tuple(y.shape), y.device)
    out = maps_like(y, where, 2 * y.shape[2], 2 * y.shape[3])
    memory_format = suggested_format(where)
    if out.numel():
        y, where = in_format(y, memory_format), in_format(where, memory_format)
        Windows.of(y, memory_format).launch(max_unpool_kernel, y, y=y, where=where, out=out)
    return out
