"""Reference of ``bn_act`` from the formulas of Ioffe and Szegedy (2015), one torch op a step."""

from __future__ import annotations

import torch
from torch import Tensor

from .._activation import apply_activation


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over every dimension but channels, in fp32 (fp64 for fp64 input)."""
    wide = x if x.dtype == torch.float64 else x.float()
    dims = [d for d in range(x.dim()) if d != 1]
    return wide.mean(dims), wide.var(dims, unbiased=False)


def bn_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    eps_std: bool,
    activation: int,
    negative_slope: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(out, new_running_mean, new_running_var)``; the last two None in eval or without running statistics."""
    wide = x if x.dtype == torch.float64 else x.float()
    new_mean = new_var = None
    if training:
        mean, var = batch_statistics(x)
        if running_mean is not None and running_var is not None:
            n = x.numel() // x.shape[1]
            with torch.no_grad():
                new_mean = ((1 - momentum) * running_mean + momentum * mean).to(running_mean.dtype)
                new_var = ((1 - momentum) * running_var + momentum * var * (n / (n - 1))).to(running_var.dtype)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean.to(wide.dtype), running_var.to(wide.dtype)
    rstd = 1 / (var.sqrt() + eps) if eps_std else 1 / (var + eps).sqrt()
    shape = [1, -1] + [1] * (x.dim() - 2)
    z = (wide - mean.view(shape)) * rstd.view(shape)
    if weight is not None:
        z = z * weight.to(wide.dtype).view(shape)
    if bias is not None:
        z = z + bias.to(wide.dtype).view(shape)
    if residual is not None:
        z = z + residual.to(wide.dtype)
    # Rounded to x's dtype before the activation, so that the derivative at the kink sees the value torch sees.
    return apply_activation(z.to(x.dtype), activation, negative_slope), new_mean, new_var
