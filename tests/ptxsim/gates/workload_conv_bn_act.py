"""Calls of conv_bn_act in inference: 1x1 and 3x3, odd sizes, strides, dilation, both layouts, every tile size.

Those of the fused CUDA kernel are their own, since a tile and a number of slices are part of them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..report import Report
from . import conv_dgrad
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
_NOTE = "3x3 layers read a pixel nine times, through L1 and L2; bound by the tensor cores"
LIMITS += [
    Limits(
        "conv_bn_act_fwd_kernel", "cuda", ("x", "residual", "out"), small=7.0, load=1.0, store=1.0, waves=1.1, again=12.0,
        instructions=400, registers=255, wide_stores=False, mma=True,
        note=_NOTE + "; waves: 64 a block in the epilogue, none in the main loop (ops/test_conv_bn_act_cuda.py)",
    ),
    Limits(
        "conv_bn_act_stats_kernel", "cuda", ("x", "out"), small=7.0, load=1.0, store=0.98, waves=1.3, again=12.0,
        instructions=500, registers=255, wide_stores=False, mma=True, note=_NOTE + "; waves: the moments of a tile's rows",
    ),
    Limits(
        "conv_bn_act_prologue_kernel", "cuda", ("x", "residual", "out"), small=7.0, load=1.0, store=1.0, waves=1.1, again=12.0,
        instructions=450, registers=255, wide_stores=False, mma=True,
        note="bound by the tensor cores; 5 instructions more for 2 values of x (relu is part of the packing)",
    ),
    Limits(
        "conv_bn_act_finish_kernel", "cuda", ("residual", "out"), small=20.0, load=1.0, store=1.0, waves=1.4, again=1.1,
        instructions=150, registers=128, wide_stores=False,
    ),
    *conv_dgrad.LIMITS,
]  # fmt: skip
# Of the fused kernel: x, output channels, kernel size, stride, padding, dilation; residual; the tiles, or the slices of 64x64.
FUSED = [
    ((1, 24, 9, 7), 136, 3, 1, 1, 1, True, ("k128x128", "k128x64", "k64x64")),
    ((2, 40, 13, 12), 72, 1, 2, 0, 1, False, ("k128x128", "k128x64", "k64x64")),
    ((1, 8, 17, 11), 16, 5, 1, 3, 2, True, ("k128x128", "k128x64", "k64x64")),
    ((1, 72, 7, 7), 67, 3, 1, 1, 1, True, (1, 3)), ((2, 56, 6, 5), 21, 1, 1, 0, 1, False, (1, 2)),
    ((1, 136, 5, 4), 76, 1, 1, 0, 1, True, (1, 2)), ((1, 72, 5, 3), 72, 1, 1, 0, 1, False, (1, 2)),
]  # fmt: skip
FUSED_EVEN = [
    ((1, 64, 16, 16), 128, 1, 1, 0, 1, True, ("k128x128", 1)), ((1, 32, 16, 16), 64, 3, 1, 1, 1, False, ("k128x64", 1)),
    ((1, 128, 8, 8), 64, 1, 1, 0, 1, True, (2,)),
]  # fmt: skip
# With moments (training): x, output channels, kernel size, stride, padding, dilation; the tiles; even sizes. NOT_A_NUMBER: x
# has one NaN in every second pixel, in another channel each time; rounding its payload would carry into the sign.
NOT_A_NUMBER = ((1, 40, 19, 7), 24, 1, 1, 0, 1, ("k128x128", "k128x64", "k64x64"), False)
STATS = [
    NOT_A_NUMBER,
    ((1, 24, 9, 7), 136, 3, 1, 1, 1, ("k128x128", "k128x64", "k64x64"), False),
    ((2, 40, 17, 12), 72, 1, 2, 0, 1, ("k128x128", "k128x64", "k64x64"), False),
    ((1, 72, 11, 7), 67, 3, 1, 1, 1, ("k64x64",), False),
    ((1, 64, 16, 16), 128, 1, 1, 0, 1, ("k128x128", "k128x64"), True), ((1, 64, 16, 8), 64, 1, 1, 0, 1, ("k64x64",), True),
]  # fmt: skip
# With a prologue: x, output channels, stride; BatchNorm, activation and residual behind it; the tiles; even sizes.
PROLOGUE = [
    ((1, 24, 9, 7), 136, 1, True, ("k128x128", "k128x64", "k64x64"), False),
    ((2, 40, 17, 12), 72, 2, False, ("k128x128", "k128x64", "k64x64"), False),
    ((1, 72, 11, 7), 67, 1, True, ("k64x64",), False),
    ((1, 64, 16, 16), 128, 1, False, ("k128x128", "k128x64"), True), ((1, 64, 16, 8), 64, 1, True, ("k64x64",), True),
]  # fmt: skip
WRITTEN = {"conv_bn_act_kernel": {"out"}}
OUTER = ("running_mean", "running_var", "bn_weight", "bn_bias")
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


def cuda(case: Case, options: dict[str, int]) -> tuple[Results, list[Report]]:
    """The call through the launcher of the fused kernel that ships."""
    import _cuda_conv as launcher

    t = case.arguments
    if case.way == "dgrad":
        return conv_dgrad.cuda(case, options)
    geometry = (t["stride"], t["padding"], t["dilation"])
    if case.way == "stats":
        y, partial, counts, reports = launcher.conv_stats(
            t["x"], t["weight"], t["bias"], *geometry, tile=t["tile"], options=options
        )
        return {"out": y, "counts": counts, "mean": partial[:, 0], "m2": partial[:, 1]}, reports
    if case.way == "prologue":
        behind = {name: t[name] for name in OUTER} if t["running_mean"] is not None else {}
        inner = {name: t[f"in_{name}"] for name in ("mean", "var", "weight", "bias")} | {"eps": EPS}
        out, reports = launcher.bn_act_conv_fwd(
            t["x"], inner, t["weight"], t["bias"], t["stride"], t["padding"], outer=behind, residual=t["residual"],
            tile=t["tile"], options=options, eps=EPS, activation=t["activation"], negative_slope=SLOPE,
        )  # fmt: skip
        return {"out": out}, reports
    names = ("x", "weight", "bias", "running_mean", "running_var", "bn_weight", "bn_bias", "residual")
    more = {name: t[name] for name in ("activation", "eps", "negative_slope", "tile", "slices")}
    out, reports = launcher.conv_bn_act_fwd(*(t[n] for n in names), *geometry, options=options, **more)
    return {"out": out}, reports


def cuda_runs(case: Case) -> bool:
    """The cases of the fused kernel."""
    return "tile" in case.arguments


def triton_runs(case: Case) -> bool:
    """All the others."""
    return "tile" not in case.arguments


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
    return [*found, *fused_cases(dtype), *stats_cases(dtype), *prologue_cases(dtype), *conv_dgrad.cases(dtype)]


def stats_truth(t: dict[str, Any]) -> Truth:
    """out, and for each tile of pixels the count, the means and the sums of squared deviations."""
    y = convolution(t) + per_channel(t["bias"].double(), t["weight"][:, 0, 0, 0].view(1, -1, 1, 1))
    rows = y.permute(0, 2, 3, 1).flatten(0, 2).split(64 if t["tile"] == "k64x64" else 128)
    size = size_of(convolution(t, True)) + size_of(t["bias"])
    return {
        "out": (y, size), "counts": (torch.tensor([float(len(r)) for r in rows], dtype=torch.float64), 0.0),
        "mean": (torch.stack([r.mean(0) for r in rows]), size),
        "m2": (torch.stack([(r - r.mean(0)).square().sum(0) for r in rows]), size * size),
    }  # fmt: skip


def stats_cases(dtype: torch.dtype) -> list[Case]:
    """Calls with moments. Small whole numbers: every sum is exact in every type, so the truth has the moments as stored."""
    found: list[Case] = []
    for i, (shape, k, size, stride, padding, dilation, tiles, even) in enumerate(STATS):
        generator = torch.Generator().manual_seed(40 + i)
        x = torch.randint(-2, 3, shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
        if shape == NOT_A_NUMBER[0]:
            pixels = x.permute(0, 2, 3, 1).reshape(-1, shape[1])  # a view
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            places = torch.arange(0, len(pixels), 2)
            pixels.view(bits)[places, places % shape[1]] = torch.iinfo(bits).max
        weight = torch.randint(-1, 2, (k, shape[1], size, size), generator=generator)
        weight *= torch.rand(weight.shape, generator=generator) < 32 / (shape[1] * size * size)
        bias = torch.randint(-20, 21, (k,), generator=generator).float()
        for tile in tiles:
            arguments = {
                "x": x, "weight": torch.empty(k, size, size, shape[1], dtype=dtype).permute(0, 3, 1, 2).copy_(weight),
                "bias": bias, "stride": [stride] * 2, "padding": [padding] * 2, "dilation": [dilation] * 2, "tile": tile,
            }  # fmt: skip
            label = f"stats-{'x'.join(map(str, shape))}-{k}-{size}x{size}-s{stride}-{tile}"
            call = functools.partial(stats_truth, arguments)
            found.append(Case("conv_bn_act", "stats", label, arguments, call, even=even))
    return found


def fused_cases(dtype: torch.dtype) -> list[Case]:
    """Calls of the fused CUDA kernel: every tile, slices, whole vectors of channels and others, with and without a residual."""
    found: list[Case] = []
    for i, (shape, k, size, stride, padding, dilation, residual, ways) in enumerate([*FUSED, *FUSED_EVEN]):
        for j, way in enumerate(ways):
            # fp32 values that TF32 holds exactly: rounding is the business of ops/test_conv_bn_act_cuda.py.
            fill = torch.bfloat16 if dtype == torch.float32 else dtype
            x = random(*shape, dtype=fill, seed=1).to(dtype).contiguous(memory_format=torch.channels_last)
            if (shape, k, size, stride, padding, dilation, residual, ways) in FUSED:
                x[..., x.shape[2] // 2, ::2] = float("nan")
            weight = random(k, shape[1], size, size, dtype=torch.float32, seed=2) / (shape[1] * size * size) ** 0.5
            weight = weight.to(fill).to(dtype)
            arguments = {
                "x": x, "weight": torch.empty(k, size, size, shape[1], dtype=dtype).permute(0, 3, 1, 2).copy_(weight),
                "stride": [stride] * 2, "padding": [padding] * 2, "dilation": [dilation] * 2, "eps": EPS,
                "activation": (i + j) % 4, "negative_slope": SLOPE,
                "running_var": random(k, dtype=torch.float32, seed=7).abs() + 0.5,
            }  # fmt: skip
            names = ("bias", "running_mean", "bn_weight", "bn_bias")
            arguments |= {name: random(k, dtype=torch.float32, seed=3 + n) for n, name in enumerate(names)}
            out = convolution(arguments)
            added = random(*out.shape, dtype=dtype, seed=8).contiguous(memory_format=torch.channels_last)
            if (shape, k, size, stride, padding, dilation, residual, ways) in FUSED:
                added.permute(0, 2, 3, 1).reshape(-1)[::7] = float("nan")  # at every place of a thread's values
            arguments["residual"] = added if residual else None
            arguments |= {"tile": way, "slices": 1} if isinstance(way, str) else {"tile": "k64x64", "slices": way}
            label = f"fused-{'x'.join(map(str, shape))}-{k}-{size}x{size}-s{stride}-{way}-act{(i + j) % 4}"
            even = (shape, k, size, stride, padding, dilation, residual, ways) in FUSED_EVEN
            found.append(Case("conv_bn_act", "fwd", label, arguments, functools.partial(truth, arguments), even=even))
    return found


def prologue_truth(t: dict[str, Any]) -> Truth:
    """out. x and its BatchNorm are small whole numbers: what comes in between is rounded to nothing else in any type."""
    scale = per_channel(t["in_weight"].double() * 2, t["x"])  # in_var: a quarter less eps
    z = (t["x"].double() - per_channel(t["in_mean"].double(), t["x"])) * scale + per_channel(t["in_bias"].double(), t["x"])
    z = torch.where(z < 0, 0.0, z)
    y = convolution({**t, "x": z}) + per_channel(t["bias"].double(), t["weight"][:, 0, 0, 0].view(1, -1, 1, 1))
    size = size_of(convolution({**t, "x": z}, True)) + size_of(t["bias"])
    if t["running_mean"] is None:
        return {"out": (y, size)}
    factor = rstd_of(t["running_var"].double(), False) * t["bn_weight"].double()
    out = (y - per_channel(t["running_mean"].double(), y)) * per_channel(factor, y) + per_channel(t["bn_bias"].double(), y)
    size = size * size_of(factor) + size_of(t["bn_bias"])
    if t["residual"] is not None:
        out, size = out + t["residual"].double(), size + size_of(t["residual"])
    return {"out": (activation(out, t["activation"]), size)}


def prologue_cases(dtype: torch.dtype) -> list[Case]:
    """Calls with a BatchNorm and relu on the way in."""
    found: list[Case] = []
    for i, (shape, k, stride, behind, tiles, even) in enumerate(PROLOGUE):
        generator = torch.Generator().manual_seed(60 + i)
        whole = lambda low, high, *size, g=generator: torch.randint(low, high, size, generator=g)  # noqa: E731
        x = whole(-2, 3, *shape).to(dtype).contiguous(memory_format=torch.channels_last)
        if not even:
            x[..., shape[2] // 2, ::2] = float("nan")
        weight = whole(-1, 2, k, shape[1], 1, 1)
        inner = {"in_mean": whole(-2, 3, shape[1]), "in_weight": whole(-1, 2, shape[1]), "in_bias": whole(-3, 4, shape[1])}
        arguments = {
            "x": x, "weight": torch.empty(k, 1, 1, shape[1], dtype=dtype).permute(0, 3, 1, 2).copy_(weight),
            "bias": whole(-9, 10, k).float(), "stride": [stride] * 2, "padding": [0, 0], "dilation": [1, 1],
            "in_var": torch.full((shape[1],), 0.25 - EPS), "residual": None, "activation": (i + 1) % 4 if behind else 0,
            **{name: v.float() for name, v in inner.items()}, **dict.fromkeys(OUTER),
        }  # fmt: skip
        if behind:
            arguments |= {name: random(k, dtype=torch.float32, seed=3 + n) for n, name in enumerate(OUTER)}
            arguments["running_var"] = random(k, dtype=torch.float32, seed=7).abs() + 0.5
            size = [(s - 1) // stride + 1 for s in shape[2:]]
            added = random(shape[0], k, *size, dtype=dtype, seed=8)
            arguments["residual"] = added.contiguous(memory_format=torch.channels_last)
        for tile in tiles:
            given = {**arguments, "tile": tile}
            label = f"prologue-{'x'.join(map(str, shape))}-{k}-s{stride}-{tile}"
            found.append(Case("conv_bn_act", "prologue", label, given, functools.partial(prologue_truth, given), even=even))
    return found
