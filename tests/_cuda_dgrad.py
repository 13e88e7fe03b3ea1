"""Runs the shipped launcher of a convolution's input gradient on the PTX simulator (tests/_cuda_launch.py)."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import _cuda_launch as cuda
import torch
from _cuda_conv import channels_last
from ptxsim import Headers, Report
from torch import Tensor


@functools.cache
def headers() -> Headers:
    """The structs of the launcher's header."""
    return Headers(cuda.CSRC / "ops" / "conv_bn_act" / "conv_bn_act_dgrad.h", cuda.CSRC)


def conv_dgrad(
    dout: Tensor, weight: Tensor, size: tuple[int, int], padding: list[int], dilation: list[int], *,
    added: Tensor | None = None, added_mask: Tensor | None = None, added_activation: int = 0, added_slope: float = 0.1,
    step: int = 1, bn: dict[str, Tensor | None] | None = None, mask: Tensor | None = None, activation: int = 0,
    slope: float = 0.1, tile: str = "k64x64", options: dict[str, int] | None = None, refusal: int = 0, **more: Any,
) -> tuple[Tensor | None, Tensor | None, list[Report]]:  # fmt: skip
    """``(dx, sums (parts, 2 or 3, C) or None, reports)`` of ``y = conv(x)`` with ``x.shape[2:] == size``, stride 1.

    ``bn``: y, mean, rstd, weight, bias of the BatchNorm in front; sums are taken if it is given; other, other_mean: of another
    one that was added. ``more``: members of the nested ConvBnActFwdParams that replace those of the call. With ``refusal``: the
    launcher must give this reason and launch nothing.
    """
    n, k, height, width = dout.shape
    channels, (kh, kw) = weight.shape[1], weight.shape[2:]
    out = channels_last(torch.empty(n, channels, *size, dtype=dout.dtype))
    turned = torch.empty(weight.numel(), dtype=weight.dtype)
    with cuda.library().session(**(options or {})) as session:
        launch = cuda.Launch("conv_bn_act", session, "dgrad")
        conv = {
            "dtype": cuda.DTYPES[dout.dtype], "tile": tile, "slices": 1, "batch": n, "channels": k, "height": height,
            "width": width, "channels_out": channels, "kernel_h": kh, "kernel_w": kw, "height_out": size[0],
            "width_out": size[1], "pad_h": dilation[0] * (kh - 1) - padding[0], "pad_w": dilation[1] * (kw - 1) - padding[1],
            "dilation_h": dilation[0], "dilation_w": dilation[1], "x": launch.read(dout, "dout"),
            "x_stride_n": dout.stride(0), "x_stride_h": dout.stride(2), "x_stride_w": dout.stride(3),
            "weight": launch.pointer(turned, "turned", scratch=True), "residual": launch.read(added, "added"),
            "out": launch.pointer(out, "dx", output=True), **more,
        }  # fmt: skip
        vectors = {} if bn is None else {name: launch.channels(bn[name], name) for name in ("mean", "rstd")}
        if bn is not None:
            vectors |= {f"bn_{name}": launch.channels(bn[name], f"bn_{name}") for name in ("weight", "bias")}
            if bn.get("other") is not None:
                vectors |= {name: launch.read(bn[name], name) for name in ("other", "other_mean")}
        params = headers().make(
            launch.struct, lambda value: value, conv=conv, filter=launch.read(weight, "weight"),
            **{f"filter_stride_{name}": s for name, s in zip(("out", "in", "h", "w"), weight.stride(), strict=True)},
            residual_mask=launch.read(added_mask, "added_mask"), residual_activation=added_activation,
            residual_slope=added_slope, residual_step=step, y=None if bn is None else launch.read(bn["y"], "y"),
            mask=launch.read(mask, "mask"), activation=activation, negative_slope=slope, **vectors,
        )  # fmt: skip
        sums = None
        if bn is not None:
            parts = session.call("conv_bn_act_parts", params.conv, restype=ctypes.c_int64)
            sums = torch.empty(parts, 2 if bn.get("other") is None else 3, channels)
            params.sums = launch.pointer(sums, "sums", output=True)
        assert session.call("conv_bn_act_dgrad_refusal", params) == refusal
        if refusal:
            assert session.call("launch_conv_bn_act_dgrad", params, None) != 0
            return None, None, session.reports
        return out, sums, launch.run(params)
