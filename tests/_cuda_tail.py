"""Runs the shipped launcher of a bottleneck block's end in one kernel on the PTX simulator (tests/_cuda_launch.py)."""

from __future__ import annotations

import functools
from typing import Any

import _cuda_launch as cuda
import torch
from _cuda_conv import channels_last, empty_output
from ptxsim import Headers, Report
from torch import Tensor

MIDDLE, CHUNK = 64, 64  # kTailMiddle, kTailChunk
VECTORS = ("bias", "running_mean", "running_var", "bn_weight", "bn_bias")


@functools.cache
def headers() -> Headers:
    return Headers(cuda.CSRC / "ops" / "conv_bn_act" / "conv_bn_act_tail.h", cuda.CSRC)


def sizes(x: Tensor, weight: Tensor, out: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> dict[str, Any]:
    """Sizes and strides of a layer as members of its params."""
    pairs = {"pad": padding, "stride": stride, "dilation": dilation, "kernel": weight.shape[2:]}
    found = {f"{name}_{axis}": pair[i] for name, pair in pairs.items() for i, axis in enumerate("hw")}
    found |= dict(zip(("batch", "channels", "height", "width"), x.shape, strict=True))
    found |= {f"x_stride_{axis}": x.stride(i) for axis, i in (("n", 0), ("h", 2), ("w", 3))}
    return found | {
        "dtype": cuda.DTYPES[x.dtype], "channels_out": out.shape[1], "height_out": out.shape[2], "width_out": out.shape[3],
    }  # fmt: skip


def conv_bn_act_tail(
    x: Tensor, first: dict[str, Any], second: dict[str, Any], residual: Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], *, parts: int = 1, negative_slope: float = 0.1, options: dict[str, int] | None = None,
    refusal: int = 0, **edits: Any,
) -> tuple[Tensor | None, list[Report]]:  # fmt: skip
    """(out, reports). ``first``, ``second``: weight (channels last), VECTORS, activation (a code), eps, eps_std of a layer.

    ``edits``: members of ``second`` in the params that are set last. With ``refusal``: the launcher gives this reason and
    launches nothing; out is None.
    """
    middle = empty_output(x, first["weight"], stride, padding, dilation)
    out = empty_output(middle, second["weight"], [1, 1], [0, 0], [1, 1])
    with cuda.library().session(**(options or {})) as session:
        launch = cuda.Launch("conv_bn_act", session, "fwd")

        def layer(given: dict[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
            vectors = {name: launch.channels(given[name], f"{name} of {shape['channels_out']}") for name in VECTORS}
            vectors["conv_bias"] = vectors.pop("bias")
            return {
                **shape, **vectors, "tile": "k64x64", "slices": 1, "eps": given["eps"], "eps_std": given.get("eps_std", False),
                "activation": given["activation"], "negative_slope": negative_slope,
            }  # fmt: skip

        a = layer(first, sizes(x, first["weight"], middle, stride, padding, dilation))
        a |= {"x": launch.read(x, "x"), "weight": launch.read(first["weight"], "weight")}
        b = layer(second, sizes(middle, second["weight"], out, [1, 1], [0, 0], [1, 1]))
        b |= {"weight": launch.read(second["weight"], "weight2"), "residual": launch.read(residual, "residual")}
        b |= {"out": launch.pointer(out, "out", output=True)} | edits
        params = headers().make("ConvTailParams", lambda value: value, first=a, second=b, parts=parts)
        assert session.call("conv_bn_act_tail_refusal", params) == refusal
        error = session.call("launch_conv_bn_act_tail", params, None)
        if refusal:
            assert error != 0
            return None, session.reports
        assert error == 0, f"launch_conv_bn_act_tail returned {error}"
        assert not session.errors, "\n  ".join(session.errors)
        return out, session.reports


def random_layer(channels: int, k: int, kernel: int, dtype: torch.dtype, activation: int, **more: Any) -> dict[str, Any]:
    """A layer of random numbers; filters that TF32 holds exactly."""
    scale = (channels * kernel * kernel) ** -0.5
    weight = (torch.randn(k, channels, kernel, kernel) * scale).bfloat16().to(dtype)
    vectors = {name: torch.randn(k) for name in VECTORS} | {"running_var": torch.rand(k) + 0.5}
    return {"weight": channels_last(weight), **vectors, "activation": activation, "eps": 1e-3, **more}
