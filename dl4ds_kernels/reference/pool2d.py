"""References of the poolings, tap by tap: every window's pixels side by side, reduced in the order of the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as TF
from torch import Tensor

Pair = Sequence[int]


def _size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    out = -(-room // stride) + 1 if ceil_mode else room // stride + 1
    # With ceil_mode a last window that would start in the padding behind the map is left out.
    return out - 1 if ceil_mode and (out - 1) * stride >= size + padding else out


def _taps(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool, fill: float) -> list[Tensor]:
    """(N, C, H_out, W_out) for every tap; ``fill`` outside of the map."""
    outs = [_size(x.shape[2 + d], kernel[d], stride[d], padding[d], dilation[d], ceil_mode) for d in range(2)]
    needed = [(outs[d] - 1) * stride[d] + dilation[d] * (kernel[d] - 1) + 1 for d in range(2)]
    behind = [max(0, needed[d] - x.shape[2 + d] - padding[d]) for d in range(2)]
    wide = TF.pad(x, (padding[1], behind[1], padding[0], behind[0]), value=fill)
    return [
        wide[:, :, i * dilation[0] :, j * dilation[1] :][:, :, :: stride[0], :: stride[1]][:, :, : outs[0], : outs[1]]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]


def max_pool2d(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair = (0, 0), dilation: Pair = (1, 1), ceil_mode: bool = False
) -> Tensor:
    """Largest value of each window of (N, C, H, W); a NaN beats everything."""
    out, *others = _taps(x, kernel, stride, padding, dilation, ceil_mode, float("-inf"))
    for tap in others:
        out = torch.where((tap > out) | tap.isnan(), tap, out)
    return out


def avg_pool2d(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair = (0, 0), ceil_mode: bool = False, count_include_pad: bool = True,
    divisor: int = 0,
) -> Tensor:  # fmt: skip
    """Mean of each window; ``divisor`` replaces the number of taps, which counts the padding if ``count_include_pad``."""
    total = sum(_taps(x, kernel, stride, padding, (1, 1), ceil_mode, 0.0))
    if divisor:
        return total / divisor
    ones = torch.ones_like(x[:1, :1])
    inside = (0, 0)
    if count_include_pad:
        ones, inside = TF.pad(ones, (padding[1], padding[1], padding[0], padding[0]), value=1.0), padding
    counted = sum(_taps(ones, kernel, stride, [p - i for p, i in zip(padding, inside, strict=True)], (1, 1), ceil_mode, 0.0))
    return total / counted[:, :, : total.shape[2], : total.shape[3]]


def global_avg_pool2d(x: Tensor) -> Tensor:
    """(N, C, 1, 1): the mean of every map."""
    return x.mean((2, 3), keepdim=True)
