"""Which algorithms the convolutions of a training step take on the CPU, and why; ops/_conv2d.py runs them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import _extension

LIBRARY = 0
Geometry = tuple[Any, Any, Any, int]  # stride, padding, dilation, groups
_NAMES = {LIBRARY: "oneDNN", 1: "direct", 2: "Winograd F(2x2, 3x3)"}


@lru_cache(maxsize=4096)
def _choose(shape: tuple[int, ...], weight: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
    return _extension.host().conv_train_choose(*shape, weight[0], weight[2:], stride, padding, dilation, groups)


def may_be_ours(x: Tensor) -> bool:
    """Whether our kernels read x: fp32 on the CPU, dense in channels_last and not in both layouts."""
    return (
        type(x) is Tensor  # not under tracing, where sizes may be symbols
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def choose(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, int, int]:
    """Algorithm codes of (forward, gradient of x, gradient of the weight); LIBRARY where our kernels do not apply.

    fp32 on the CPU and x dense in channels_last (whose result is channels_last then, as the library's): everything else, 16-bit
    floats and groups included, is the library's.
    """
    if not may_be_ours(x):
        return LIBRARY, LIBRARY, LIBRARY
    return choose_sizes(x.shape, weight, geometry)


def choose_sizes(shape: tuple[int, ...], weight: Tensor, geometry: Geometry) -> tuple[int, int, int]:
    """The same for an input of this shape, fp32 on the CPU and dense in channels_last."""
    if weight.dtype is not torch.float32 or weight.dim() != 4 or not _extension.status()["_C"].loaded:
        return LIBRARY, LIBRARY, LIBRARY
    return choose_shapes(shape, weight.shape, geometry)


def choose_shapes(shape: tuple[int, ...], weight: tuple[int, ...], geometry: Geometry) -> tuple[int, int, int]:
    """The same where the weight is known to be one of ours."""
    stride, padding, dilation, groups = geometry
    return _choose(tuple(shape), tuple(weight), tuple(stride), tuple(padding), tuple(dilation), groups)


def explain(x: Tensor, weight: Tensor, pairs: list[list[int]], groups: int) -> dict[str, Any]:
    """ "training": the algorithm of each of the three convolutions, and the reason."""
    codes = choose(x, weight, (*pairs, groups))
    passes = ("forward", "gradient of x", "gradient of weight")
    if any(codes):
        reason = "modelled faster than the library at this size, with an error of at most twice stock's"
    elif not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        reason = (
            "ours need fp32, one group (F(2x2): 3x3, stride 1), and would be slower here; "
            "or DL4DS_WINOGRAD=0, DL4DS_TRAIN_GEMM=0"
        )
    else:
        reason = "ours need x dense in channels_last"
    return {"training": {p: _NAMES[code] for p, code in zip(passes, codes, strict=True)}, "training_reason": reason}
