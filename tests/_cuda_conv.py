"""Runs the shipped launcher of the fused CUDA convolution on the PTX simulator (tests/_cuda_launch.py)."""

from __future__ import annotations

import ctypes
import math
import re
from typing import Any

import _cuda_launch as cuda
import pytest
import torch
from ptxsim import Report, compile_cuda
from ptxsim._gate import ROTATION
from ptxsim.fixture import require_nvcc, require_simulator
from ptxsim.gates import machine
from torch import Tensor

# One architecture a day in the default run, all in the full one.
ARCHITECTURES = [
    pytest.param(arch, marks=[] if i == ROTATION % 4 else pytest.mark.full) for i, arch in enumerate(machine.ARCHITECTURES)
]
INSTRUCTIONS = {"float16": "HMMA.16816.F32", "bfloat16": "HMMA.16816.F32.BF16", "float32": "HMMA.1688.F32.TF32"}
TILES = {"k128x128": (128, 128), "k128x64": (128, 64), "k64x64": (64, 64)}


def require_fused_conv() -> None:
    """Skips the test on machines that cannot build or run the fused convolution."""
    require_simulator()
    require_nvcc()
    if cuda.cutlass() is None:
        pytest.skip("no CUTLASS headers (pip install --no-deps nvidia-cutlass, or CUTLASS_PATH): no fused convolution")


def machine_code(stem: str, dtype: str, arch: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(ptxas' facts, machine code) of every kernel of ``csrc/ops/conv_bn_act/<stem>_<dtype>.cu``; ptxas must have no advice."""
    if machine.tool() is None:
        pytest.skip("no cuobjdump (it comes with nvcc and with triton)")
    source = cuda.CSRC / "ops" / "conv_bn_act" / f"{stem}_{dtype}.cu"
    path, messages = compile_cuda(source, "cubin", arch, [cuda.CSRC], cuda.FLAGS)
    assert not re.search(r"C7510|advisory|warning", messages, re.IGNORECASE), messages
    return machine.ptxas_facts(messages), machine.disassembled(path)


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def channels_last(t: Tensor) -> Tensor:
    """Channels last, in memory of its own (which torch aligns)."""
    n, c, h, w = t.shape
    return torch.empty_strided((n, c, h, w), (h * w * c, 1, w * c, c), dtype=t.dtype).copy_(t)


def empty_output(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    height, width = (out_size(x.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    return channels_last(torch.empty(x.shape[0], weight.shape[0], height, width, dtype=x.dtype))


def sizes_of(
    launch: cuda.Launch, x: Tensor, weight: Tensor, out: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> dict[str, Any]:
    """The members of ConvBnActFwdParams that every call has."""
    sizes = dict(zip(("batch", "channels", "height", "width"), x.shape, strict=True))
    pairs = {"pad": padding, "stride": stride, "dilation": dilation, "kernel": weight.shape[2:]}
    pairs = {f"{name}_{axis}": pair[i] for name, pair in pairs.items() for i, axis in enumerate("hw")}
    return sizes | pairs | {
        "dtype": cuda.DTYPES[x.dtype], "channels_out": out.shape[1], "height_out": out.shape[2], "width_out": out.shape[3],
        "x": launch.read(x, "x"), "x_stride_n": x.stride(0), "x_stride_h": x.stride(2), "x_stride_w": x.stride(3),
        "weight": launch.read(weight, "weight"), "out": launch.pointer(out, "out", output=True),
    }  # fmt: skip


def conv_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int], *,
    tile: str = "k64x64", options: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Report]]:  # fmt: skip
    """The convolution with statistics: (y, partial (parts, 2, C), counts (parts,), reports)."""
    out = empty_output(x, weight, stride, padding, dilation)
    with cuda.library().session(**(options or {})) as session:
        launch = cuda.Launch("conv_bn_act", session, "fwd")
        params = launch.make(
            **sizes_of(launch, x, weight, out, stride, padding, dilation), tile=tile, slices=1,
            conv_bias=launch.channels(bias, "bias"),
        )  # fmt: skip
        parts = session.call("conv_bn_act_parts", params, restype=ctypes.c_int64)
        moments = torch.empty(session.call("conv_bn_act_moments", params, restype=ctypes.c_int64))
        params.moments = launch.pointer(moments, "moments", output=True)
        assert session.call("conv_bn_act_fwd_refusal", params) == 0
        reports = launch.run(params)
    assert moments.numel() == parts * (2 * out.shape[1] + 1)
    return out, moments[: -parts or None].view(parts, 2, out.shape[1]), moments[moments.numel() - parts :], reports


def conv_bn_act_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    *,
    activation: int = 0,
    eps: float = 1e-5,
    eps_std: bool = False,
    negative_slope: float = 0.1,
    tile: str = "k64x64",
    slices: int = 1,
    options: dict[str, int] | None = None,
    refusal: int = 0,
) -> tuple[Tensor | None, list[Report]]:
    """(out, reports); x any strides with the channels side by side, weight and residual channels last.

    With ``refusal``: the launcher must give this reason (ConvRefusal) and launch nothing; out is None.
    """
    out = empty_output(x, weight, stride, padding, dilation)
    with cuda.library().session(**(options or {})) as session:
        launch = cuda.Launch("conv_bn_act", session, "fwd")
        vectors = {"conv_bias": bias, "running_mean": running_mean, "running_var": running_var}
        vectors |= {"bn_weight": bn_weight, "bn_bias": bn_bias}
        params = launch.make(
            **sizes_of(launch, x, weight, out, stride, padding, dilation), tile=tile, slices=slices,
            residual=launch.read(residual, "residual"),
            **{name: launch.channels(vector, name) for name, vector in vectors.items()},
            eps_std=eps_std, eps=eps, activation=activation, negative_slope=negative_slope,
        )  # fmt: skip
        assert session.call("conv_bn_act_fwd_refusal", params) == refusal
        if refusal:
            assert math.prod(out.shape) == 0 or session.call("launch_conv_bn_act_fwd", params, None) != 0
            return None, session.reports
        memory = launch.workspace(params)
        reports = launch.run(params)
        del memory
    return out, reports


def bn_act_conv_fwd(
    x: Tensor, inner: dict[str, Any], weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], *,
    outer: dict[str, Any] | None = None, residual: Tensor | None = None, tile: str = "k64x64",
    options: dict[str, int] | None = None, refusal: int = 0, **more: Any,
) -> tuple[Tensor | None, list[Report]]:  # fmt: skip
    """The convolution with a prologue: (out, reports).

    ``inner``: mean, var, weight, bias, eps, eps_std of x's BatchNorm; ``outer``: running_mean, running_var, bn_weight, bn_bias
    of the output's, none without; ``more``: other members of ConvBnActFwdParams. With ``refusal``: as conv_bn_act_fwd.
    """
    out = empty_output(x, weight, stride, padding, [1, 1])
    names = ("mean", "var", "weight", "bias")
    with cuda.library().session(**(options or {})) as session:
        launch = cuda.Launch("conv_bn_act", session, "fwd")
        params = launch.make(**{
            **sizes_of(launch, x, weight, out, stride, padding, [1, 1]), "tile": tile, "slices": 1, "prologue": True,
            "in_activation": 1, **{f"in_{name}": launch.channels(inner[name], f"in_{name}") for name in names},
            "in_eps": inner["eps"], "in_eps_std": inner.get("eps_std", False), "conv_bias": launch.channels(bias, "bias"),
            **{name: launch.channels(vector, name) for name, vector in (outer or {}).items()},
            "residual": launch.read(residual, "residual"), **more,
        })  # fmt: skip
        assert session.call("conv_bn_act_fwd_refusal", params) == refusal
        if refusal:
            assert session.call("launch_conv_bn_act_fwd", params, None) != 0
            return None, session.reports
        return out, launch.run(params)


def fused() -> bool:
    """Whether the launcher is compiled in (CUTLASS' headers were found)."""
    with cuda.library().session() as session:
        return session.call("conv_bn_act_fused", restype=ctypes.c_bool)
