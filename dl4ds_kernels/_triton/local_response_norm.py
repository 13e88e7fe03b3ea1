"""``local_response_norm`` in Triton: flat over dense memory, a window of channels around every element.

Neighbouring channels are one element apart in channels_last and one plane apart otherwise; all taps but the first reach come
from the cache. The gradient takes two kernels: the first leaves what each channel hands to its neighbours in a workspace, the
second gathers it. No atomics: same bits on every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._layout import accumulate_dtype, suggested_format
from . import _common
from ._common import check
from ._device import program_index
from ._windows import in_format

BLOCK = 1024


@triton.jit
def window_sum(
    values, index, channel, valid, step, C, FIRST: tl.constexpr, LAST: tl.constexpr, SQUARE: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The sum of values, or of their squares, over the channels from channel + FIRST to channel + LAST."""
    total = tl.zeros_like(index).to(ACC)
    for shift in range(FIRST, LAST + 1):
        inside = valid & (channel + shift >= 0) & (channel + shift < C)
        value = tl.load(values + index + shift * step, inside, 0.0).to(ACC)
        total += value * value if SQUARE else value
    return total


@triton.jit
def power_of(s, BETA: tl.constexpr):
    """s^BETA; of the usual exponents by square roots rounded to nearest, of others in fp64 by the library's logarithm."""
    if BETA == 1.0:
        return s
    elif BETA == 0.5 or BETA == 0.75:
        root = root_of(s)
        return root if BETA == 0.5 else root * root_of(root)
    else:
        return tl.exp2(BETA * tl.log2(s.to(tl.float64))).to(s.dtype)


@triton.jit
def root_of(s):
    if s.dtype == tl.float64:
        return tl.sqrt(s)
    else:
        return tl.sqrt_rn(s)


@triton.jit
def lrn_kernel(
    x, out, numel, step, C, SCALE: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x / (K + SCALE * window sum of squares)^BETA."""
    index = program_index(WIDE) * BLOCK + tl.arange(0, BLOCK)
    valid, channel = index < numel, (index // step) % C
    s = K + SCALE * window_sum(x, index, channel, valid, step, C, FIRST, LAST, True, ACC)
    value = tl.load(x + index, valid, 0.0).to(ACC)
    tl.store(out + index, (value / power_of(s, BETA)).to(out.dtype.element_ty), valid)


@triton.jit
def lrn_bwd_ratio_kernel(
    dout, x, direct, through, numel, step, C, SCALE: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """direct = dout / s^BETA, through = direct * x / s."""
    index = program_index(WIDE) * BLOCK + tl.arange(0, BLOCK)
    valid, channel = index < numel, (index // step) % C
    s = K + SCALE * window_sum(x, index, channel, valid, step, C, FIRST, LAST, True, ACC)
    own = tl.load(dout + index, valid, 0.0).to(ACC) / power_of(s, BETA)
    tl.store(direct + index, own, valid)
    tl.store(through + index, own * tl.load(x + index, valid, 0.0).to(ACC) / s, valid)


@triton.jit
def lrn_bwd_gather_kernel(
    x, direct, through, dx, numel, step, C, SLOPE: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = direct - SLOPE * x * (through of the channels whose windows hold this one)."""
    index = program_index(WIDE) * BLOCK + tl.arange(0, BLOCK)
    valid, channel = index < numel, (index // step) % C
    total = window_sum(through, index, channel, valid, step, C, FIRST, LAST, False, ACC)
    value = tl.load(x + index, valid, 0.0).to(ACC)
    dz = tl.load(direct + index, valid, 0.0) - SLOPE * value * total
    tl.store(dx + index, dz.to(dx.dtype.element_ty), valid)


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """``x / (k + alpha / size * window sum)^beta``, laid out as ``x`` suggests."""
    _check("local_response_norm", x, size)
    memory_format = suggested_format(x)
    out = torch.empty_like(x, memory_format=memory_format)
    if out.numel():
        scalars = {"SCALE": alpha / size, "BETA": float(beta), "K": float(k)}
        _launch(lrn_kernel, x, size, {"x": in_format(x, memory_format), "out": out}, **scalars)
    return out


def local_response_norm_bwd(dout: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """``dx``, laid out as ``x`` suggests."""
    _check("local_response_norm_bwd", x, size)
    _common.check_like("local_response_norm_bwd", x, dout=dout)
    memory_format = suggested_format(x)
    dx = torch.empty_like(x, memory_format=memory_format)
    if dx.numel():
        dense, dout = in_format(x, memory_format), in_format(dout, memory_format)
        direct, through = (torch.empty_like(dx, dtype=accumulate_dtype(x)) for _ in range(2))
        work = {"direct": direct, "through": through}
        scalars = {"SCALE": alpha / size, "BETA": float(beta), "K": float(k)}
        _launch(lrn_bwd_ratio_kernel, x, size, {"dout": dout, "x": dense, **work}, **scalars)
        slope = {"SLOPE": 2.0 * alpha / size * beta}
        _launch(lrn_bwd_gather_kernel, x, size, {"x": dense, **work, "dx": dx}, mirrored=True, **slope)
    return dx


def _check(op: str, x: Tensor, size: int) -> None:
    check(3 <= x.dim() <= 5, op, "x", "3 to 5 dimensions (N, C, …)", tuple(x.shape))
    check(x.dtype in _common.TRITON_DTYPE, op, "x", "dtype float16, bfloat16, float32 or float64", x.dtype)
    check(size >= 1, op, "size", "a positive number", size)


def _launch(kernel: Any, x: Tensor, size: int, tensors: dict[str, Tensor], mirrored: bool = False, **scalars: float) -> None:
    """One element a lane; ``mirrored``: the window of the channels whose windows hold this one."""
    channels = x.shape[1]
    before, after = min(size // 2, channels), min((size - 1) // 2, channels)
    if mirrored:
        before, after = after, before
    channels_last = suggested_format(x) != torch.contiguous_format
    with _common.device_of(x):
        _common.launch(
            kernel,
            triton.cdiv(x.numel(), BLOCK),
            **tensors,
            **scalars,
            numel=x.numel(),
            step=1 if channels_last else x[0, 0].numel(),
            C=channels,
            FIRST=-before,
            LAST=after,
            ACC=_common.accumulator(x),
            WIDE=_common.is_wide(2 * x.numel()),
            BLOCK=BLOCK,
            num_warps=4,
        )
