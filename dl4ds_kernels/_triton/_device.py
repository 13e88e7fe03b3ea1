"""Device functions that the kernels share: indices of a program's tile, bit masks, activations."""

import triton
import triton.language as tl

from .._activation import ACTIVATION_CODES

RELU = tl.constexpr(ACTIVATION_CODES["relu"])
LEAKY_RELU = tl.constexpr(ACTIVATION_CODES["leaky_relu"])
RELU6 = tl.constexpr(ACTIVATION_CODES["relu6"])
SILU = tl.constexpr(ACTIVATION_CODES["silu"])
HARDSWISH = tl.constexpr(ACTIVATION_CODES["hardswish"])

# How a kernel finds the elements of a BatchNorm input (constexpr LAYOUT).
DENSE = tl.constexpr(0)  # in the order of the output
FLAT = tl.constexpr(1)  # one stride serves all spatial dimensions: channel slices, whole planes
STRIDED = tl.constexpr(2)  # any strides


@triton.jit
def program_index(WIDE: tl.constexpr):
    """This program's number; 64 bits wide where indices derived from it may be."""
    if WIDE:
        return tl.program_id(0).to(tl.int64)
    else:
        return tl.program_id(0)


@triton.jit
def tile_walk(rows, cols, CHANNELS_LAST: tl.constexpr, TILED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """(block, first, tiles, step) of this program: it makes the tiles first, first + step, ... of ``tiles`` one after another.

    ``block`` stays: the columns of a channels_last matrix, else the rows. So the program's channels, and the vectors that it
    loads for them, stay too. Flat programs make one tile.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if not TILED:
        return program, program, programs, programs
    elif CHANNELS_LAST:
        blocks = tl.cdiv(cols, BLOCK_COLS)
        return program % blocks, program // blocks, tl.cdiv(rows, BLOCK_ROWS), programs // blocks
    else:
        blocks = tl.cdiv(rows, BLOCK_ROWS)
        walkers = programs // blocks
        return blocks - 1 - program // walkers, program % walkers, tl.cdiv(cols, BLOCK_COLS), walkers


@triton.jit
def tile_place(block, tile, tiles, CHANNELS_LAST: tl.constexpr, TILED: tl.constexpr, WIDE: tl.constexpr):
    """(block of rows, block of columns) of a tile, 64 bits wide where indices may be; a flat program's is a block of columns.

    Tiles are made from the end: after a statistics pass the end of the tensor is what the L2 cache still holds.
    """
    place = tiles - 1 - tile
    if WIDE:
        place = place.to(tl.int64)
        block = block.to(tl.int64)
    if TILED and CHANNELS_LAST:
        return place, block
    else:
        return block, place


@triton.jit
def tile_indices(
    row_block, col_block, numel, rows, cols, TILED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):  # fmt: skip
    """(index in memory order, row, column, validity) of the (BLOCK_ROWS, BLOCK_COLS) elements of :func:`tile_place`."""
    if TILED:
        row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        col = col_block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        return row * cols + col, row, col, (row < rows) & (col < cols)
    else:
        index = col_block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        row = index // cols
        return index, row, index - row * cols, index < numel


@triton.jit
def tile_bytes(
    row_block, col_block, numel, rows, cols, TILED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):  # fmt: skip
    """(byte index, validity) of the (BLOCK_ROWS, BLOCK_COLS / 8) mask bytes that belong to :func:`tile_indices`."""
    byte = col_block * (BLOCK_COLS // 8) + tl.arange(0, BLOCK_COLS // 8)[None, :]
    if TILED:
        row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        return row * (cols // 8) + byte, (row < rows) & (byte < cols // 8)
    else:
        return byte, byte * 8 < numel


@triton.jit
def block_channels(block, rows, cols, C, CHANNELS_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """(channel, validity) of the columns or rows of a tiled program's ``block``."""
    if CHANNELS_LAST:
        channel = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        return channel, channel < cols
    else:
        plane = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        return plane % C, plane < rows


@triton.jit
def tile_vector(vector, channel, valid, CHANNELS_LAST: tl.constexpr, TILED: tl.constexpr):
    """A per-channel vector at :func:`block_channels` (or, of a flat program, at the channel of each element), to broadcast."""
    values = tl.load(vector + channel, valid, 0.0)
    if not TILED:
        return values
    elif CHANNELS_LAST:
        return values[None, :]
    else:
        return values[:, None]


@triton.jit
def pack_bits(positive, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """(BLOCK_ROWS, BLOCK_COLS) truth values as (BLOCK_ROWS, BLOCK_COLS / 8) bytes, lowest bit first."""
    bits = tl.reshape(positive.to(tl.int32), [BLOCK_ROWS, BLOCK_COLS // 8, 8])
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def unpack_bits(mask, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Inverse of :func:`pack_bits`."""
    bits = (mask.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, [BLOCK_ROWS, BLOCK_COLS]) != 0


@triton.jit
def offset_of(n, c, s, H, W, stride_n, stride_c, stride_d, stride_h, stride_w, LAYOUT: tl.constexpr):
    """Offset of element (n, c, spatial index s) of x."""
    offset = n * stride_n + c * stride_c
    if LAYOUT == FLAT:
        return offset + s * stride_w
    line = s // W
    return offset + (line // H) * stride_d + (line % H) * stride_h + (s - line * W) * stride_w


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Activation with torch's edge values: NaN stays NaN, relu(-0.0) is -0.0."""
    if ACTIVATION == RELU:
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == LEAKY_RELU:
        z = tl.where(z > 0, z, z * SLOPE)
    elif ACTIVATION == RELU6:
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACTIVATION == SILU:
        z = z / (1 + tl.exp(-z))
    elif ACTIVATION == HARDSWISH:
        gate = z + 3
        z = z * tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate)) / 6
    return z


@triton.jit
def activate_bwd(dout, z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """``dout * activation'(z)``; ``z`` is rounded to the tensor's dtype by the caller, as torch sees it."""
    if ACTIVATION == SILU:
        gate = 1 / (1 + tl.exp(-z))
        dout = dout * gate * (1 + z * (1 - gate))
    elif ACTIVATION == HARDSWISH:
        dout = tl.where(z <= -3, 0.0, tl.where(z < 3, dout * (z / 3 + 0.5), dout))
    else:
        dout = masked_bwd(dout, positive_side(z, ACTIVATION), ACTIVATION, SLOPE)
    return dout


@triton.jit
def positive_side(z, ACTIVATION: tl.constexpr):
    """What a mask bit says: the derivative passes ``dout`` on. NaN counts as positive but for leaky_relu, as in torch."""
    if ACTIVATION == LEAKY_RELU:
        return z > 0
    elif ACTIVATION == RELU6:
        return ~((z <= 0) | (z >= 6))
    else:
        return ~(z <= 0)


@triton.jit
def masked_bwd(dout, positive, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """``dout * activation'`` of a piecewise linear activation from its mask bit."""
    if ACTIVATION == LEAKY_RELU:
        return tl.where(positive, dout, dout * SLOPE)
    elif ACTIVATION != 0:
        return tl.where(positive, dout, 0.0)
    else:
        return dout
