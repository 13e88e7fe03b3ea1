"""Reference of ``residual_block``: convolutions and the ``bn_act`` reference, one after the other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._activation import apply_activation
from ..ops._block_code import IDENTITY, Block, Conv, Norm
from .bn_act import bn_act


def residual_block(
    x: Tensor, convs: list[Tensor], norms: list[Tensor], running: list[Tensor], block: Block, training: bool
) -> tuple[Tensor, list[Tensor]]:
    """``(out, new running statistics in the order of block.norms)``."""
    new_running: dict[int, tuple[Tensor, Tensor]] = {}

    def convolve(z: Tensor, conv: Conv) -> Tensor:
        bias = convs[conv.bias] if conv.bias >= 0 else None
        return F.conv2d(z, convs[conv.weight], bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def normalise(y: Tensor, norm: Norm) -> Tensor:
        weight, bias = (norms[place] if place >= 0 else None for place in (norm.weight, norm.bias))
        mean, var = (running[norm.running + i] if norm.running >= 0 else None for i in (0, 1))
        z, new_mean, new_var = bn_act(y, weight, bias, mean, var, None, training, norm.momentum, norm.eps, norm.eps_std, 0, 0.0)
        if new_mean is not None:
            new_running[norm.index] = (new_mean, new_var)
        return z

    def act(z: Tensor) -> Tensor:
        return apply_activation(z, block.activation, block.negative_slope)

    z = source = x
    for i, conv in enumerate(block.convs):
        if block.preact and conv.norm is not None:
            z = act(normalise(z, conv.norm))
            source = z if i == 0 else source
        z = convolve(z, conv)
        if not block.preact:
            z = normalise(z, conv.norm)
            z = act(z) if i + 1 < len(block.convs) else z
    if block.shortcut == IDENTITY:
        z = z + x
    elif block.projection is not None:
        shortcut = convolve(source, block.projection)
        z = z + (shortcut if block.projection.norm is None else normalise(shortcut, block.projection.norm))
    z = z * block.alpha if block.preact else act(z)
    return z, [t for index in sorted(new_running) for t in new_running[index]]
