"""Calls of local_response_norm: windows of odd, even and more than all channels, every form of the power, both layouts."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from .limits import Limits
from .workload import Case, Results, Truth, random, size_of
from .workload_bn_act import laid_out

_CACHED = "taps of the window are read one by one and come from the L1 cache; channels_last: strided by a thread's vector"
_WORKSPACE = "what goes between the two kernels is kept in fp32: of 16-bit tensors twice their bytes"
LIMITS = [
    Limits("lrn_kernel", "triton", ("x", "out"), load=0.14, again=22.0, instructions=290, note=_CACHED),
    Limits(
        "lrn_bwd_ratio_kernel", "triton", ("dout", "x"), small=2.05, load=0.16, again=8.0, note=f"{_CACHED}; {_WORKSPACE}",
    ),
    Limits(
        "lrn_bwd_gather_kernel", "triton", ("x", "dx"), small=2.05, load=0.15, again=15.0, note=f"{_CACHED}; {_WORKSPACE}",
    ),
]  # fmt: skip
WRITTEN = {"lrn_kernel": {"out"}, "lrn_bwd_ratio_kernel": {"direct", "through"}, "lrn_bwd_gather_kernel": {"dx"}}
PAPER = (5, 5e-4, 0.75, 2.0)
# x, layout, memory off a 16-byte boundary, (size, alpha, beta, k). A program makes 1024 elements.
CALLS = [
    ((2, 7, 3, 5), "nchw", False, PAPER), ((2, 7, 3, 5), "nhwc", False, (4, 0.5, 0.75, 1.0)),
    ((1, 96, 5, 9), "nhwc", False, PAPER), ((1, 20, 8, 16), "nchw", True, (5, 1.0, 0.5, 1.0)),
    ((1, 5, 3, 4), "nhwc", True, (3, 0.3, 1.0, 1.0)), ((2, 8, 3, 5), "nhwc+slice", False, (20, 0.5, 0.6, 1.5)),
    ((2, 8, 3, 5), "nchw+slice", False, (1, 0.5, 2.0, 1.5)), ((1, 3, 37), "nchw", False, (2, 0.5, 0.75, 1.0)),
]  # fmt: skip
EVEN = [((4, 64, 8, 16), layout, False, PAPER) for layout in ("nchw", "nhwc")]


def triton(case: Case) -> Results:
    """The call through the host functions of the Triton backend."""
    from dl4ds_kernels._triton import local_response_norm as op

    t = case.arguments
    if case.way == "fwd":
        return {"out": op.local_response_norm(t["x"], *t["settings"])}
    return {"dx": op.local_response_norm_bwd(t["dout"], t["x"], *t["settings"])}


def over_window(values: Tensor, before: int, after: int) -> Tensor:
    """Sums over the channels from `before` below to `after` above each."""
    padded = TF.pad(values.transpose(1, -1), (before, after)).transpose(1, -1)
    return sum(padded[:, i : i + values.shape[1]] for i in range(before + after + 1))


def forward_truth(t: dict[str, Any]) -> Truth:
    """out = x / (k + alpha / size * window sum of squares)^beta."""
    size, alpha, beta, k = t["settings"]
    x = t["x"].double()
    out = x / (k + alpha / size * over_window(x * x, size // 2, (size - 1) // 2)) ** beta
    return {"out": (out, (1 + beta) * size_of(out))}


def backward_truth(t: dict[str, Any]) -> Truth:
    """dx: what comes straight through, less what comes through the windows that hold the channel."""
    size, alpha, beta, k = t["settings"]
    x, dout = t["x"].double(), t["dout"].double()
    s = k + alpha / size * over_window(x * x, size // 2, (size - 1) // 2)
    direct = dout / s**beta
    through, slope = direct * x / s, 2 * alpha * beta / size
    dx = direct - slope * x * over_window(through, (size - 1) // 2, size // 2)
    terms = slope * size_of(x) * size_of(over_window(through.nan_to_num(0).abs(), (size - 1) // 2, size // 2))
    return {"dx": (dx, (1 + beta) * (size_of(direct) + terms))}


def cases(dtype: torch.dtype) -> list[Case]:
    """All calls of one dtype."""
    found: list[Case] = []
    for shape, layout, single, settings in (*CALLS, *EVEN):
        even = (shape, layout, single, settings) in EVEN
        x, dout = (random(*shape, dtype=dtype, seed=s) for s in (1, 2))
        if not even:  # one NaN: its window only
            x.view(-1)[x.numel() // 3] = float("nan")
        x, dout = (laid_out(t, layout, single) for t in (x, dout))
        label = f"{'x'.join(map(str, shape))}-{layout}{'-single' * single}-size{settings[0]}-beta{settings[2]}"
        forward, backward = {"x": x, "settings": settings}, {"x": x, "dout": dout, "settings": settings}
        truth = functools.partial(forward_truth, forward)
        found.append(Case("local_response_norm", "fwd", f"fwd-{label}", forward, truth, even=even))
        truth = functools.partial(backward_truth, backward)
        found.append(Case("local_response_norm", "bwd", f"bwd-{label}", backward, truth, even=even))
    return found
