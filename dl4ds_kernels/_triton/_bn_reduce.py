"""The two reductions of BatchNorm over everything but channels: first pass, one partial result per chunk and channel.

A chunk is a range of "lines". channels_last: a line is a pixel (a row of the matrix) and a program owns BLOCK_COLS channels.
Otherwise: a line is one of the ``blocks`` pieces of BLOCK_COLS pixels of a plane, and a program owns one channel.
The number of chunks depends on the shape alone, so the order of the sums, and with it every bit, does too.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ._common import Matrix, block_of
from ._device import (
    DENSE,
    activate_bwd,
    masked_bwd,
    offset_of,
    program_index,
    unpack_bits,
)

WARPS = 1728  # of a reduction over a large tensor: 16 on each of an A100's multiprocessors, which then all run at once


class Tile(NamedTuple):
    """What a program of a reduction reads at a time in channels_last.

    columns: most channels. warp: as many as a warp gets. steps: fewest tiles that a program adds up; they keep what it leaves
    for the final reduction below 2 % of what it reads, however small the tensor.
    """

    columns: int
    warp: int
    steps: int


# Statistics leave 12 bytes a chunk and channel, and of each of its lines read 2 (at 16 bits): few columns, many lines. The
# gradient's sums leave 8 and read 4 to 6; a warp for every 32 channels loads their vectors, one value a thread. (Vectors of
# fewer values than there are threads the compiler lets every warp load for itself, in the pieces that its elements need.)
# With a mask, of which a line of 128 channels has 16 bytes, narrower tiles would read more of its sectors than they need.
STATS, SUMS, MASKED_SUMS = Tile(32, 8, 5), Tile(64, 32, 7), Tile(128, 32, 7)


def reduce_launch_config(matrix: Matrix, tile: Tile) -> dict[str, Any]:
    """Blocks, lines per chunk and number of chunks for a reduction over ``matrix``.

    Every slot of a tile sums one value a step; up to 128 steps a chunk keep its fp32 sums short.
    """
    if matrix.channels_last:
        least = tile.steps
        block_cols = min(max(16, triton.next_power_of_2(matrix.channels)), max(32, block_of(matrix.channels, tile.columns)))
        groups, blocks, warps = triton.cdiv(matrix.channels, block_cols), 1, max(1, block_cols // tile.warp)
        lines = matrix.batch * matrix.spatial
    else:
        least = 4
        block_cols = min(1024, max(16, triton.next_power_of_2(matrix.spatial)))
        groups, blocks, warps = matrix.channels, triton.cdiv(matrix.spatial, block_cols), 4
        lines = matrix.batch * blocks
    block_lines = min(512 * warps // block_cols, triton.next_power_of_2(lines))
    warps = warps if block_lines * block_cols >= 256 * warps else 1
    tiles = triton.cdiv(lines, block_lines)
    steps = min(128, max(least, triton.cdiv(tiles * groups * warps, WARPS)))
    return {
        "blocks": blocks,
        "lines": lines,
        "lines_per_chunk": steps * block_lines,
        "chunks": triton.cdiv(tiles, steps),
        "groups": groups,
        "BLOCK_LINES": block_lines,
        "BLOCK_COLS": block_cols,
        "num_warps": warps,
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
    """partial (3, chunks, C): pivot, mean - pivot, sum of squared deviations from the mean; behind it each chunk's count.

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
    counted = (stop - start).to(acc) if CHANNELS_LAST else total  # the same for all channels: one program's word is enough
    tl.store(partial + 3 * chunks * C + chunk, counted, group == 0)


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
