"""Contracts of the poolings ``max_pool2d``, ``avg_pool2d`` and ``global_avg_pool2d``: fp32, channels_last out, no gradient.

They are inference's (training takes stock torch, which keeps the places of the maxima), but for a stem's maxima, whose gradient
``max_pool2d_bwd`` finds the places again (bn_act_max_pool.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._define import define_op

# Plain numbers instead of lists, which cost a microsecond each on their way to C++.
_GEOMETRY = "int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w"


def _channels_last(t: Tensor) -> Tensor:
    return t.to(memory_format=torch.channels_last)


def _fake_max(x: Tensor, *args: Any) -> Tensor:
    return _channels_last(torch.max_pool2d(x, args[:2], args[2:4], args[4:6], args[6:8], args[8]))


def _fake_max_bwd(dout: Tensor, x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _fake_avg(x: Tensor, *args: Any) -> Tensor:
    pairs = args[:2], args[2:4], args[4:6]
    return _channels_last(torch.ops.aten.avg_pool2d(x, *pairs, args[6], args[7], args[8] or None))


def _fake_global(x: Tensor) -> Tensor:
    return _channels_last(x.new_empty((*x.shape[:2], 1, 1)))


define_op(
    "max_pool2d",
    f"(Tensor x, {_GEOMETRY}, int dilation_h, int dilation_w, bool ceil_mode) -> Tensor",
    fake=_fake_max,
    stem="pool2d",
    triton=False,
)
define_op(
    "max_pool2d_bwd",
    f"(Tensor dout, Tensor x, {_GEOMETRY}, int dilation_h, int dilation_w, bool ceil_mode) -> Tensor",
    fake=_fake_max_bwd,
    stem="pool2d",
    triton=False,
)
# divisor = 0: the number of taps of the window (with or without the padding)
define_op(
    "avg_pool2d",
    f"(Tensor x, {_GEOMETRY}, bool ceil_mode, bool count_include_pad, int divisor) -> Tensor",
    fake=_fake_avg,
    stem="pool2d",
    triton=False,
)
define_op("global_avg_pool2d", "(Tensor x) -> Tensor", fake=_fake_global, stem="pool2d", triton=False)
