"""The one-kernel way of a bottleneck block's end in inference on CUDA, as the functional and the modules call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .._backend import select
from .._define import CPP, op
from ..ops._conv_bn_act_tail import has_tail
from ._common import call, eps_mode_flag, needs_grad

MIDDLE = 64  # kTailMiddle in csrc/ops/conv_bn_act/conv_bn_act_tail.h


def tail_fits(x: Tensor, weight: Tensor, weight2: Tensor, backend: str | None, *others: Tensor | None) -> bool:
    """Whether the op ``conv_bn_act_tail`` is to be asked: 64 channels in between, then a filter of 1x1, no gradient wanted.

    What its kernel leaves to others it knows itself; strides and padding of the second convolution are the caller's business.
    ``others``: biases, residual and the vectors of BatchNorm.
    """
    return (
        x.is_cuda
        and x.dim() == 4
        and weight.dim() == 4
        and weight.shape[0] == MIDDLE
        and tuple(weight2.shape[1:]) == (MIDDLE, 1, 1)
        and has_tail(CPP, x)
        and select("conv_bn_act", x, backend) == CPP
        and not needs_grad(x, weight, weight2, *others)
    )


def conv_tail(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: tuple[Any, ...], geometry: tuple[Any, ...], weight2: Tensor,
    bias2: Tensor | None, norm2: tuple[Any, ...], negative_slope: float, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """The op. ``norm``, ``norm2``: mean, var, weight, bias, eps, eps_std, activation code of a BatchNorm; ``geometry``: stride,
    padding, dilation (an int or a pair each) of the first convolution.
    """
    pairs = [[v, v] if isinstance(v, int) else list(v) for v in geometry]
    return call(
        op("conv_bn_act_tail"), False, x, weight, bias, *norm, *pairs, weight2, bias2, *norm2, negative_slope, residual
    )  # fmt: skip


def block_tail(
    x: Tensor, conv: Any, last: Any, projection: Any, shortcut: Callable[[], Tensor | None], code: int, negative_slope: float,
    backend: str | None,
) -> Tensor | None:  # fmt: skip
    """The last two ``ConvParams`` of a block in inference in one call, None where that is not for them.

    ``shortcut()`` makes what is added, the block's ``projection`` (or None) being part of it.
    """
    every = (conv, last) if projection is None else (conv, last, projection)
    if (
        not x.is_cuda
        or conv.groups != 1
        or last.groups != 1
        or last.stride not in (1, (1, 1))
        or last.padding not in (0, (0, 0))
        or any(layer.norm is None or layer.norm.running_mean is None for layer in (conv, last))
    ):
        return None
    others = [t for c in every for t in (c.weight, c.bias, *(() if c.norm is None else (c.norm.weight, c.norm.bias)))]
    if not tail_fits(x, conv.weight, last.weight, backend, *others):
        return None
    norms = [
        (bn.running_mean, bn.running_var, bn.weight, bn.bias, float(bn.eps), bn.eps_mode != "var" and
         eps_mode_flag("residual_block", bn.eps_mode), code) for bn in (conv.norm, last.norm)
    ]  # fmt: skip
    geometry = (conv.stride, conv.padding, conv.dilation)
    return conv_tail(
        x, conv.weight, conv.bias, norms[0], geometry, last.weight, last.bias, norms[1], negative_slope, shortcut()
    )  # fmt: skip
