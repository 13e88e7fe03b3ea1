"""Calls of conv_bn_act in inference: 1x1 and 3x3, odd sizes, strides, dilation, both layouts, every tile size."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .limits import Limits
from .truth_bn_act import EPS, per_channel, rstd_of
from .workload import SLOPE, Case, Results, Truth, activation, random, size_of

# x (N, C, H, W), output channels, kernel size, stride, padding, dilation; sliced input
GEOMETRIES = [
    ((2, 16, 7, 6), 24, 1, 1, 0, 1, False), ((1, 17, 8, 9), 33, 1, 2, 0, 1, True), ((2, 5, 9, 7), 5, 3, 1, 1, 1, False),
    ((1, 40, 9, 8), 72, 3, 2, 1, 1, False), ((1, 16, 11, 9), 6, 3, 1, 2, 2, True), ((1, 64, 8, 8), 64, 3, 1, 1, 1, False),
    ((2, 48, 8, 16), 16, 1, 1, 0, 1, False),
]  # fmt: skip
# The same compiled forms over several tiles of pixels and output channels, with a NaN in one pixel: by place in GEOMETRIES.
LARGER = {
    0: ((3, 16, 17, 15), 88), 1: ((2, 17, 25, 23), 70), 2: ((3, 5, 13, 11), 37), 3: ((2, 40, 17, 15), 136),
    4: ((2, 16, 19, 13), 38),
}  # fmt: skip
# Large enough for the tiles of 128 pixels.
LARGE = [((1, 16, 128, 128), 64, 1, 1, 0, 1, False), ((1, 16, 96, 96), 256, 1, 1, 0, 1, False)]

LIMITS = [
    Limits(
        "conv_bn_act_kernel", "triton", ("x", "residual", "out"), small=7.0, waves=2.7, again=2.0, instructions=200,
        registers=255, mma=True,
        note="bound by arithmetic; waves 2.56 in fp32 (IEEE, without tensor cores: operands are broadcast from shared memory)",
    ),
]  # fmt: skip
WRITTEN = {"conv_bn_act_kernel": {"out"}}
CAPABILITIES = (80, 90)  # for sm_90 Triton emits wgmma


def triton(case: Case) -> Results:
    """The call through the host function of the Triton backend, with products in fp32 (TF32: tests/_triton_offline.py)."""
    from dl4ds_kernels._triton import conv_bn_act

    t = case.arguments
    names = ("x", "weight", "bias", "running_mean", "running_var", "bn_weight", "bn_bias", "residual")
    geometry = (t["stride"], t["padding"], t["dilation"], 1)
    last = (t["eps"], False, t["activation"], SLOPE)
    before, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "ieee"
    try:
        return {"out": conv_bn_act.conv_bn_act(*(t[n] for n in names), *geometry, *last)}
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def convolution(t: dict[str, Any], absolute: bool = False) -> torch.Tensor:
    x, weight = t["x"].double(), t["weight"].double()
    x, weight = (x.abs(), weight.abs()) if absolute else (x, weight)
    return torch.conv2d(x, weight, None, t["stride"], t["padding"], t["dilation"])


def truth(t: dict[str, Any]) -> Truth:
    """out."""
    y = convolution(t)
    scale = rstd_of(t["running_var"].double(), False) * t["bn_weight"].double()
    z = y + per_channel(t["bias"].double() - t["running_mean"].double(), y)
    z = z * per_channel(scale, y) + per_channel(t["bn_bias"], y)
    size = size_of(convolution(t, True)) * size_of(scale) + size_of(t["bn_bias"])
    if t["residual"] is not None:
        z, size = z + t["residual"].double(), size + size_of(t["residual"])
    return {"out": (activation(z, t["activation"]), size)}


def cases(dtype: torch.dtype) -> list[Case]:
    """All calls of one dtype (fp64 goes to the library's convolution)."""
    found: list[Case] = []
    if dtype == torch.float64:
        return found
    calls = [(i, g, lay) for i, (g, lay) in enumerate((g, lay) for g in (*GEOMETRIES, *LARGE) for lay in ("nhwc", "nchw"))]
    calls += [(i, (*LARGER[i // 2], *g[2:]), lay) for i, g, lay in calls if i // 2 in LARGER]
    for i, geometry, layout in calls:
        shape, k, size, stride, padding, dilation, sliced = geometry
        x = random(*shape, dtype=dtype, seed=1)
        if geometry[:2] in LARGER.values():
            x[-1, -1, -1, -1] = float("nan")
        x = x.contiguous(memory_format=torch.channels_last if layout == "nhwc" else torch.contiguous_format)
        if sliced:
            whole = torch.nn.functional.pad(x, (1, 2, 1, 0), value=float("nan"))
            x = whole[:, :, 1:, 1 : 1 + shape[3]]
        weight = random(k, shape[1], size, size, dtype=torch.float32, seed=2) / (shape[1] * size * size) ** 0.5
        arguments = {
            "x": x, "weight": weight.to(dtype), "stride": [stride] * 2, "padding": [padding] * 2, "dilation": [dilation] * 2,
            "eps": EPS, "activation": i % 6, "negative_slope": 0.1,
            "running_var": random(k, dtype=torch.float32, seed=7).abs() + 0.5,
        }  # fmt: skip
        names = ("bias", "running_mean", "bn_weight", "bn_bias")
        arguments |= {name: random(k, dtype=torch.float32, seed=3 + j) for j, name in enumerate(names)}
        arguments["residual"] = None
        out = convolution(arguments)
        arguments["residual"] = random(*out.shape, dtype=dtype, seed=8) if i % 3 else None
        label = f"fwd-{'x'.join(map(str, shape))}-{k}-{size}x{size}-s{stride}-p{padding}-d{dilation}-{layout}-act{i % 6}"
        call = functools.partial(truth, arguments)
        found.append(Case("conv_bn_act", "fwd", label, arguments, call, even=geometry in LARGE))
    return found
