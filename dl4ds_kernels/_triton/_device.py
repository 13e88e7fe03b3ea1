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
def tile_program(WIDE: tl.constexpr):
    """Programs run backwards: after a statistics pass the end of the tensor is what the L2 cache still holds."""
    return tl.num_programs(0) - 1 - program_index(WIDE)


@triton.jit
def tile_indices(
    numel, rows, cols, TILED: tl.constexpr, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):  # fmt: skip
    """(index in memory order, row, column, validity) of this program's (BLOCK_ROWS, BLOCK_COLS) elements."""
    program = tile_program(WIDE)
    if TILED:
        column_blocks = tl.cdiv(cols, BLOCK_COLS)
        row = (program // column_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        col = (program % column_blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        return row * cols + col, row, col, (row < rows) & (col < cols)
    else:
        index = program * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        row = index // cols
        return index, row, index - row * cols, index < numel


@triton.jit
def tile_bytes(
    numel, rows, cols, TILED: tl.constexpr, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):  # fmt: skip
    """(byte index, validity) of the (BLOCK_ROWS, BLOCK_COLS / 8) mask bytes that belong to :func:`tile_indices`."""
    program = tile_program(WIDE)
    if TILED:
        column_blocks = tl.cdiv(cols, BLOCK_COLS)
        row = (program // column_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        byte = (program % column_blocks) * (BLOCK_COLS // 8) + tl.arange(0, BLOCK_COLS // 8)[None, :]
        return row * (cols // 8) + byte, (row < rows) & (byte < cols // 8)
    else:
        byte = program * (BLOCK_COLS // 8) + tl.arange(0, BLOCK_COLS // 8)[None, :]
        return byte, byte * 8 < numel


@triton.jit
def tile_channels(
    row, col, valid, rows, cols, C, CHANNELS_LAST: tl.constexpr, TILED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """(channel, validity) of the elements of :func:`tile_indices`; of a whole row or column of tiles only once."""
    if TILED:
        column_blocks = tl.cdiv(cols, BLOCK_COLS)
        if CHANNELS_LAST:
            channel = (tile_program(False) % column_blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
            return channel, channel < cols
        else:
            plane = (tile_program(False) // column_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            return plane % C, plane < rows
    elif CHANNELS_LAST:
        return col, valid
    else:
        return row % C, valid


@triton.jit
def tile_vector(vector, channel, valid, CHANNELS_LAST: tl.constexpr, TILED: tl.constexpr):
    """A per-channel vector at :func:`tile_channels`, broadcastable to the tile."""
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
