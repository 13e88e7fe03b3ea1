"""``upsample_add`` in Triton: the small map is read once, each of its pixels added to the four that it covers.

The gradient gathers: one program sums the four pixels of each window in a fixed order, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._layout import suggested_format
from ._common import check
from ._windows import Windows, check_maps, in_format, load_windows, maps_like, row_tile, store_windows


@triton.jit
def upsample_add_kernel(
    low, skip, out, rows, n, C, PLANE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out = skip + each element of low at the four places of its window, one rounding."""
    row, col, valid = row_tile(rows, n, WIDE, BLOCK_ROWS, BLOCK_COLS)
    value = tl.load(low + row * n + col, valid, 0.0).to(ACC)
    a, b, c, d = load_windows(skip, row, col, valid, rows, n, C, PLANE, WIDE, ACC, BLOCK_ROWS, BLOCK_COLS)
    store_windows(
        out, a + value, b + value, c + value, d + value, row, col, valid, rows, n, C, PLANE, WIDE, BLOCK_ROWS, BLOCK_COLS
    )


@triton.jit
def upsample_add_bwd_kernel(
    dout, dlow, rows, n, C, PLANE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dlow = the sum of dout over each window: columns first, as on the CPU, one rounding."""
    row, col, valid = row_tile(rows, n, WIDE, BLOCK_ROWS, BLOCK_COLS)
    a, b, c, d = load_windows(dout, row, col, valid, rows, n, C, PLANE, WIDE, ACC, BLOCK_ROWS, BLOCK_COLS)
    tl.store(dlow + row * n + col, ((a + c) + (b + d)).to(dlow.dtype.element_ty), valid)


def upsample_add(low: Tensor, skip: Tensor) -> Tensor:
    """``skip + nearest x 2 (low)``, laid out as ``skip`` suggests; operands in another order are copied first."""
    check_maps("upsample_add", "low", low)
    check_maps("upsample_add", "skip", skip)
    n, c, h, w = low.shape
    check(tuple(skip.shape) == (n, c, 2 * h, 2 * w), "upsample_add", "skip", f"shape {(n, c, 2 * h, 2 * w)}", tuple(skip.shape))
    check(skip.dtype == low.dtype, "upsample_add", "skip", f"dtype {low.dtype}", skip.dtype)
    check(skip.device == low.device, "upsample_add", "skip", f"device {low.device}", skip.device)
    memory_format = suggested_format(skip)
    out = torch.empty_like(skip, memory_format=memory_format)
    if out.numel():
        windows = Windows.of(low, memory_format)
        windows.launch(
            upsample_add_kernel, low, low=in_format(low, memory_format), skip=in_format(skip, memory_format), out=out
        )
    return out


def upsample_add_bwd(dout: Tensor) -> Tensor:
    """``dlow`` (N, C, H / 2, W / 2), laid out as ``dout`` suggests."""
    check_maps("upsample_add_bwd", "dout", dout, even=True)
    memory_format = suggested_format(dout)
    dlow = maps_like(dout, dout, dout.shape[2] // 2, dout.shape[3] // 2)
    if dlow.numel():
        Windows.of(dlow, memory_format).launch(upsample_add_bwd_kernel, dlow, dout=in_format(dout, memory_format), dlow=dlow)
    return dlow
