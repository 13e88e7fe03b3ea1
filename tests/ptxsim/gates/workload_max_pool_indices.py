"""Calls of max_pool_indices, max_unpool and their gradients: ties, NaN, both layouts, tails, memory off 16-byte boundaries."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from .limits import Limits
from .workload import Case, Results, Truth, random
from .workload_bn_act import laid_out
from .workload_upsample_add import sweep

LIMITS = [
    Limits("max_pool_kernel", "triton", ("x", "out", "where")),
    Limits("max_unpool_kernel", "triton", ("y", "where", "out")),
    Limits("max_gather_kernel", "triton", ("dout", "where", "dy")),
]
WRITTEN = {"max_pool_kernel": {"out", "where"}, "max_unpool_kernel": {"out"}, "max_gather_kernel": {"dy"}}
# The small map (N, C, H, W), layout, memory off a 16-byte boundary; tiles as in workload_upsample_add.py.
SHAPES = [
    ((2, 7, 3, 5), "nchw", False), ((2, 7, 3, 5), "nhwc", True), ((1, 16, 5, 9), "nhwc", False),
    ((3, 5, 1, 1), "nchw", True), ((1, 3, 4, 16), "nchw", False), ((1, 2, 3, 517), "nchw", False),
    ((1, 70, 3, 19), "nhwc", False), ((2, 8, 3, 5), "nhwc+slice", False),
    ((1, 16, 3, 32), "nchw", False), ((1, 80, 16, 16), "nhwc", False),  # compiled like the even ones
]  # fmt: skip
EVEN = [((4, 64, 16, 32), layout, False) for layout in ("nchw", "nhwc")]


def triton(case: Case) -> Results:
    """The call through the host functions of the Triton backend; the gradient of the pooling is that of max_unpool's call."""
    from dl4ds_kernels._triton import max_pool_indices as op

    t = case.arguments
    if t["call"] == "pool":
        return dict(zip(("out", "where"), op.max_pool_indices(t["x"]), strict=True))
    if t["call"] == "unpool":
        function = op.max_unpool if case.way == "fwd" else op.max_pool_indices_bwd
        return {"out": function(t["y"], t["where"])}
    return {"dy": op.max_unpool_bwd(t["dout"], t["where"])}


def pool_truth(t: dict[str, Any]) -> Truth:
    """out and where: torch's, whose index is one into the plane."""
    x = t["x"].double()
    out, index = TF.max_pool2d(x, 2, 2, return_indices=True)
    width = x.shape[3]
    return {"out": (out, 0.0), "where": ((index // width % 2 * 2 + index % width % 2).to(torch.uint8), 0.0)}


def unpool_truth(t: dict[str, Any]) -> Truth:
    """out: y at its place, zero beside it."""
    y, where = t["y"].double(), t["where"]
    out = torch.zeros(*y.shape[:2], 2 * y.shape[2], 2 * y.shape[3], dtype=torch.float64)
    for place in range(4):
        out[:, :, place // 2 :: 2, place % 2 :: 2] = torch.where(where == place, y, 0.0)
    return {"out": (out, 0.0)}


def gather_truth(t: dict[str, Any]) -> Truth:
    """dy: dout at the place."""
    corners = torch.stack([t["dout"].double()[:, :, i::2, j::2] for i in range(2) for j in range(2)])
    return {"dy": (corners.gather(0, t["where"].long()[None])[0], 0.0)}


def with_ties(values: Tensor) -> Tensor:
    """Few different values, so that equal maxima are common; and both zeros, infinities and single NaN."""
    values = values.round()
    for i, special in enumerate((float("nan"), float("inf"), -float("inf"), -0.0)):
        values.view(-1)[11 + 2 * i :: 31] = special
    return values


def cases(dtype: torch.dtype) -> list[Case]:
    """All calls of one dtype."""
    found: list[Case] = []
    for turn, (shape, layout, single) in enumerate((*SHAPES, *sweep(dtype), *EVEN)):
        even = (shape, layout, single) in EVEN
        n, c, h, w = shape
        y = laid_out(random(*shape, dtype=dtype, seed=1, nan=not even), layout, single)
        x, dout = (random(n, c, 2 * h, 2 * w, dtype=dtype, seed=s, nan=s == 3 and not even) for s in (2, 3))
        x, dout = (laid_out(t, layout, single) for t in (x if even else with_ties(x), dout))
        where = torch.randint(0, 4, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
        order = torch.channels_last if layout.startswith("nhwc") else torch.contiguous_format
        where = where.contiguous(memory_format=order)
        label = f"{'x'.join(map(str, shape))}-{layout}{'-single' * single}"
        for way, arguments, truth in (
            ("fwd", {"call": "pool", "x": x}, pool_truth),
            (("fwd", "bwd")[turn % 2], {"call": "unpool", "y": y, "where": where}, unpool_truth),
            ("bwd", {"call": "gather", "dout": dout, "where": where}, gather_truth),
        ):
            name = f"{arguments['call']}-{way}-{label}"
            found.append(Case("max_pool_indices", way, name, arguments, functools.partial(truth, arguments), even=even))
    return found
