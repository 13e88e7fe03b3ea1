"""Calls of bn_act_pair's sums in both layouts: activations by their mask, vectors that cross planes, tails, several parts."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..report import Report
from .limits import Limits, small_work
from .truth_bn_act import order_of, over_channels, per_channel
from .workload import SLOPE, Case, Results, Truth, from_mask, random, random_bits, shifted, size_of, unpacked
from .workload_bn_act import laid_out

_MAPS = ("dout", "x", "residual", "mask")
LIMITS = [
    Limits(
        "bn_act_pair_reduce_kernel_nhwc",
        "cuda",
        _MAPS,
        waves=1.75,
        instructions=130,
        registers=80,
        wide_stores=False,
        note="80 registers in 16-bit types: 24 sums, two vectors of each of three maps; three blocks then have 72 KB under way",
    ),
    Limits("bn_act_pair_reduce_kernel_nchw", "cuda", _MAPS, again=1.15, instructions=155, wide_stores=False),
    small_work("bn_act_pair_finalize_kernel", "cuda"),
]


def cuda(case: Case, options: dict[str, int]) -> tuple[Results, list[Report]]:
    """The call through the launcher that ships."""
    import _cuda_pair as pair

    t = case.arguments
    norms = [pair.Norm(t[p + "mean"], t[p + "rstd"], None, None) for p in _WAYS]
    return pair.pair_sums(
        t["dout"], t["mask"], t["x"], t["residual"], *norms, t["activation"], negative_slope=SLOPE, options=options
    )


_WAYS = ("", "residual_")


def truth(t: dict[str, Any]) -> Truth:
    """dweight, residual_dweight and dbias."""
    dz = t["dout"].double()
    if t["mask"] is not None:
        dz = from_mask(dz, unpacked(t["mask"], torch.empty_like(dz, memory_format=order_of(t["x"]))), t["activation"])
    found = {"dbias": (over_channels(dz).sum(1), size_of(over_channels(dz.abs()).sum(1)))}
    for prefix, name in zip(_WAYS, ("x", "residual"), strict=True):
        x, rstd = t[name].double(), t[prefix + "rstd"].double()
        terms = over_channels(dz * (x - per_channel(t[prefix + "mean"], x)))
        found[prefix + "dweight"] = (terms.sum(1) * rstd, size_of(terms.abs().sum(1)) * size_of(rstd))
    return found


# shape, layouts: one and two tiles of channels and three, a lone vector, odd planes, planes of whole vectors, several parts
SHAPES = {
    "wide": ((3, 24, 5, 7), ("nhwc", "nchw")), "long": ((2, 24, 20, 21), ("nhwc", "nchw")), "odd": ((2, 63, 5, 3), ("nchw",)),
    "batch": ((120, 3, 5, 7), ("nchw",)), "whole": ((11, 2, 28, 56), ("nchw",)), "tail": ((1, 7, 1, 17), ("nchw",)),
    "tiles": ((2, 328, 3, 4), ("nhwc", "nchw")), "volume": ((2, 8, 3, 4, 5), ("nhwc", "nchw")),
    "plane": ((5, 1, 9, 9), ("nchw",)), "many": ((3, 520, 4, 5), ("nhwc", "nchw")), "small": ((1, 8, 1, 8), ("nhwc", "nchw")),
    "more": ((70, 16, 5, 9), ("nhwc", "nchw")), "parts": ((10, 2, 33, 63), ("nchw",)), "nine": ((3, 24, 15, 17), ("nhwc",)),
}  # fmt: skip


def call(label: str, maps: list[Tensor], code: int, **flags: bool) -> Case:
    """With an odd code the vectors lie beside multiples of 16 bytes, and where no gradient goes through, dout is NaN."""
    x, residual, dout = maps
    channels, t = x.shape[1], {"x": x, "residual": residual, "activation": code}
    t["mask"] = random_bits(x.numel()) if code else None
    for i, prefix in enumerate(_WAYS):
        given = {
            "mean": random(channels, dtype=torch.float32, seed=5 + i),
            "rstd": random(channels, dtype=torch.float32, seed=7 + i).abs() + 0.5,
        }
        t |= {prefix + name: shifted(v) if code % 2 else v for name, v in given.items()}
    if code % 2:
        passes = unpacked(t["mask"], torch.empty_like(dout, memory_format=order_of(x)))
        dout = torch.where(passes, dout, float("nan")).to(dout.dtype).contiguous(memory_format=order_of(x))
    arguments = t | {"dout": dout}
    return Case("bn_act_pair_sums", "sums", label, arguments, functools.partial(truth, arguments), **flags)


def cases(dtype: torch.dtype) -> list[Case]:
    """All calls of one dtype; fp64 has no kernel."""
    if dtype == torch.float64:
        return []
    found: list[Case] = []

    def add(label: str, shape: tuple[int, ...], layout: str, code: int, nan: bool, **flags: bool) -> None:
        maps = [laid_out(random(*shape, dtype=dtype, seed=s, nan=nan and s == 1), layout, False) for s in (1, 2, 3)]
        found.append(call(f"{label}-{layout}-act{code}", maps, code, **flags))

    turn = 0
    for name, (shape, layouts) in SHAPES.items():
        for layout in layouts:
            for code in (0, 1, 2, 3) if name in ("wide", "more") else (turn % 4, (turn + 1) % 4):
                add(name, shape, layout, code, nan=code in (1, 2))
            turn += 1
    if dtype == torch.float32:  # 257 partial results, for the kernel that merges them
        add("merge", (2, 12, 230, 238), "nhwc", 0, nan=False)
    for tail in range(1, 16 // dtype.itemsize):  # the last vector of the tensor, every length
        add(f"tail{tail}", (1, 1, 1, 32 + tail), "nchw", 1 + tail % 3, nan=False)
    for layout, shape in (("nhwc", (8, 64, 16, 32)), ("nchw", (16, 8, 56, 56))):
        add("even", shape, layout, 2, nan=False, even=True)
    return found
