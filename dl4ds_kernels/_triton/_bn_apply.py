"""The element-wise passes of BatchNorm over the (rows, cols) matrix of :class:`~._common.Matrix`, forward and backward."""

import triton
import triton.language as tl

from ._device import (
    DENSE,
    activate,
    activate_bwd,
    block_channels,
    masked_bwd,
    offset_of,
    pack_bits,
    positive_side,
    tile_bytes,
    tile_indices,
    tile_place,
    tile_vector,
    tile_walk,
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
def folded_at(center, scale, shift, channel, valid, CHANNELS_LAST: tl.constexpr, TILED: tl.constexpr):
    """The three vectors of (x - center) * scale + shift at a tile's channels."""
    return (
        tile_vector(center, channel, valid, CHANNELS_LAST, TILED),
        tile_vector(scale, channel, valid, CHANNELS_LAST, TILED),
        tile_vector(shift, channel, valid, CHANNELS_LAST, TILED),
    )


@triton.jit
def bn_apply_kernel(
    x, residual, out, mask, center, scale, shift,
    numel, rows, cols, C, S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, CHANNELS_LAST: tl.constexpr, LAYOUT: tl.constexpr, WIDE: tl.constexpr,
    TILED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out = act((x - center) * scale + shift [+ residual]); out may be x where x is dense."""
    acc: tl.constexpr = center.dtype.element_ty
    dtype: tl.constexpr = out.dtype.element_ty
    block, first, tiles, step = tile_walk(rows, cols, CHANNELS_LAST, TILED, BLOCK_ROWS, BLOCK_COLS)
    if TILED:
        c, c_valid = block_channels(block, rows, cols, C, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS)
        m, a, b = folded_at(center, scale, shift, c, c_valid, CHANNELS_LAST, TILED)
    for tile in tl.range(first, tiles, step, num_stages=1):
        row_block, col_block = tile_place(block, tile, tiles, CHANNELS_LAST, TILED, WIDE)
        index, row, col, valid = tile_indices(row_block, col_block, numel, rows, cols, TILED, BLOCK_ROWS, BLOCK_COLS)
        if not TILED:
            c = col if CHANNELS_LAST else row % C
            m, a, b = folded_at(center, scale, shift, c, valid, CHANNELS_LAST, TILED)
        z = load_x(
            x, index, row, col, valid, C, S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w, CHANNELS_LAST, LAYOUT
        )
        z = (z.to(acc) - m) * a + b
        if residual is not None:
            z += tl.load(residual + index, valid, 0.0).to(acc)
        tl.store(out + index, activate(z, ACTIVATION, SLOPE).to(dtype), valid)
        if mask is not None:
            positive = positive_side(z.to(dtype).to(acc), ACTIVATION) & valid
            byte, byte_valid = tile_bytes(row_block, col_block, numel, rows, cols, TILED, BLOCK_ROWS, BLOCK_COLS)
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
    acc: tl.constexpr = mean.dtype.element_ty
    dtype: tl.constexpr = dout.dtype.element_ty
    RECOMPUTE: tl.constexpr = mask is None and ACTIVATION != 0
    SLOPED: tl.constexpr = TRAINING and dx is not None
    block, first, tiles, step = tile_walk(rows, cols, CHANNELS_LAST, TILED, BLOCK_ROWS, BLOCK_COLS)
    if TILED:
        c, c_valid = block_channels(block, rows, cols, C, CHANNELS_LAST, BLOCK_ROWS, BLOCK_COLS)
        a = tile_vector(scale, c, c_valid, CHANNELS_LAST, TILED)
        if NEED_X:
            m = tile_vector(mean, c, c_valid, CHANNELS_LAST, TILED)
        if RECOMPUTE:
            b = tile_vector(shift, c, c_valid, CHANNELS_LAST, TILED)
        if SLOPED:
            slope = tile_vector(slope_x, c, c_valid, CHANNELS_LAST, TILED)
            constant = tile_vector(offset, c, c_valid, CHANNELS_LAST, TILED)
    for tile in tl.range(first, tiles, step, num_stages=1):
        row_block, col_block = tile_place(block, tile, tiles, CHANNELS_LAST, TILED, WIDE)
        index, row, col, valid = tile_indices(row_block, col_block, numel, rows, cols, TILED, BLOCK_ROWS, BLOCK_COLS)
        if not TILED:
            c = col if CHANNELS_LAST else row % C
            a = tile_vector(scale, c, valid, CHANNELS_LAST, TILED)
            if NEED_X:
                m = tile_vector(mean, c, valid, CHANNELS_LAST, TILED)
            if RECOMPUTE:
                b = tile_vector(shift, c, valid, CHANNELS_LAST, TILED)
            if SLOPED:
                slope = tile_vector(slope_x, c, valid, CHANNELS_LAST, TILED)
                constant = tile_vector(offset, c, valid, CHANNELS_LAST, TILED)
        dz = tl.load(dout + index, valid, 0.0).to(acc)
        if NEED_X:
            centered = load_x(
                x, index, row, col, valid, C, S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w, CHANNELS_LAST, LAYOUT
            )
            centered = centered.to(acc) - m
        if mask is not None:
            byte, byte_valid = tile_bytes(row_block, col_block, numel, rows, cols, TILED, BLOCK_ROWS, BLOCK_COLS)
            positive = unpack_bits(tl.load(mask + byte, byte_valid, 0), BLOCK_ROWS, BLOCK_COLS)
            dz = masked_bwd(dz, positive, ACTIVATION, SLOPE)
        elif ACTIVATION:
            z = centered * a + b
            if residual is not None:
                z += tl.load(residual + index, valid, 0.0).to(acc)
            dz = activate_bwd(dz, z.to(dtype).to(acc), ACTIVATION, SLOPE)
        if dresidual is not None:
            tl.store(dresidual + index, dz.to(dtype), valid)
        if dx is not None:
            dz = dz * a
            if TRAINING:
                dz += centered * slope
                dz += constant
            tl.store(dx + index, dz.to(dtype), valid)


@triton.jit
def bn_apply_into_kernel(
    x, out, center, scale, shift, rows, cols, x_pitch, out_pitch,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """out = act((x - center) * scale + shift) over pixels (rows) of channels (cols) that lie x_pitch and out_pitch apart."""
    block, first, tiles, step = tile_walk(rows, cols, True, True, BLOCK_ROWS, BLOCK_COLS)
    c, c_valid = block_channels(block, rows, cols, cols, True, BLOCK_ROWS, BLOCK_COLS)
    acc: tl.constexpr = center.dtype.element_ty
    m, a, b = folded_at(center, scale, shift, c, c_valid, True, True)
    for tile in tl.range(first, tiles, step, num_stages=1):
        row_block, col_block = tile_place(block, tile, tiles, True, True, WIDE)
        _, row, col, valid = tile_indices(row_block, col_block, 0, rows, cols, True, BLOCK_ROWS, BLOCK_COLS)
        z = (tl.load(x + row * x_pitch + col, valid, 0.0).to(acc) - m) * a + b
        tl.store(out + row * out_pitch + col, activate(z, ACTIVATION, SLOPE).to(out.dtype.element_ty), valid)
