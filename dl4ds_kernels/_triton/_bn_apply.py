"""The element-wise passes of BatchNorm over the (rows, cols) matrix of :class:`~._common.Matrix`, forward and backward."""

import triton
import triton.language as tl

from ._device import (
    DENSE,
    activate,
    activate_bwd,
    masked_bwd,
    offset_of,
    pack_bits,
    positive_side,
    program_index,
    tile_bytes,
    tile_channels,
    tile_indices,
    tile_vector,
    unpack_bits,
)


@triton.jit
def load_x(
    x, index, row, col, valid, C, S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w,
    CHANNELS_LAST: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Elements of x at (row, col) of its matrix, in x's dtype."""
    if LAYOUT == DENSE:
        offset = index
    elif CHANNELS_LAST:
        n = row // S
        offset = offset_of(n, col, row - n * S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w, LAYOUT)
    else:
        n = row // C
        offset = offset_of(n, row - n * C, col, H, W, stride_n, stride_c, stride_d, stride_h, stride_w, LAYOUT)
    return tl.load(x + offset, valid, 0.0)


@triton.jit
def bn_apply_kernel(
    x, residual, out, mask, center, scale, shift,
    numel, rows, cols, C, S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, CHANNELS_LAST: tl.constexpr, LAYOUT: tl.constexpr, WIDE: tl.constexpr,
    TILED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out = act((x - center) * scale + shift [+ residual]); out may be x where x is dense."""
    index, row, col, valid = tile_indices(numel, rows, cols, TILED, WIDE, BLOCK_ROWS, BLOCK_COLS)
    c, c_valid = tile_channels(row, col, valid, rows, cols, C, CHANNELS_LAST, TILED, BLOCK_ROWS, BLOCK_COLS)
    acc: tl.constexpr = center.dtype.element_ty
    dtype: tl.constexpr = out.dtype.element_ty
    z = load_x(x, index, row, col, valid, C, S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w, CHANNELS_LAST, LAYOUT)
    z = z.to(acc) - tile_vector(center, c, c_valid, CHANNELS_LAST, TILED)
    z = z * tile_vector(scale, c, c_valid, CHANNELS_LAST, TILED)
    z = z + tile_vector(shift, c, c_valid, CHANNELS_LAST, TILED)
    if residual is not None:
        z += tl.load(residual + index, valid, 0.0).to(acc)
    tl.store(out + index, activate(z, ACTIVATION, SLOPE).to(dtype), valid)
    if mask is not None:
        positive = positive_side(z.to(dtype).to(acc), ACTIVATION) & valid
        byte, byte_valid = tile_bytes(numel, rows, cols, TILED, WIDE, BLOCK_ROWS, BLOCK_COLS)
        tl.store(mask + byte, pack_bits(positive, BLOCK_ROWS, BLOCK_COLS), byte_valid)


@triton.jit
def bn_bwd_apply_kernel(
    dout, x, residual, mask, dx, dresidual, mean, scale, shift, slope_x, offset,
    numel, rows, cols, C, S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w,
    TRAINING: tl.constexpr, NEED_X: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LAYOUT: tl.constexpr, WIDE: tl.constexpr,
    TILED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dresidual = dz = dout * act'(z); dx from dz, and in training from x."""
    index, row, col, valid = tile_indices(numel, rows, cols, TILED, WIDE, BLOCK_ROWS, BLOCK_COLS)
    c, c_valid = tile_channels(row, col, valid, rows, cols, C, CHANNELS_LAST, TILED, BLOCK_ROWS, BLOCK_COLS)
    acc: tl.constexpr = mean.dtype.element_ty
    dtype: tl.constexpr = dout.dtype.element_ty
    dz = tl.load(dout + index, valid, 0.0).to(acc)
    a = tile_vector(scale, c, c_valid, CHANNELS_LAST, TILED)
    if NEED_X:
        centered = load_x(
            x, index, row, col, valid, C, S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w, CHANNELS_LAST, LAYOUT
        ).to(acc) - tile_vector(mean, c, c_valid, CHANNELS_LAST, TILED)
    if mask is not None:
        byte, byte_valid = tile_bytes(numel, rows, cols, TILED, WIDE, BLOCK_ROWS, BLOCK_COLS)
        positive = unpack_bits(tl.load(mask + byte, byte_valid, 0), BLOCK_ROWS, BLOCK_COLS)
        dz = masked_bwd(dz, positive, ACTIVATION, SLOPE)
    elif ACTIVATION:
        z = centered * a + tile_vector(shift, c, c_valid, CHANNELS_LAST, TILED)
        if residual is not None:
            z += tl.load(residual + index, valid, 0.0).to(acc)
        dz = activate_bwd(dz, z.to(dtype).to(acc), ACTIVATION, SLOPE)
    if dresidual is not None:
        tl.store(dresidual + index, dz.to(dtype), valid)
    if dx is not None:
        dz = dz * a
        if TRAINING:
            dz += centered * tile_vector(slope_x, c, c_valid, CHANNELS_LAST, TILED)
            dz += tile_vector(offset, c, c_valid, CHANNELS_LAST, TILED)
        tl.store(dx + index, dz.to(dtype), valid)


@triton.jit
def bn_apply_into_kernel(
    x, out, center, scale, shift, rows, cols, x_pitch, out_pitch,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out = act((x - center) * scale + shift) over pixels (rows) of channels (cols) that lie x_pitch and out_pitch apart."""
    column_blocks = tl.cdiv(cols, BLOCK_COLS)
    program = program_index(WIDE)
    row = (program // column_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(0) % column_blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    c_valid = col < cols
    valid = (row < rows)[:, None] & c_valid[None, :]
    acc: tl.constexpr = center.dtype.element_ty
    z = tl.load(x + (row * x_pitch)[:, None] + col[None, :], valid, 0.0).to(acc)
    z = (z - tl.load(center + col, c_valid, 0.0)[None, :]) * tl.load(scale + col, c_valid, 0.0)[None, :]
    z = z + tl.load(shift + col, c_valid, 0.0)[None, :]
    tl.store(out + (row * out_pitch)[:, None] + col[None, :], activate(z, ACTIVATION, SLOPE).to(out.dtype.element_ty), valid)
