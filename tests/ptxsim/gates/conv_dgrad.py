"""Calls of the input gradient of the fused CUDA convolution (workload_conv_bn_act.py): what is added, masks, sums, tiles.

Small whole numbers: every sum is exact in every type, so that the truth has the sums of the gradient as stored.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..report import Report
from .limits import Limits
from .workload import Case, Results, Truth, positive, random_bits, size_of

NONE, RELU, LEAKY, RELU6 = range(4)
ALL = ("k128x128", "k128x64", "k64x64")
ADDED_SLOPE, SLOPE = 0.5, 0.25  # exact too
# x (N, C, H, W), channels of dout, kernel, padding, dilation; what is added and its activation; bits in front (or no sums; two:
# of two BatchNorms, by bits) and the activation there; the tiles; even sizes.
DGRAD = [
    ((1, 136, 9, 7), 24, 3, 1, 1, "masked", RELU, None, RELU, ALL, False),
    ((2, 72, 17, 12), 40, 1, 0, 1, "step", NONE, "bits", LEAKY, ALL, False),
    ((1, 24, 19, 7), 40, 1, 0, 1, "masked", RELU6, None, RELU6, ALL, False),
    ((1, 200, 9, 8), 16, 1, 0, 1, "masked", LEAKY, None, LEAKY, ALL, False),
    ((2, 136, 9, 8), 24, 1, 0, 1, "masked", RELU, "two", RELU, ALL, False),
    ((1, 67, 11, 7), 72, 3, 2, 2, "masked", LEAKY, None, RELU6, ("k64x64",), False),
    ((2, 21, 10, 7), 16, 1, 0, 1, "plain", NONE, "two", NONE, ("k64x64",), False),
    ((2, 21, 9, 7), 16, 1, 0, 1, "step", NONE, "bits", RELU6, ("k64x64",), False),
    ((1, 24, 9, 7), 16, 1, 0, 1, "plain", NONE, "no sums", NONE, ALL, False),
    ((1, 24, 9, 7), 48, 1, 0, 1, None, NONE, None, NONE, ("k64x64",), False),
    ((1, 128, 16, 16), 64, 1, 0, 1, "masked", RELU, "bits", RELU, ("k128x128", "k128x64"), True),
    ((1, 64, 16, 8), 64, 1, 0, 1, "plain", NONE, None, RELU, ("k64x64",), True),
    ((1, 128, 16, 16), 64, 1, 0, 1, "masked", RELU, "two", RELU, ALL, True),
]  # fmt: skip
LIMITS = [
    Limits(
        "conv_bn_act_dgrad_kernel", "cuda", ("dout", "added", "y", "other", "dx", "mask", "added_mask"), small=7.0, load=0.95,
        store=0.98, waves=1.4, again=12.0, instructions=500, registers=255, wide_stores=False, mma=True,
        note="3x3 layers read a pixel nine times, through L1 and L2; bound by the tensor cores; waves: a tile's sums",
    ),
    Limits(
        "conv_bn_act_turn_kernel", "cuda", load=0.99, store=0.99, waves=1.3, again=1.1, instructions=250, wide_loads=False,
        wide_stores=False, note="a filter, once a step: tiles of 32 x 32 channels through shared memory",
    ),
]  # fmt: skip


def cuda(case: Case, options: dict[str, int]) -> tuple[Results, list[Report]]:
    """The call through the launcher that ships."""
    from _cuda_dgrad import conv_dgrad

    given = dict(case.arguments)
    bn = {name: given.pop(name) for name in ("y", "mean", "rstd", "bn_weight", "bn_bias", "other", "other_mean")}
    bn = {name.removeprefix("bn_"): v for name, v in bn.items()} if bn["y"] is not None else None
    dx, sums, reports = conv_dgrad(**given, bn=bn, options=options)
    return {"dx": dx} | ({} if sums is None else {"sums": sums}), reports


def unpacked(bits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """In the order of a channels-last map."""
    n, c, h, w = like.shape
    flat = torch.stack([(bits >> k) & 1 for k in range(8)], 1).flatten()[: like.numel()].bool()
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def behind(g: torch.Tensor, above: torch.Tensor, code: int, slope: float) -> torch.Tensor:
    """A gradient taken through the activation."""
    return torch.where(above, g, g * slope if code == LEAKY else 0.0)


def truth(t: dict[str, Any], shape: tuple[int, ...]) -> Truth:
    """dx, and for each tile of pixels the sums over dz and dz * (y - mean), with another BatchNorm of its too."""
    geometry = (1, t["padding"], t["dilation"])
    back = lambda d, w: torch.nn.grad.conv2d_input(shape, w, d, *geometry)  # noqa: E731
    dout, weight = t["dout"].double(), t["weight"].double()
    dx, size = back(dout, weight), size_of(back(dout.abs(), weight.abs()))
    if t["added"] is not None:
        more = t["added"].double()
        if t["added_mask"] is not None:
            more = behind(more, unpacked(t["added_mask"], dx), t["added_activation"], t["added_slope"])
        if t["step"] > 1:
            spread = torch.zeros_like(dx)
            spread[:, :, :: t["step"], :: t["step"]] = more
            more = spread
        dx, size = dx + more, size + size_of(t["added"])
    if t["y"] is None:
        return {"dx": (dx, size)}
    vector = lambda name: t[name].double().view(1, -1, 1, 1)  # noqa: E731
    y, code = t["y"].double(), t["activation"]
    z = (y - vector("mean")) * vector("rstd") * vector("bn_weight") + vector("bn_bias")
    above = unpacked(t["mask"], dx) if t["mask"] is not None else positive(z, code)
    dz = behind(dx, above, code, t["slope"]) if code else dx
    terms = [dz, dz * (y - vector("mean"))]
    if t["other"] is not None:
        terms.append(dz * (t["other"].double() - vector("other_mean")))
    rows = 64 if t["tile"] == "k64x64" else 128
    tiles = [v.permute(0, 2, 3, 1).flatten(0, 2).split(rows) for v in terms]
    sums = torch.stack([torch.stack([part.sum(0) for part in half]) for half in tiles], 1)
    return {"dx": (dx, size), "sums": (sums, size_of(*(v.abs() for v in terms)) * 4)}


def cases(dtype: torch.dtype) -> list[Case]:
    """All calls of one dtype."""
    found: list[Case] = []
    for i, (shape, k, size, padding, dilation, kind, added_code, front, code, tiles, even) in enumerate(DGRAD):
        generator = torch.Generator().manual_seed(80 + i)
        whole = lambda low, high, *s, g=generator: torch.randint(low, high, s, generator=g)  # noqa: E731
        last = lambda t, d=dtype: t.to(d).contiguous(memory_format=torch.channels_last)  # noqa: E731
        out = [s + 2 * padding - dilation * (size - 1) for s in shape[2:]]
        weight = whole(-1, 2, k, shape[1], size, size)
        weight *= torch.rand(weight.shape, generator=generator) < 32 / (k * size * size)
        step = 2 if kind == "step" else 1
        added = whole(-4, 5, *shape).double()[:, :, ::step, ::step]
        y = whole(-4, 5, *shape).double()
        other = whole(-4, 5, *shape).double() if front == "two" else None
        if not even:  # at every place of a thread's values, not in every channel
            added.permute(0, 2, 3, 1).reshape(-1)[::131] = float("nan")
            y[:, 2::5, shape[2] // 2, ::3] = float("nan")
            if other is not None:
                other[:, 1::5, shape[2] // 2, 1::3] = float("nan")
        if kind == "step":
            added = torch.empty_like(added, memory_format=torch.channels_last).copy_(added)
        bn = {"y": last(y), "mean": whole(-2, 3, shape[1]).float(), "rstd": torch.full((shape[1],), 0.5)}
        bn |= {"bn_weight": whole(-2, 3, shape[1]).float(), "bn_bias": whole(-3, 8, shape[1]).float()}
        bn |= {"other": None if other is None else last(other), "other_mean": None if other is None else bn["mean"].flip(0) + 1}
        numel, by_bits = y.numel(), front == "bits" or front == "two" and code != NONE
        given = {
            "dout": last(whole(-2, 3, shape[0], k, *out)),
            "weight": torch.empty(k, size, size, shape[1], dtype=dtype).permute(0, 3, 1, 2).copy_(weight),
            "size": tuple(shape[2:]), "padding": [padding] * 2, "dilation": [dilation] * 2,
            "added": None if kind is None else last(added), "added_activation": added_code, "added_slope": ADDED_SLOPE,
            "added_mask": random_bits(numel, 6) if kind == "masked" else None, "step": step,
            **(dict.fromkeys(bn) if front == "no sums" else bn), "mask": random_bits(numel, 7) if by_bits else None,
            "activation": code, "slope": SLOPE,
        }  # fmt: skip
        for tile in tiles:
            arguments = {**given, "tile": tile}
            label = f"dgrad-{'x'.join(map(str, shape))}-{k}-{size}x{size}-{kind}{added_code}-{front}-act{code}-{tile}"
            call = functools.partial(truth, arguments, shape)
            found.append(Case("conv_bn_act", "dgrad", label, arguments, call, even=even))
    return found
