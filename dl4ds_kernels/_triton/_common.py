"""What the host functions share: the launch, checks, and the matrix view of a BatchNorm input."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._activation import ACTIVATION_CODES, MASK_CODES
from ..ops._layout import mask_bytes, suggested_format
from ._device import DENSE, FLAT, STRIDED

INT32_LIMIT = 2**31 - 2**16  # index + one block stays below 2**31
# Element-wise kernels: a tile has 8 elements for each thread. That is a 16-byte access to each 16-bit tensor, few registers
# beside the vectors' (so that many programs run at once), and one byte of the mask, which 32 threads move as one sector.
WARP_ELEMENTS = 8 * 32
WARPS = 4096  # that a large tensor gets before their programs walk over several tiles: about 30 a multiprocessor
MOST_TILES = 16  # that a program walks over: its vectors weigh next to nothing then, and the largest tensors get more programs
TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def launch(kernel: Any, programs: int, **arguments: Any) -> None:
    """Run ``kernel`` on a 1-D grid. Every launch of the backend passes here, so that a test can run it elsewhere."""
    kernel[(programs,)](**arguments)


def device_of(x: Tensor) -> Any:
    """Context in which Triton launches on ``x``'s device; nothing to do for the interpreter's CPU tensors."""
    return torch.cuda.device_of(x)


def check(condition: bool, op: str, argument: str, expected: str, got: Any) -> None:
    """Raise ``RuntimeError`` as the C++ host functions do. Only what protects memory is checked here."""
    if not condition:
        raise RuntimeError(f"{op}: {argument}: expected {expected}, got {got}")


def check_x(op: str, x: Tensor, name: str = "x") -> None:
    check(2 <= x.dim() <= 5, op, name, "2 to 5 dimensions", x.dim())
    check(x.dtype in TRITON_DTYPE, op, name, "dtype float16, bfloat16, float32 or float64", x.dtype)


def channel_vectors(op: str, x: Tensor, channels: int, /, **vectors: Tensor | None) -> list[Tensor | None]:
    """Per-channel vectors, checked (shape (C,), a floating dtype, the device of ``x``) and contiguous."""
    for name, vector in vectors.items():
        if vector is not None:
            check(vector.shape == (channels,), op, name, f"shape (C,) = ({channels},)", tuple(vector.shape))
            check(vector.dtype in TRITON_DTYPE, op, name, "a floating dtype", vector.dtype)
            check(vector.device == x.device, op, name, f"device {x.device}", vector.device)
    return [None if vector is None else vector.contiguous() for vector in vectors.values()]


def check_like(op: str, x: Tensor, /, **tensors: Tensor | None) -> None:
    """Element-wise operands: shape, dtype and device of ``x``."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check(tensor.shape == x.shape, op, name, f"shape {tuple(x.shape)}", tuple(tensor.shape))
            check(tensor.dtype == x.dtype, op, name, f"dtype {x.dtype}", tensor.dtype)
            check(tensor.device == x.device, op, name, f"device {x.device}", tensor.device)


def check_mask(op: str, x: Tensor, mask: Tensor | None) -> None:
    if mask is not None:
        check(mask.dtype == torch.uint8, op, "mask", "dtype torch.uint8", mask.dtype)
        check(mask.shape == (mask_bytes(x),), op, "mask", f"shape ({mask_bytes(x)},)", tuple(mask.shape))
        check(mask.device == x.device and mask.is_contiguous(), op, "mask", f"a contiguous tensor on {x.device}", mask.device)


def empty_mask(x: Tensor, wanted: bool, activation: int) -> Tensor:
    """Room for one bit an element where a mask is wanted and the activation has one, else an empty tensor."""
    return x.new_empty(mask_bytes(x) if wanted and activation in MASK_CODES else 0, dtype=torch.uint8)


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike; strides of dimensions of size 1 say nothing."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size == 1 or first == second for size, first, second in strides)


def dense_as(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """``tensor`` in the memory order of ``like`` (dense, perhaps without data), copied only where it differs."""
    if tensor is None or same_order(tensor, like):
        return tensor
    return torch.empty_like(like, device=tensor.device).copy_(tensor)


def accumulator(x: Tensor) -> tl.dtype:
    """fp64 for fp64 tensors, fp32 for everything narrower."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def slope_of(activation: int, negative_slope: float) -> float:
    """Slope as a compile-time constant: zero unless used, so that it costs no second kernel variant."""
    return float(negative_slope) if activation == ACTIVATION_CODES["leaky_relu"] else 0.0


def is_wide(numel: int, *tensors: Tensor) -> bool:
    """Whether an element's index or offset needs 64 bits."""
    extents = (sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors)
    return max([numel, *extents]) >= INT32_LIMIT


@dataclass(frozen=True)
class Matrix:
    """A BatchNorm tensor (N, C, *spatial) as the (rows, cols) matrix that its dense output is in memory.

    channels_last, or no spatial extent: rows = N*S pixels, cols = C channels. Otherwise: rows = N*C planes, cols = S pixels.
    ``strides`` are those of the tensor itself, (n, c, d, h, w).
    """

    channels_last: bool
    batch: int
    channels: int
    spatial: int
    height: int
    width: int
    strides: tuple[int, int, int, int, int]
    layout: int
    wide: bool

    @classmethod
    def of(cls, x: Tensor, like: Tensor) -> "Matrix":
        """The matrix of ``x``, whose output has the strides of ``like`` (dense, perhaps without data)."""
        sizes, strides = list(x.shape), list(x.stride())
        while len(sizes) < 5:  # missing spatial dimensions go in front: (N, C, L) becomes (N, C, 1, 1, L)
            sizes.insert(2, 1)
            strides.insert(2, 0)
        batch, channels, depth, height, width = sizes
        spatial = depth * height * width
        channels_last = spatial == 1 or suggested_format(x) != torch.contiguous_format
        layout, step = STRIDED.value, _single_stride(sizes[2:], strides[2:])
        if same_order(x, like):
            layout = DENSE.value
        elif step is not None:
            layout, strides[4] = FLAT.value, step
        wide = is_wide(x.numel(), x)
        return cls(channels_last, batch, channels, spatial, height, width, tuple(strides), layout, wide)

    @property
    def rows(self) -> int:
        return self.batch * (self.spatial if self.channels_last else self.channels)

    @property
    def cols(self) -> int:
        return self.channels if self.channels_last else self.spatial

    @property
    def per_channel(self) -> int:
        """Values per channel, the n of the statistics."""
        return self.batch * self.spatial

    def arguments(self) -> dict[str, Any]:
        """What every kernel over this matrix needs, by parameter name."""
        names = ("stride_n", "stride_c", "stride_d", "stride_h", "stride_w")
        return {
            "C": self.channels,
            "S": self.spatial,
            "H": self.height,
            "W": self.width,
            **dict(zip(names, self.strides, strict=True)),
            "CHANNELS_LAST": self.channels_last,
            "LAYOUT": self.layout,
            "WIDE": self.wide,
        }


def _single_stride(sizes: list[int], strides: list[int]) -> int | None:
    """The stride with which one index runs over all dimensions (1 for a single element), None where there is none."""
    kept = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    for (_, outer), (size, inner) in zip(kept, kept[1:], strict=False):
        if outer != size * inner:
            return None
    return kept[-1][1] if kept else 1


def block_of(size: int, largest: int) -> int:
    """Largest power of two up to ``largest`` that pads ``size`` by at most an eighth; at least 16."""
    block = largest
    while block > 16 and math.ceil(size / block) * block > size * 9 / 8:
        block //= 2
    return block


def elementwise_launch_config(matrix: Matrix) -> tuple[int, dict[str, Any]]:
    """(programs, configuration) of an element-wise kernel over ``matrix``.

    TILED: rows x cols tiles, so that channel indices and per-channel vectors are computed once a row or column. Rows that are
    no multiple of 16 elements long could not be read in vectors, so there the kernel runs over the flat memory instead.
    """
    rows, cols = matrix.rows, matrix.cols
    extent = {"numel": rows * cols, "rows": rows, "cols": cols}
    if cols % 16:
        flat = {"TILED": False, "BLOCK_ROWS": 1, "BLOCK_COLS": 4 * WARP_ELEMENTS, "num_warps": 4}
        return triton.cdiv(rows * cols, 4 * WARP_ELEMENTS), {**extent, **flat}
    programs, config = walk_config(rows, cols, matrix.channels_last)
    return programs, {"TILED": True, **extent, **config}


def walk_config(rows: int, cols: int, channels_last: bool) -> tuple[int, dict[str, int]]:
    """(programs, configuration) of a kernel whose programs walk over tiles of the same channels and load their vectors once.

    channels_last: as many warps as a block of channels fills with one value a thread, so that they share the loading of its
    vectors. (What is smaller the compiler lets every warp load for itself, in the pieces that its elements need.)
    """
    block_cols = block_of(cols, 256)
    warps = max(1, block_cols // 32) if channels_last else 4
    block_rows = min(WARP_ELEMENTS * warps // block_cols, max(8, triton.next_power_of_2(rows)))
    tiles = triton.cdiv(rows, block_rows), triton.cdiv(cols, block_cols)
    along, across = tiles if channels_last else tiles[::-1]
    steps = min(MOST_TILES, max(1, along * across * warps // WARPS))
    config = {"BLOCK_ROWS": block_rows, "BLOCK_COLS": block_cols, "num_warps": warps}
    return across * triton.cdiv(along, steps), config
