"""Calls of bn_act_pair in both layouts: activations with and without a mask, vectors that cross planes, tails, small grids."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..report import Report
from .limits import Limits, small_work
from .truth_bn_act import EPS, order_of, over_channels, per_channel, rstd_of
from .workload import (
    MASKED,
    SLOPE,
    Case,
    Results,
    Truth,
    activation,
    from_mask,
    positive,
    random,
    random_bits,
    shifted,
    size_of,
    unpacked,
)  # fmt: skip
from .workload_bn_act import laid_out

_FORWARD = ("x", "residual", "out", "mask")
_BACKWARD = ("dout", "x", "residual", "mask", "dx", "dresidual")
LIMITS = [
    small_work("bn_act_pair_fwd_table_kernel", "cuda"),
    small_work("bn_act_pair_bwd_table_kernel", "cuda"),
    Limits(
        "bn_act_pair_fwd_kernel_nhwc", "cuda", _FORWARD, again=1.4, instructions=75,
        note="a channel's record, 16 bytes, is read for every second vector of x, from the L1 cache",
    ),
    Limits("bn_act_pair_fwd_kernel_nchw", "cuda", _FORWARD, instructions=85),
    Limits(
        "bn_act_pair_bwd_kernel_nhwc", "cuda", _BACKWARD, again=1.9, instructions=65,
        note="per-channel records, two of 16 bytes, are read again for every vector of x, from the L1 cache",
    ),
    Limits("bn_act_pair_bwd_kernel_nchw", "cuda", _BACKWARD, instructions=65),
]  # fmt: skip


def cuda(case: Case, options: dict[str, int]) -> tuple[Results, list[Report]]:
    """The call through the launcher that ships."""
    import _cuda_pair as pair

    t = case.arguments
    norms = [
        pair.Norm(*(t[p + n] for n in ("mean", "rstd", "weight", "bias")), eps=EPS, eps_std=t[p + "eps_std"]) for p in _WAYS
    ]
    if case.way == "fwd":
        return pair.pair_fwd(
            t["x"], t["residual"], *norms, t["activation"], negative_slope=SLOPE, save_mask=t["save_mask"], options=options
        )
    norms = [norm._replace(dweight=t[p + "dweight"]) for norm, p in zip(norms, _WAYS, strict=True)]
    return pair.pair_bwd(
        t["dout"], t["mask"], t["x"], t["residual"], *norms, t["dbias"], t["activation"], negative_slope=SLOPE, options=options
    )


_WAYS = ("", "residual_")


def _scale(t: dict[str, Any], prefix: str) -> Tensor:
    rstd, weight = t[prefix + "rstd"].double(), t[prefix + "weight"]
    return rstd if weight is None else rstd * weight.double()


def forward_truth(t: dict[str, Any]) -> Truth:
    """out and mask."""
    z, size = 0.0, 0.0
    for prefix, name in zip(_WAYS, ("x", "residual"), strict=True):
        x, scale, mean, bias = t[name].double(), _scale(t, prefix), t[prefix + "mean"].double(), t[prefix + "bias"]
        z = z + (x - per_channel(mean, x)) * per_channel(scale, x)
        size += size_of(x.abs() * per_channel(scale, x).abs(), mean * scale)
        if bias is not None:
            z, size = z + per_channel(bias, x), size + size_of(bias)
    truth = {"z": (z, size), "out": (activation(z, t["activation"]), size)}
    if t["save_mask"]:
        truth["mask"] = (positive(z.to(t["x"].dtype).double(), t["activation"]), 0.0)
    return truth


def backward_truth(t: dict[str, Any]) -> Truth:
    """dx and dresidual from the sums that the call was given."""
    dz, truth = t["dout"].double(), {}
    if t["mask"] is not None:
        bits = unpacked(t["mask"], torch.empty_like(dz, memory_format=order_of(t["x"])))
        dz = from_mask(dz, bits, t["activation"])
    n = over_channels(dz).shape[1]
    for prefix, name, result in zip(_WAYS, ("x", "residual"), ("dx", "dresidual"), strict=True):
        x, scale, rstd = t[name].double(), _scale(t, prefix), t[prefix + "rstd"].double()
        sigma = 1 / rstd - EPS
        k = torch.where(sigma > 0, 1 / sigma, 0.0) if t[prefix + "eps_std"] else rstd
        steep, centred = scale * k * t[prefix + "dweight"].double() / n, x - per_channel(t[prefix + "mean"], x)
        even = scale * t["dbias"].double() / n
        dx = dz * per_channel(scale, x) - per_channel(steep, x) * centred - per_channel(even, x)
        size = size_of(dz) * size_of(scale) + size_of(steep) * (size_of(x) + size_of(t[prefix + "mean"])) + size_of(even)
        truth[result] = (dx, size)
    return truth


# shape, layouts: rows of several vectors, odd planes, planes of whole vectors, a grid-stride loop of several steps, one pixel
SHAPES = {
    "wide": ((3, 24, 5, 7), ("nhwc", "nchw")), "long": ((2, 24, 20, 21), ("nhwc", "nchw")), "odd": ((2, 63, 5, 3), ("nchw",)),
    "batch": ((120, 3, 5, 7), ("nchw",)), "whole": ((11, 2, 28, 56), ("nchw",)), "tail": ((1, 7, 1, 17), ("nchw",)),
    "tiles": ((2, 264, 3, 4), ("nhwc", "nchw")), "volume": ((2, 8, 3, 4, 5), ("nhwc", "nchw")),
    "plane": ((5, 1, 9, 9), ("nchw",)), "many": ((1, 520, 2, 5), ("nhwc", "nchw")), "small": ((1, 8, 1, 8), ("nchw",)),
    "more": ((70, 16, 5, 9), ("nhwc", "nchw")),
}  # fmt: skip
# activation, eps_std of both, dtype of the vectors, affine of both
VARIANTS = (
    (1, (False, True), "acc", "wb"), (2, (True, False), "half", "w"), (3, (True, True), "bfloat", "wb"),
    (0, (False, False), "own", ""), (1, (False, False), "own", "b"), (3, (False, True), "acc", "wb"),
)  # fmt: skip
VECTOR_DTYPES = {"half": torch.float16, "bfloat": torch.bfloat16, "acc": torch.float32}


def calls(label: str, maps: list[Tensor], variant: tuple[Any, ...], mask: bool, **flags: bool) -> list[Case]:
    """Forward and backward."""
    x, residual, dout = maps
    code, stds, kind, affine = variant
    channels = x.shape[1]
    vector = functools.partial(random, channels, dtype=VECTOR_DTYPES.get(kind, x.dtype))
    shared: dict[str, Any] = {"x": x, "residual": residual, "activation": code}
    sums: dict[str, Any] = {"dout": dout, "dbias": random(channels, dtype=torch.float32, seed=21) * 9}
    sums["mask"] = random_bits(x.numel()) if code else None
    for i, (prefix, eps_std) in enumerate(zip(_WAYS, stds, strict=True)):
        variance = random(channels, dtype=torch.float64, seed=7 + i).abs() + 0.5
        rstd = rstd_of(variance, eps_std).float()
        if eps_std:
            rstd[channels // 2] = 1 / EPS  # a constant channel
        given = {"mean": random(channels, dtype=torch.float32, seed=5 + i), "rstd": rstd, "eps_std": eps_std}
        given |= {
            "weight": vector(seed=9 + i) if "w" in affine else None,
            "bias": vector(seed=11 + i) if "b" in affine else None,
        }
        if code in (2, 3):  # not at a multiple of 16 bytes
            given |= {n: shifted(t) for n, t in given.items() if isinstance(t, Tensor)}
        shared |= {prefix + name: value for name, value in given.items()}
        sums[prefix + "dweight"] = random(channels, dtype=torch.float32, seed=13 + i) * 9
    forward = shared | {"save_mask": mask and code in MASKED}
    backward = shared | sums
    return [
        Case("bn_act_pair", "fwd", f"fwd-{label}", forward, functools.partial(forward_truth, forward), **flags),
        Case("bn_act_pair", "bwd", f"bwd-{label}", backward, functools.partial(backward_truth, backward), **flags),
    ]


def at_kinks(maps: list[Tensor]) -> list[Tensor]:
    """x 0, 6 and just beside them where the BatchNorms below do nothing."""
    x, residual, dout = maps
    eps = torch.finfo(x.dtype).eps
    values = torch.tensor(
        [0.0, -0.0, 6.0, 6.0, float("nan"), 6.0, 1e30 if x.dtype != torch.float16 else 6e4, -2.0], dtype=x.dtype
    )
    more = torch.tensor([0.0, -0.0, -eps, -4 * eps, 0.0, eps, 0.0, -float("inf")], dtype=x.dtype)
    for part, (a, b) in enumerate(zip(values, more, strict=True)):
        x[..., part::8], residual[..., part::8] = a, b
    return [x, residual, dout]


def cases(dtype: torch.dtype) -> list[Case]:
    """All calls of one dtype; fp64 has no kernel."""
    if dtype == torch.float64:
        return []
    found: list[Case] = []
    turn = 0
    for name, (shape, layouts) in SHAPES.items():
        for layout in layouts:
            for variant in (*VARIANTS, *VARIANTS)[turn:][: len(VARIANTS) if name == "wide" else 3]:
                maps = [laid_out(random(*shape, dtype=dtype, seed=s, nan=s == 1), layout, False) for s in (1, 2, 3)]
                label = f"{name}-{layout}-act{variant[0]}-{variant[2]}"
                found += calls(label, maps, variant, variant[2] != "own", few_blocks=name in ("long", "batch", "whole", "more"))
            turn = (turn + 1) % len(VARIANTS)
    for tail in range(1, 16 // dtype.itemsize):  # the last vector of the tensor, every length
        maps = [random(1, 1, 1, 32 + tail, dtype=dtype, seed=s) for s in (1, 2, 3)]
        found += calls(f"tail{tail}", maps, VARIANTS[tail % 3], True)
    for layout in ("nhwc", "nchw"):
        for code in (0, 1, 2, 3):
            maps = at_kinks([random(2, 8, 2, 16, dtype=dtype, seed=s) for s in (1, 2, 3)])
            made = calls(
                f"kinks-{layout}-act{code}", [laid_out(t, layout, False) for t in maps], (code, (False, False), "acc", ""), True
            )
            for case in made:  # scale 1, shift 0
                for prefix in _WAYS:
                    case.arguments[prefix + "mean"].zero_()
                    case.arguments[prefix + "rstd"].fill_(1.0)
            found += made
    for layout, shape in (("nhwc", (8, 64, 16, 32)), ("nchw", (16, 8, 56, 56))):
        maps = [laid_out(random(*shape, dtype=dtype, seed=s), layout, False) for s in (1, 2, 3)]
        found += calls(f"even-{layout}", maps, VARIANTS[0], True, few_blocks=True, even=True)
    return found
