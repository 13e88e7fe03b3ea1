"""bn_act in fp64: results and gradients from the formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .workload import MASKED, Truth, activation, from_mask, gradient, positive, size_of, unpacked

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
