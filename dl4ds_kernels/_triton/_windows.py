"""2x2 windows: what the kernels of ``upsample_add`` and ``max_pool_indices`` share.

Maps are dense. A *row* is a line of small pixels and the two lines of the large map that it covers: channels_last has one for
each image and line, contiguous one for each image, channel and line. A small pixel is ``C`` elements (1 where contiguous), so
that a row has ``n = W * C`` small elements beside 2 * 2n large ones, all side by side.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._layout import suggested_format
from . import _common
from ._common import block_of, check
from ._device import program_index


@triton.jit
def row_tile(rows, n, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """(row, column, validity) of this program's (BLOCK_ROWS, BLOCK_COLS) small elements."""
    column_blocks = tl.cdiv(n, BLOCK_COLS)
    program = program_index(WIDE)
    row = (program // column_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = (program % column_blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    return row, col, (row < rows) & (col < n)


@triton.jit
def load_windows(
    large, row, col, valid, rows, n, C, PLANE: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Upper left, upper right, lower left, lower right of each window, (BLOCK_ROWS, BLOCK_COLS) each."""
    if PLANE:
        # Neighbours in memory: whole vectors are read and then taken apart.
        row, wide, inside = row_tile(rows, 2 * n, WIDE, BLOCK_ROWS, 2 * BLOCK_COLS)
        upper = tl.load(large + row * (4 * n) + wide, inside, 0.0).to(ACC)
        lower = tl.load(large + row * (4 * n) + 2 * n + wide, inside, 0.0).to(ACC)
        a, b = tl.split(tl.reshape(upper, [BLOCK_ROWS, BLOCK_COLS, 2]))
        c, d = tl.split(tl.reshape(lower, [BLOCK_ROWS, BLOCK_COLS, 2]))
        return a, b, c, d
    else:
        left = large + row * (4 * n) + col + (col // C) * C
        a = tl.load(left, valid, 0.0).to(ACC)
        b = tl.load(left + C, valid, 0.0).to(ACC)
        c = tl.load(left + 2 * n, valid, 0.0).to(ACC)
        d = tl.load(left + 2 * n + C, valid, 0.0).to(ACC)
        return a, b, c, d


@triton.jit
def store_windows(
    large, a, b, c, d, row, col, valid, rows, n, C, PLANE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Inverse of :func:`load_windows`."""
    dtype: tl.constexpr = large.dtype.element_ty
    if PLANE:
        row, wide, inside = row_tile(rows, 2 * n, WIDE, BLOCK_ROWS, 2 * BLOCK_COLS)
        upper = tl.reshape(tl.join(a.to(dtype), b.to(dtype)), [BLOCK_ROWS, 2 * BLOCK_COLS])
        lower = tl.reshape(tl.join(c.to(dtype), d.to(dtype)), [BLOCK_ROWS, 2 * BLOCK_COLS])
        tl.store(large + row * (4 * n) + wide, upper, inside)
        tl.store(large + row * (4 * n) + 2 * n + wide, lower, inside)
    else:
        left = large + row * (4 * n) + col + (col // C) * C
        tl.store(left, a.to(dtype), valid)
        tl.store(left + C, b.to(dtype), valid)
        tl.store(left + 2 * n, c.to(dtype), valid)
        tl.store(left + 2 * n + C, d.to(dtype), valid)


def maps_like(x: Tensor, layout: Tensor, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Room for (N, C, height, width) on the device of ``x``, in the memory format that ``layout`` suggests."""
    shape, memory_format = (*x.shape[:2], height, width), suggested_format(layout)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format)


def in_format(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``x`` dense in a memory format, copied only where it lies otherwise."""
    return _common.dense_as(x, torch.empty(x.shape, dtype=x.dtype, device="meta", memory_format=memory_format))


def check_maps(op: str, name: str, x: Tensor, even: bool = False) -> None:
    check(x.dim() == 4, op, name, "(N, C, H, W)", tuple(x.shape))
    check(x.dtype in _common.TRITON_DTYPE, op, name, "dtype float16, bfloat16, float32 or float64", x.dtype)
    if even:
        check(x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0, op, name, "an even height and width", tuple(x.shape))


def check_where(op: str, where: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    check(where.dtype == torch.uint8, op, "where", "dtype torch.uint8", where.dtype)
    check(tuple(where.shape) == tuple(shape), op, "where", f"shape {tuple(shape)}", tuple(where.shape))
    check(where.device == device, op, "where", f"device {device}", where.device)


@dataclass(frozen=True)
class Windows:
    """The rows of a small map, and the launch over them."""

    rows: int
    n: int
    channels: int
    plane: bool

    @classmethod
    def of(cls, small: Tensor, memory_format: torch.memory_format) -> "Windows":
        batch, channels, height, width = small.shape
        plane = memory_format == torch.contiguous_format
        rows = batch * height * (channels if plane else 1)
        return cls(rows, width * (1 if plane else channels), 1 if plane else channels, plane)

    def launch(self, kernel: Any, small: Tensor, **tensors: Tensor) -> None:
        """16 bytes of small elements a thread: more would leave gaps between the lanes of a load, and fewer would be narrow."""
        vector = 16 // small.element_size()
        block = (64 if self.plane else 128) * vector
        block_cols = block_of(self.n, block)
        block_rows = block // block_cols
        programs = triton.cdiv(self.rows, block_rows) * triton.cdiv(self.n, block_cols)
        with _common.device_of(small):
            _common.launch(
                kernel,
                programs,
                **tensors,
                rows=self.rows,
                n=self.n,
                C=self.channels,
                PLANE=self.plane,
                WIDE=_common.is_wide(4 * small.numel()),
                ACC=_common.accumulator(small),
                BLOCK_ROWS=block_rows,
                BLOCK_COLS=block_cols,
                num_warps=2 if self.plane else 4,
            )
