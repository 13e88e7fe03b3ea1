"""The two reductions of BatchNorm over everything but channels: first pass, one partial result per chunk and channel.

A chunk is a range of "lines". channels_last: a line is a pixel (a row of the matrix) and a program owns BLOCK_COLS channels.
Otherwise: a line is one of the ``blocks`` pieces of BLOCK_COLS pixels of a plane, and a program owns one channel.
The number of chunks depends on the shape alone, so the order of the sums, and with it every bit, does too.
"""

from typing import Any

import triton
import triton.language as tl

from ._common import Matrix
from ._device import (
    DENSE,
    activate_bwd,
    masked_bwd,
    offset_of,
    program_index,
    unpack_bits,
)


def reduce_launch_config(matrix: Matrix) -> dict[str, Any]:
    """Blocks, lines per chunk and number of chunks for a reduction over ``matrix``.

    Every slot of a tile sums one value a step. 4 to 128 steps a chunk keep its fp32 sums short and their cost well above that
    of the final reduction; about 1,000 programs fill the largest GPU.
    """
    if matrix.channels_last:
        block_cols = min(64, max(16, triton.next_power_of_2(matrix.channels)))
        groups, blocks = triton.cdiv(matrix.channels, block_cols), 1
        lines = matrix.batch * matrix.spatial
    else:
        block_cols = min(1024, max(16, triton.next_power_of_2(matrix.spatial)))
        groups, blocks = matrix.channels, triton.cdiv(matrix.spatial, block_cols)
        lines = matrix.batch * blocks
    block_lines = min(2048 // block_cols, triton.next_power_of_2(lines))
    tiles = triton.cdiv(lines, block_lines)
    steps = min(128, max(4, triton.cdiv(tiles * groups, 1024)))
    return {
        "blocks": blocks,
        "lines": lines,
        "lines_per_chunk": steps * block_lines,
        "chunks": triton.cdiv(tiles, steps),
        "groups": groups,
        "BLOCK_LINES": block_lines,
        "BLOCK_COLS": block_cols,
        "num_warps": 4 if block_lines * block_cols >= 1024 else 1,
    }


@triton.jit
def line_indices(
    line, lane, stop, group, blocks, C, S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w,
    CHANNELS_LAST: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """(index in the output's memory order, offset in x, validity) of ``line`` (BLOCK_LINES, 1) by ``lane`` (1, columns)."""
    if CHANNELS_LAST:
        n = line // S
        s = line - n * S
        c = group * BLOCK_COLS + lane
        index = line * C + c
        valid = (line < stop) & (c < C)
    else:
        n = line // blocks
        s = (line - n * blocks) * BLOCK_COLS + lane
        c = group
        index = (n * C + c) * S + s
        valid = (line < stop) & (s < S)
    if LAYOUT == DENSE:
        return index, index, valid
    else:
        return index, offset_of(n, c, s, H, W, stride_n, stride_c, stride_d, stride_h, stride_w, LAYOUT), valid


@triton.jit
def reduce_tile(values, CHANNELS_LAST: tl.constexpr):
    """Sum over a tile: per column (channel), or of everything."""
    if CHANNELS_LAST:
        return tl.sum(values, 0)
    else:
        return tl.sum(tl.sum(values, 1), 0)


@triton.jit
def store_partial(partial, value, slot, chunk, chunks, group, C, CHANNELS_LAST: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """partial[slot, chunk, channel] = value."""
    at = partial + (slot * chunks + chunk) * C
    if CHANNELS_LAST:
        c = group * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        tl.store(at + c, value, c < C)
    else:
        tl.store(at + group, value)


@triton.jit
def bn_stats_partial_kernel(
    x, partial, blocks, lines, lines_per_chunk, chunks, groups,
    C, S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w,
    CHANNELS_LAST: tl.constexpr, LAYOUT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_LINES: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """partial (4, chunks, C): pivot, mean - pivot, sum of squared deviations from the mean, count.

    Each slot of the tile subtracts its own first value, so what cancels is bounded by the data's own spread: the error of the
    squared deviations is at most steps * epsilon relative, whatever the mean.
    """
    group = program_index(WIDE) % groups
    chunk = program_index(WIDE) // groups
    acc: tl.constexpr = partial.dtype.element_ty
    start = chunk * lines_per_chunk
    stop = tl.minimum(start + lines_per_chunk, lines)
    line = start + tl.arange(0, BLOCK_LINES)[:, None]
    lane = tl.arange(0, BLOCK_COLS)[None, :]

    _, at, valid = line_indices(
        line, lane, stop, group, blocks, C, S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w,
        CHANNELS_LAST, LAYOUT, BLOCK_COLS,
    )  # fmt: skip
    first = tl.load(x + at, valid, 0.0).to(acc)
    # The first tile's mean stands in for the first value of slots that have none (a plane's end); slots are merged around it.
    seen = tl.maximum(reduce_tile(valid.to(acc), CHANNELS_LAST), 1.0)
    pivot = reduce_tile(first / (seen[None, :] if CHANNELS_LAST else seen), CHANNELS_LAST)
    pivot_tile = pivot[None, :] if CHANNELS_LAST else pivot
    first = tl.where(valid, first, pivot_tile)
    # What a slot has counted: all its lines, but for the columns beyond a plane's end in the plane's last piece.
    whole = (line < stop).to(acc)
    last = ((line < stop) & (line % blocks == blocks - 1)).to(acc)
    sum1 = tl.zeros([BLOCK_LINES, BLOCK_COLS], acc)
    sum2 = tl.zeros([BLOCK_LINES, BLOCK_COLS], acc)
    for _ in tl.range(start + BLOCK_LINES, stop, BLOCK_LINES, num_stages=3):
        line += BLOCK_LINES
        _, at, valid = line_indices(
            line, lane, stop, group, blocks, C, S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w,
            CHANNELS_LAST, LAYOUT, BLOCK_COLS,
        )  # fmt: skip
        delta = tl.where(valid, tl.load(x + at, valid, 0.0).to(acc) - first, 0.0)
        whole += (line < stop).to(acc)
        last += ((line < stop) & (line % blocks == blocks - 1)).to(acc)
        sum1 += delta
        sum2 += delta * delta

    width = C - group * BLOCK_COLS if CHANNELS_LAST else S - (blocks - 1) * BLOCK_COLS
    count = tl.where(lane < width, whole, whole - last)

    total = reduce_tile(count, CHANNELS_LAST)
    filled = count > 0
    slot_mean = sum1 / tl.where(filled, count, 1.0)
    sum2 = sum2 - sum1 * slot_mean
    slot_mean = tl.where(filled, first - pivot_tile + slot_mean, 0.0)
    mean = reduce_tile(count * slot_mean, CHANNELS_LAST) / tl.maximum(total, 1.0)
    deviation = slot_mean - (mean[None, :] if CHANNELS_LAST else mean)
    m2 = reduce_tile(sum2 + count * deviation * deviation, CHANNELS_LAST)

    store_partial(partial, pivot, 0, chunk, chunks, group, C, CHANNELS_LAST, BLOCK_COLS)
    store_partial(partial, mean, 1, chunk, chunks, group, C, CHANNELS_LAST, BLOCK_COLS)
    store_partial(partial, m2, 2, chunk, chunks, group, C, CHANNELS_LAST, BLOCK_COLS)
    store_partial(partial, total, 3, chunk, chunks, group, C, CHANNELS_LAST, BLOCK_COLS)


@triton.jit
def channel_value(vector, group, C, CHANNELS_LAST: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Per-channel values of this program, broadcastable to its tile."""
    if CHANNELS_LAST:
        c = group * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        return tl.load(vector + c, c < C, 0.0)
    else:
        return tl.load(vector + group)


@triton.jit
def bn_bwd_partial_kernel(
    dout, x, weight, bias, residual, mask, mean, rstd, partial, blocks, lines, lines_per_chunk, chunks, groups,
    C, S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, WHOLE_BYTES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, LAYOUT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_LINES: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """partial (2, chunks, C): sum of dz and of dz * (x - mean), dz = dout * act'(z)."""
    group = program_index(WIDE) % groups
    chunk = program_index(WIDE) // groups
    acc: tl.constexpr = partial.dtype.element_ty
    dtype: tl.constexpr = dout.dtype.element_ty
    center = channel_value(mean, group, C, CHANNELS_LAST, BLOCK_COLS)
    scale = channel_value(rstd, group, C, CHANNELS_LAST, BLOCK_COLS)
    if weight is not None:
        scale *= channel_value(weight, group, C, CHANNELS_LAST, BLOCK_COLS).to(acc)
    shift = 0.0
    if bias is not None:
        shift = channel_value(bias, group, C, CHANNELS_LAST, BLOCK_COLS).to(acc)
    start = chunk * lines_per_chunk
    stop = tl.minimum(start + lines_per_chunk, lines)
    line = start + tl.arange(0, BLOCK_LINES)[:, None]
    lane = tl.arange(0, BLOCK_COLS)[None, :]
    sum1 = tl.zeros([BLOCK_LINES, BLOCK_COLS], acc)
    sum2 = tl.zeros([BLOCK_LINES, BLOCK_COLS], acc)
    for _ in tl.range(start, stop, BLOCK_LINES, num_stages=3):
        index, at, valid = line_indices(
            line, lane, stop, group, blocks, C, S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w,
            CHANNELS_LAST, LAYOUT, BLOCK_COLS,
        )  # fmt: skip
        dz = tl.load(dout + index, valid, 0.0).to(acc)
        centered = tl.load(x + at, valid, 0.0).to(acc) - center
        if mask is not None:
            if WHOLE_BYTES:  # rows are whole bytes: load each byte once
                first_of_8 = tl.arange(0, BLOCK_COLS // 8)[None, :] * 8
                index, _, byte_valid = line_indices(
                    line, first_of_8, stop, group, blocks, C, S, H, W, stride_n, stride_c, stride_d, stride_h, stride_w,
                    CHANNELS_LAST, DENSE, BLOCK_COLS,
                )  # fmt: skip
                positive = unpack_bits(tl.load(mask + index // 8, byte_valid, 0), BLOCK_LINES, BLOCK_COLS)
            else:
                byte = tl.load(mask + index // 8, valid, 0).to(tl.int32)
                positive = ((byte >> (index % 8).to(tl.int32)) & 1) != 0
            dz = masked_bwd(dz, positive, ACTIVATION, SLOPE)
        elif ACTIVATION:
            z = centered * scale + shift
            if residual is not None:
                z += tl.load(residual + index, valid, 0.0).to(acc)
            dz = tl.where(valid, activate_bwd(dz, z.to(dtype).to(acc), ACTIVATION, SLOPE), 0.0)
        sum1 += dz
        sum2 += dz * centered
        line += BLOCK_LINES
    store_partial(partial, reduce_tile(sum1, CHANNELS_LAST), 0, chunk, chunks, group, C, CHANNELS_LAST, BLOCK_COLS)
    store_partial(partial, reduce_tile(sum2, CHANNELS_LAST), 1, chunk, chunks, group, C, CHANNELS_LAST, BLOCK_COLS)
