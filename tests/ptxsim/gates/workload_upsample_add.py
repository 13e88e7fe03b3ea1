"""Calls of upsample_add: both layouts, rows of one and of several tiles, one pixel, views, memory off 16-byte boundaries."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from .limits import Limits
from .workload import Case, Results, Truth, random, size_of
from .workload_bn_act import laid_out

LIMITS = [
    Limits("upsample_add_kernel", "triton", ("low", "skip", "out")),
    Limits("upsample_add_bwd_kernel", "triton", ("dout", "dlow")),
]
WRITTEN = {"upsample_add_kernel": {"out"}, "upsample_add_bwd_kernel": {"dlow"}}
# low (N, C, H, W), layout, memory off a 16-byte boundary. Tiles are 64 vectors of 16 bytes of planes and 128 of pixels: rows of
# less than one, of several with a tail, and of whole vectors.
SHAPES = [
    ((2, 7, 3, 5), "nchw", False), ((2, 7, 3, 5), "nhwc", False), ((1, 16, 5, 9), "nhwc", False),
    ((1, 3, 4, 16), "nchw", True), ((3, 5, 1, 1), "nchw", False), ((1, 2, 3, 517), "nchw", False),
    ((1, 70, 3, 19), "nhwc", True), ((2, 8, 3, 5), "nhwc+slice", False),
    ((1, 16, 3, 32), "nchw", False), ((1, 80, 16, 16), "nhwc", False),  # compiled like the even ones
]  # fmt: skip
EVEN = [((4, 64, 16, 32), layout, False) for layout in ("nchw", "nhwc")]


def sweep(dtype: torch.dtype) -> list[tuple[tuple[int, ...], str, bool]]:
    """Planes of one compiled form, whose rows are a tile and a tail that ends at every place of a thread."""
    tile = 64 * 16 // dtype.itemsize
    tails = (*range(9, 16), *range(17, 25), *range(tile // 2 + 1, tile // 2 + 5))
    return [((1, (3, 5, 7, 11)[i % 4], 1, tile + tail), "nchw", False) for i, tail in enumerate(tails)]


def triton(case: Case) -> Results:
    """The call through the host functions of the Triton backend."""
    from dl4ds_kernels._triton import upsample_add

    if case.way == "fwd":
        return {"out": upsample_add.upsample_add(case.arguments["low"], case.arguments["skip"])}
    return {"dlow": upsample_add.upsample_add_bwd(case.arguments["dout"])}


def forward_truth(t: dict[str, Any]) -> Truth:
    """out."""
    low, skip = t["low"].double(), t["skip"].double()
    return {"out": (skip + TF.interpolate(low, scale_factor=2.0, mode="nearest"), size_of(low, skip))}


def backward_truth(t: dict[str, Any]) -> Truth:
    """dlow: the sums over windows."""
    dout = t["dout"].double()
    total: Tensor = sum(dout[:, :, i::2, j::2] for i in range(2) for j in range(2))
    return {"dlow": (total, 4 * size_of(dout))}


def cases(dtype: torch.dtype) -> list[Case]:
    """All calls of one dtype."""
    found: list[Case] = []
    for shape, layout, single in (*SHAPES, *sweep(dtype), *EVEN):
        even = (shape, layout, single) in EVEN
        n, c, h, w = shape
        low = laid_out(random(*shape, dtype=dtype, seed=1, nan=not even), layout, single)
        skip, dout = (
            laid_out(random(n, c, 2 * h, 2 * w, dtype=dtype, seed=s, nan=s == 3 and not even), layout, single) for s in (2, 3)
        )
        label = f"{'x'.join(map(str, shape))}-{layout}{'-single' * single}"
        forward, backward = {"low": low, "skip": skip}, {"dout": dout}
        truth = functools.partial(forward_truth, forward)
        found.append(Case("upsample_add", "fwd", f"fwd-{label}", forward, truth, even=even))
        truth = functools.partial(backward_truth, backward)
        found.append(Case("upsample_add", "bwd", f"bwd-{label}", backward, truth, even=even))
    return found
