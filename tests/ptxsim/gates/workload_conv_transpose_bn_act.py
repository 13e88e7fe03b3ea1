"""Calls of conv_transpose_bn_act: 2x2 with stride 2, odd sizes, both layouts, every tile size."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .limits import Limits
from .truth_bn_act import EPS, per_channel, rstd_of
from .workload import SLOPE, Case, Results, Truth, activation, random, size_of
from .workload_bn_act import laid_out

# x (N, C, H, W), output channels, layout, BatchNorm or none. Tiles are 64 pixels by 16, 32 or 64 output channels and 16 or 32
# input channels a step: less than one, and several with tails in each direction.
CALLS = [
    ((2, 16, 3, 7), 24, "nhwc", True), ((1, 33, 5, 3), 17, "nchw", True), ((2, 5, 3, 5), 3, "nhwc", False),
    ((2, 17, 7, 9), 38, "nchw", True), ((1, 24, 3, 5), 40, "nhwc+slice", False), ((2, 8, 4, 3), 70, "nchw+slice", True),
    ((3, 70, 5, 9), 88, "nhwc", True), ((1, 40, 11, 13), 136, "nchw", False),
]  # fmt: skip
# Of one compiled form: SiLU in channels_last with tails of pixels, of both kinds of channels, and with none.
SWEEP = [
    ((n, c, h, w), k, "nhwc", True)
    for n, c, k, h, w in (
        (2, 33, 33, 5, 13),
        (2, 17, 135, 7, 9),
        (2, 47, 31, 8, 8),
        (3, 63, 63, 9, 7),
        (2, 65, 17, 3, 43),
        (1, 34, 66, 11, 6),
    )
]
EVEN = [((1, 64, 16, 16), 64, layout, True) for layout in ("nchw", "nhwc")]
# Large enough for the tiles of 128 pixels, by 16 and by 128 output channels. (In fp32 tiles do not grow.)
LARGE = {
    torch.float16: [((1, 16, 128, 128), 16, "nhwc", True)], torch.bfloat16: [((1, 16, 96, 96), 256, "nhwc", True)],
}  # fmt: skip
LIMITS = [
    Limits(
        "conv_transpose_bn_act_kernel", "triton", ("x", "out"), small=0.3, store=0.5, waves=2.7, again=3.2, instructions=290,
        registers=255, wide_stores=False, mma=True,
        note="bound by arithmetic; in NCHW a tap's outputs lie two elements apart, so that half of each stored sector is "
        "another program's; the four taps read x one after another, from the L2 cache",
    ),
]  # fmt: skip
WRITTEN = {"conv_transpose_bn_act_kernel": {"out"}}
CAPABILITIES = (80, 90)  # for sm_90 Triton emits wgmma


def triton(case: Case) -> Results:
    """The call through the host function of the Triton backend, with products in fp32 (TF32: tests/_triton_offline.py)."""
    from dl4ds_kernels._triton import conv_transpose_bn_act

    t = case.arguments
    names = ("x", "weight", "bias", "running_mean", "running_var", "bn_weight", "bn_bias")
    last = (t["eps"], False, t["activation"], SLOPE)
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "ieee"
    try:
        out = conv_transpose_bn_act.conv_transpose_bn_act(*(t[n] for n in names), [2, 2], [0, 0], [0, 0], [1, 1], 1, *last)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    return {"out": out}


def truth(t: dict[str, Any]) -> Truth:
    """out."""
    x, weight = t["x"].double(), t["weight"].double()
    y = torch.conv_transpose2d(x, weight, None, 2) + per_channel(t["bias"], torch.empty(1, 1, 1, 1))
    size = size_of(torch.conv_transpose2d(x.abs(), weight.abs(), None, 2)) + size_of(t["bias"])
    if t["running_mean"] is not None:
        scale = rstd_of(t["running_var"].double(), False) * t["bn_weight"].double()
        y = (y - per_channel(t["running_mean"], y)) * per_channel(scale, y) + per_channel(t["bn_bias"], y)
        size = (size + size_of(t["running_mean"])) * size_of(scale) + size_of(t["bn_bias"])
    return {"out": (activation(y, t["activation"]), size)}


def cases(dtype: torch.dtype) -> list[Case]:
    """All calls of one dtype (fp64 goes to the library's convolution)."""
    found: list[Case] = []
    if dtype == torch.float64:
        return found
    for i, geometry in enumerate((*CALLS, *EVEN, *LARGE.get(dtype, []), *SWEEP)):
        shape, k, layout, norm = geometry
        even, code = geometry in EVEN or geometry in LARGE.get(dtype, []), 4 if geometry in SWEEP else i % 6
        x = random(*shape, dtype=dtype, seed=1)
        if not even:
            x[-1, -1, -1, -1] = float("nan")
        weight = random(shape[1], k, 2, 2, dtype=torch.float32, seed=2) / shape[1] ** 0.5
        arguments: dict[str, Any] = {
            "x": laid_out(x, layout, False), "weight": weight.to(dtype), "eps": EPS, "activation": code,
            "bias": random(k, dtype=dtype, seed=3),
        }  # fmt: skip
        names = ("running_mean", "bn_weight", "bn_bias")
        arguments |= {n: random(k, dtype=torch.float32, seed=4 + j) if norm else None for j, n in enumerate(names)}
        arguments["running_var"] = random(k, dtype=torch.float32, seed=7).abs() + 0.5 if norm else None
        label = f"fwd-{'x'.join(map(str, shape))}-{k}-{layout}-{'norm' if norm else 'plain'}-act{code}"
        call = functools.partial(truth, arguments)
        found.append(Case("conv_transpose_bn_act", "fwd", label, arguments, call, even=even))
    return found
