"""Calls of bn_act in both layouts: batch and running statistics, residual, mask, every activation, odd sizes, sliced inputs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .workload import (
    MASKED,
    Case,
    Truth,
    activation,
    at_kinks,
    from_mask,
    gradient,
    positive,
    random,
    random_bits,
    shifted,
    size_of,
    unpacked,
)  # fmt: skip

EPS, MOMENTUM = 1e-3, 0.1
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.double().view(1, -1, *[1] * (like.dim() - 2))


def order_of(t: Tensor) -> torch.memory_format:
    """Of the op's results."""
    suggested = torch._prims_common.suggest_memory_format(t) if t.dim() in CHANNELS_LAST else torch.contiguous_format
    return torch.contiguous_format if suggested == torch.contiguous_format else CHANNELS_LAST[t.dim()]


def over_channels(values: Tensor) -> Tensor:
    return values.transpose(0, 1).reshape(values.shape[1], -1)


def rstd_of(variance: Tensor, eps_std: bool) -> Tensor:
    return 1 / (variance.sqrt() + EPS) if eps_std else 1 / (variance + EPS).sqrt()


def normalised(t: dict[str, Any], mean: Tensor, rstd: Tensor) -> tuple[Tensor, float]:
    """z and the size of its terms."""
    x = t["x"].double()
    scale = rstd.double() * (1 if t["weight"] is None else t["weight"].double())
    z = (x - per_channel(mean, x)) * per_channel(scale, x)
    size = size_of(x.abs() * per_channel(scale, x).abs(), mean.double() * scale)
    for extra in (t["bias"] if t["bias"] is None else per_channel(t["bias"], x), t["residual"]):
        z = z if extra is None else z + extra.double()
        size += 0.0 if extra is None else size_of(extra)
    return z, size


def forward_truth(t: dict[str, Any]) -> Truth:
    """out, mask, and in training the statistics."""
    x, truth = t["x"].double(), {}
    mean, rstd = t["running_mean"].double(), rstd_of(t["running_var"].double(), t["eps_std"])
    if t["training"]:
        values = over_channels(x)
        mean, variance = values.mean(1), values.var(1, unbiased=False)
        rstd = rstd_of(variance, t["eps_std"])
        n, spread = values.shape[1], size_of(values)
        unbiased = variance * n / max(n - 1, 1)
        truth |= {"mean": (mean, spread), "rstd": (rstd, size_of(rstd) * (1 + spread))}
        for name, new in (("running_mean", mean), ("running_var", unbiased)):
            old = t[name].double()
            truth[f"new_{name}"] = ((1 - MOMENTUM) * old + MOMENTUM * new, size_of(old, new))
    z, size = normalised(t, mean, rstd)
    truth |= {"z": (z, size), "out": (activation(z, t["activation"]), size)}
    if t["save_mask"]:
        bits = positive(z.to(t["x"].dtype).double(), t["activation"])
        truth["mask"] = (bits if t["activation"] in MASKED else torch.zeros_like(bits), 0.0)
    return truth


def backward_truth(t: dict[str, Any]) -> Truth:
    """dx, dweight, dbias, dresidual."""
    x, dout, code = t["x"].double(), t["dout"].double(), t["activation"]
    z, size = normalised(t, t["mean"], t["rstd"])
    if t["mask"] is not None:
        dz = from_mask(dout, unpacked(t["mask"], torch.empty_like(x, memory_format=order_of(x))), code)
    else:
        dz = gradient(dout, z.to(t["x"].dtype).double(), code)
    size = size_of(dout) * (1 + size)
    centred = x - per_channel(t["mean"], x)
    dbias, product = over_channels(dz).sum(1), dz * centred
    dweight = over_channels(product).sum(1) * t["rstd"].double()
    scale = t["rstd"].double() * (1 if t["weight"] is None else t["weight"].double())
    dx, steepness = dz * per_channel(scale, x), size * size_of(scale)
    if t["training"]:
        n, rstd = over_channels(x).shape[1], t["rstd"].double()
        sigma = 1 / rstd - EPS
        curvature = torch.where(sigma > 0, rstd / sigma, 0.0) if t["eps_std"] else rstd * rstd
        shrink = scale * curvature * over_channels(product).sum(1) / n
        dx = dx - per_channel(shrink, x) * centred - per_channel(scale * dbias / n, x)
        steepness += size_of(shrink) * size_of(x, t["mean"]) + size_of(scale * dbias / n)
    terms = over_channels(dz.abs()).sum(1)
    truth = {
        "dx": (dx, steepness),
        "dbias": (dbias, size_of(terms) + size),
        "dweight": (dweight, (size_of(over_channels(product.abs()).sum(1)) + size * size_of(centred)) * size_of(t["rstd"])),
        "dresidual": (dz, size),
    }
    return truth | ({"open": (z.isnan(), 0.0)} if code == 5 and t["mask"] is None else {})


def laid_out(values: Tensor, layout: str, single: bool) -> Tensor:
    """nhwc or nchw; `+slice`: part of a larger tensor in every dimension but the batch. single: not in 16-byte steps."""
    order, _, sliced = layout.partition("+")
    channels_last = order == "nhwc" and values.dim() in CHANNELS_LAST
    memory_format = CHANNELS_LAST[values.dim()] if channels_last else torch.contiguous_format
    if not sliced:
        dense = values.contiguous(memory_format=memory_format)
        return shifted(dense) if single else dense
    n, c, h, w = values.shape
    gap = 1 if single else 8  # a whole vector of any type
    c_gap, w_gap = (gap, 2) if channels_last else (2, gap)
    whole = torch.full((n, c + 2 * c_gap, h + 3, w + 2 * w_gap), float("nan"), dtype=values.dtype)
    whole = whole.contiguous(memory_format=memory_format)
    return whole[:, c_gap : c_gap + c, 2 : 2 + h, w_gap : w_gap + w].copy_(values)


# name: shape, layouts, single accesses too, a small grid
SHAPES = {
    "wide": ((3, 24, 5, 7), ("nhwc", "nchw"), (False, True), True),
    "odd": ((2, 63, 5, 3), ("nhwc", "nchw"), (False,), True),
    "long": ((2, 24, 20, 21), ("nhwc", "nchw"), (False, True), True),
    "tiny": ((70, 9, 1, 3), ("nhwc", "nchw"), (False,), True),
    "batch": ((120, 3, 5, 7), ("nchw",), (False, True), True),
    "matrix": ((230, 16), ("nhwc",), (False, True), True),
    "plane": ((5, 1, 9, 9), ("nchw",), (False, True), False),
    "tiles": ((2, 264, 3, 4), ("nhwc", "nchw"), (False,), False),
    "slice": ((3, 16, 24, 24), ("nhwc+slice", "nchw+slice"), (False, True), True),
    "volume": ((2, 8, 3, 4, 5), ("nhwc", "nchw"), (False,), False),
    "tail": ((1, 7, 1, 17), ("nchw",), (False,), True),
    "few": ((2, 3, 1, 4), ("nhwc", "nchw"), (False,), False),
}
# What is tried on the shapes, four on each in turn: activation, training, residual, 1 / (sqrt(var) + eps), dtype
# of the vectors, affine. In every group of three are two with batch statistics.
VARIANTS = (
    (1, True, True, False, "acc", "wb"), (4, True, True, False, "acc", "b"), (5, False, False, True, "own", ""),
    (2, True, True, True, "own", "wb"), (0, True, False, False, "half", "wb"), (3, False, True, False, "acc", "w"),
    (3, True, False, True, "acc", "wb"), (5, True, True, False, "bfloat", "wb"), (4, False, True, False, "half", "wb"),
    (2, True, False, False, "bfloat", "wb"), (3, True, True, False, "acc", "wb"), (1, False, True, False, "acc", ""),
    (0, True, True, False, "own", "w"), (1, True, False, True, "acc", "wb"), (2, False, False, False, "bfloat", "wb"),
)  # fmt: skip
VECTOR_DTYPES = {"half": torch.float16, "bfloat": torch.bfloat16}


def calls(
    label: str, x: Tensor, residual: Tensor | None, dout: Tensor, variant: tuple[Any, ...], acc: torch.dtype, **flags: bool
) -> list[Case]:
    """Forward, backward, and backward from a mask where the activation has one and the kernel saves it."""
    code, training, _, eps_std, kind, affine = variant
    own = x.dtype if x.dtype != torch.float64 else torch.float64
    dtype = {"acc": acc, "own": own}.get(kind) or VECTOR_DTYPES[kind]
    channels = x.shape[1]
    weight, bias, mean = (random(channels, dtype=dtype, seed=s) for s in (4, 5, 6))
    variance = random(channels, dtype=dtype, seed=7).abs() + 0.5
    if "w" in affine and "b" in affine and dtype == acc and residual is not None and channels == 24:
        six, *smallest = at_kinks(x.dtype)
        for c in range(channels):  # z = bias + residual; x has NaN in every third channel from 1 on
            if c % 3 != 1:
                value, addend = six if c % 3 == 2 else smallest[c // 3 % 2]
                weight[c], bias[c] = 0.0, addend
                residual[:, c] = value
    if code in (2, 4):  # not at a multiple of 16 bytes
        weight, bias, mean, variance = map(shifted, (weight, bias, mean, variance))
    masks = code in MASKED and residual is not None
    shared = {
        "x": x, "weight": weight if "w" in affine else None, "bias": bias if "b" in affine else None, "residual": residual,
        "activation": code, "training": training, "eps": EPS, "eps_std": eps_std, "negative_slope": 0.1,
    }  # fmt: skip
    forward = shared | {"running_mean": mean, "running_var": variance, "momentum": MOMENTUM, "save_mask": masks}
    statistics = {"mean": mean.to(acc), "rstd": rstd_of(variance.double(), eps_std).to(acc)}
    needs = ("dx", "dweight", "dbias") + (("dresidual",) if residual is not None else ())
    other = forward | {"save_mask": not masks}  # (of zeros where the activation has none)
    backward = shared | statistics | {"dout": dout, "mask": None, "needs": needs}
    backward |= {} if code else {"residual": None}  # as the host code does: only what is needed
    truth = functools.partial
    found = [
        Case("bn_act", "fwd", f"fwd-{label}", forward, truth(forward_truth, forward), **flags),
        Case("bn_act", "fwd", f"fwd-{label}-other", other, truth(forward_truth, other), **flags),
        Case("bn_act", "bwd", f"bwd-{label}", backward, truth(backward_truth, backward), **flags),
    ]
    if masks:
        masked = backward | {"mask": random_bits(x.numel()), "residual": None}
        found.append(Case("bn_act", "bwd", f"bwd-{label}-mask", masked, truth(backward_truth, masked), **flags))
    return found


def cases(dtype: torch.dtype) -> list[Case]:
    """All calls of one dtype."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    found: list[Case] = []
    turn = 0
    for name, (shape, layouts, singles, few) in SHAPES.items():
        for layout in layouts:
            for single in singles:
                for variant in (*VARIANTS, *VARIANTS)[turn:][: len(VARIANTS) if name == "wide" else 4]:
                    x, residual, dout = (random(*shape, dtype=dtype, seed=s, nan=s == 1) for s in (1, 2, 3))
                    dense = layout.partition("+")[0]
                    x, residual = (laid_out(t, layout, single) for t in (x, residual))
                    dout = laid_out(dout, dense if variant[0] % 2 else layout, single)
                    mode = "train" if variant[1] else "eval"
                    label = f"{name}-{layout}-{'single' if single else 'vector'}-act{variant[0]}-{mode}"
                    found += calls(label, x, residual if variant[2] else None, dout, variant, acc, few_blocks=few)
                turn = (turn + 3) % len(VARIANTS)
    relu = VARIANTS[0]
    if dtype in (torch.float32, torch.float64):  # more than 256 partial results, for the kernels that merge them
        x, residual, dout = (laid_out(random(1, 9, 190, 200, dtype=dtype, seed=s), "nhwc", False) for s in (1, 2, 3))
        found += calls("parts", x, None, dout, relu, acc)
    for layout in ("nhwc", "nchw"):
        x, residual, dout = (laid_out(random(8, 64, 16, 32, dtype=dtype, seed=s), layout, False) for s in (1, 2, 3))
        found += calls(f"even-{layout}", x, residual, dout, relu, acc, few_blocks=True, even=True)
    return found
