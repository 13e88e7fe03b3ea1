"""Calls of a bottleneck block's end in one CUDA kernel: tails of pixels and channels, all types of BatchNorm vectors, parts."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..report import Report
from .limits import Limits
from .truth_bn_act import EPS, per_channel, rstd_of
from .workload import SLOPE, Case, Results, Truth, activation, random, size_of

LIMITS = [
    Limits(
        "conv_bn_act_tail_kernel", "cuda", ("x", "residual", "out"), small=1.2, load=1.0, store=1.0, waves=1.01, again=4.0,
        instructions=350, registers=168, mma=True,
        note="3x3 layers read a pixel nine times, through L1 and L2; every block reads all filters",
    )
]  # fmt: skip
# x, output channels, filter, stride, padding, dilation; residual; activations; parts; type of the vectors (None: float32, and
# no weights and biases); even sizes
CALLS = [
    ((1, 24, 9, 7), 136, 3, 1, 1, 1, True, (1, 1), 2, torch.float32, False),
    ((2, 40, 13, 12), 72, 1, 2, 0, 1, False, (2, 3), 1, torch.float16, False),
    ((1, 8, 7, 5), 328, 5, 1, 2, 1, True, (3, 2), 1, torch.bfloat16, False),
    ((1, 16, 5, 3), 72, 3, 1, 1, 1, True, (0, 0), 1, torch.float64, False),
    ((1, 72, 21, 13), 200, 3, 2, 2, 2, False, (1, 0), 3, None, False),
    ((1, 64, 8, 16), 256, 3, 1, 1, 1, True, (1, 1), 1, torch.float32, True),
    ((1, 64, 16, 8), 128, 3, 1, 1, 1, True, (1, 1), 2, torch.float32, True),
]  # fmt: skip
VECTORS = ("bias", "running_mean", "running_var", "bn_weight", "bn_bias")


def cuda(case: Case, options: dict[str, int]) -> tuple[Results, list[Report]]:
    """The call through the launcher that ships."""
    import _cuda_tail as launcher

    t = case.arguments
    first, second = (
        {name: t[f"{name}{layer}"] for name in ("weight", *VECTORS, "activation")} | {"eps": EPS} for layer in ("", "2")
    )
    out, reports = launcher.conv_bn_act_tail(
        t["x"], first, second, t["residual"], t["stride"], t["padding"], t["dilation"], parts=t["parts"],
        negative_slope=SLOPE, options=options,
    )  # fmt: skip
    return {"out": out}, reports


def layer(t: dict[str, Any], x: Tensor, which: str, residual: Tensor | None, geometry: tuple) -> tuple[Tensor, float]:
    """One of the layers in fp64, and the size of the terms."""
    weight, zero = t[f"weight{which}"].double(), torch.zeros(t[f"weight{which}"].shape[0], dtype=torch.float64)
    bias, mean, var, gain, shift = (zero if t[f"{n}{which}"] is None else t[f"{n}{which}"].double() for n in VECTORS)
    scale = rstd_of(var, False) * (1 if t[f"bn_weight{which}"] is None else gain)
    y = torch.conv2d(x, weight, None, *geometry)
    z = (y + per_channel(bias - mean, y)) * per_channel(scale, y) + per_channel(shift, y)
    size = (size_of(torch.conv2d(x.abs(), weight.abs(), None, *geometry)) + size_of(bias, mean)) * size_of(scale)
    if residual is not None:
        z, size = z + residual.double(), size + size_of(residual)
    return activation(z, t[f"activation{which}"]), size + size_of(shift)


def truth(t: dict[str, Any]) -> Truth:
    """out. The map in between holds small numbers that every type has, but for a leaky slope, which is checked as such."""
    z, _ = layer(t, t["x"].double(), "", None, (t["stride"], t["padding"], t["dilation"]))
    if t["activation"] == 2:  # the negative ones are rounded to the type (fp32: when they are read, to TF32)
        dtype = t["x"].dtype
        z = z.to(dtype)
        narrow = ((z.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32) if dtype == torch.float32 else z
        z = torch.where(z.isnan(), z, narrow).double()
    return {"out": layer(t, z, "2", t["residual"], ())}


def filters(whole: Tensor, dtype: torch.dtype) -> Tensor:
    """Dense channels last."""
    k, channels, height, width = whole.shape
    return torch.empty(k, height, width, channels, dtype=dtype).permute(0, 3, 1, 2).copy_(whole)


def cases(dtype: torch.dtype) -> list[Case]:
    """All calls of one dtype (fp64 has no kernel). Inputs and the first layer are small whole numbers."""
    found: list[Case] = []
    for i, call in enumerate(CALLS if dtype != torch.float64 else []):
        shape, k, size, stride, padding, dilation, residual, activations, parts, vector, even = call
        generator = torch.Generator().manual_seed(80 + i)
        whole = lambda low, high, *sizes, g=generator: torch.randint(low, high, sizes, generator=g)  # noqa: E731
        x = whole(-2, 3, *shape).to(dtype).contiguous(memory_format=torch.channels_last)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        lost = torch.iinfo(bits).max  # NaN whose payload would carry into the sign, were it rounded to TF32
        if not even:  # each in one channel, so that nothing else makes up for it
            places = torch.arange(0, shape[3], 5)
            x.view(bits)[-1, (places + shape[2]) % shape[1], shape[2] // 2, places] = lost
        weight = whole(-1, 2, 64, shape[1], size, size)
        weight *= torch.rand(weight.shape, generator=generator) < 24 / (shape[1] * size * size)
        t: dict[str, Any] = {
            "x": x, "weight": filters(weight, dtype), "weight2": filters(whole(-1, 2, k, 64, 1, 1), dtype),
            "stride": [stride] * 2, "padding": [padding] * 2, "dilation": [dilation] * 2, "parts": parts, "residual": None,
            "activation": activations[0], "activation2": activations[1],
        }  # fmt: skip
        kind = vector or torch.float32
        t |= {
            "bias": whole(-2, 3, 64),
            "running_mean": whole(-2, 3, 64),
            "bn_weight": whole(1, 3, 64),
            "bn_bias": whole(-3, 4, 64),
        }
        t |= {name: t[name].to(kind) for name in ("bias", "running_mean", "bn_weight", "bn_bias")}
        t["running_var"] = torch.full((64,), 0.25 - EPS)
        t |= {f"{name}2": random(k, dtype=kind, seed=3 + n) for n, name in enumerate(VECTORS)}
        t["running_var2"] = t["running_var2"].abs() + 0.5
        if activations[1] == 3 and not residual:  # sums of zero that end as -0: adding a residual of nothing would show
            t["weight2"][::9] = 0  # at every place of a thread's values
            for name, value in (("bias2", 0.0), ("running_mean2", -0.0), ("bn_weight2", -1.0), ("bn_bias2", -0.0)):
                t[name][::9] = value
        if vector is None:
            t |= dict.fromkeys(("bias", "bn_weight", "bn_bias", "bias2", "bn_weight2", "bn_bias2"))
        if residual:
            out = torch.conv2d(x, t["weight"], None, t["stride"], t["padding"], t["dilation"])
            added = random(shape[0], k, *out.shape[2:], dtype=dtype, seed=8).contiguous(memory_format=torch.channels_last)
            if not even:
                added.permute(0, 2, 3, 1).reshape(-1)[::7] = float("nan")
            t["residual"] = added
        label = f"tail-{'x'.join(map(str, shape))}-{k}-{size}x{size}-s{stride}-parts{parts}-act{activations[0]}{activations[1]}"
        found.append(Case("conv_bn_act_tail", "fwd", label, t, functools.partial(truth, t), even=even))
        if vector == torch.float64:  # in every filter of the 1x1 one NaN, at another place of the threads' values each
            given = {**t, "weight2": t["weight2"].clone()}
            i = torch.arange(k) % 8 + 8 * (torch.arange(k) // 32 % 2)
            given["weight2"].view(bits)[torch.arange(k), 8 * (i // 2) + 4 * (i % 2)] = lost
            found.append(Case("conv_bn_act_tail", "fwd", f"{label}-nan", given, functools.partial(truth, given)))
    return found
