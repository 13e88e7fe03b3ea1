"""``cat_bn_act``: BatchNorm and activation of a concatenation that is never made. For modules; inference only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._backend import REFERENCE, STOCK, select
from .._define import op
from ._common import call


def cat_bn_act(
    xs: Sequence[Tensor],
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    eps_std: bool,
    activation: int,
    negative_slope: float,
    backend: str | None = None,
) -> Tensor | None:
    """``act(batch_norm(cat(xs, 1)))`` with running statistics, each part written into its channels of one buffer.

    A read and a write of every element instead of two of each. None where that does not apply: gradients are on, the parts are
    not channels_last maps (or channel slices of some) of one dtype, device and size, or no kernel would be taken.
    """
    x = xs[0]
    channels = sum(t.shape[1] for t in xs)
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or channels != running_mean.numel()
        or any(
            type(t) is not Tensor
            or t.dim() != 4
            or t.dtype is not x.dtype
            or t.device != x.device
            or t.shape[0] != x.shape[0]
            or t.shape[2:] != x.shape[2:]
            or (t.stride(1) != 1 and t.shape[1] > 1)
            for t in xs
        )
        or x.shape[2] * x.shape[3] == 1
        or x.numel() == 0
    ):
        return None
    path = select("bn_act", x, backend)
    if path is STOCK or path is REFERENCE:
        return None
    n, _, height, width = x.shape
    out = torch.empty((n, channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    first = 0
    for t in xs:
        last = first + t.shape[1]
        vectors = [None if v is None else v[first:last] for v in (weight, bias, running_mean, running_var)]
        call(op("bn_act_into", path), False, t, *vectors, out[:, first:last], eps, eps_std, activation, negative_slope)
        first = last
    return out
