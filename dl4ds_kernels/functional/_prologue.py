"""The one-kernel way of ``conv(act(bn(x)))`` in inference on CUDA, as the functional and the modules call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backend import select
from .._define import CPP, op
from ..ops._bn_act_conv import has_prologue
from ._common import call, needs_grad

NOTHING = (None, None, None, None, 0.0, False, 0, 0.0)  # behind the convolution: no BatchNorm, no activation


def prologue_fits(x: Tensor, weight: Tensor, padding: Any, backend: str | None, *others: Tensor | None) -> bool:
    """Whether the op ``bn_act_conv`` is to be asked: a 1x1 convolution on CUDA of which nobody needs a gradient.

    What its kernel leaves to others it knows itself. ``others``: bias and the vectors of BatchNorm.
    """
    return (
        x.is_cuda
        and x.dim() == 4
        and weight.dim() == 4
        and tuple(weight.shape[2:]) == (1, 1)
        and not isinstance(padding, str)
        and has_prologue(CPP, x)
        and select("bn_act", x, backend) == CPP
        # Under autocast BatchNorm comes first, in x's own type.
        and (not torch.is_autocast_enabled("cuda") or torch.get_autocast_dtype("cuda") == x.dtype)
        and not needs_grad(x, weight, *others)
    )


def prologue_conv(
    x: Tensor, before: tuple[Any, ...], weight: Tensor, bias: Tensor | None, behind: tuple[Any, ...], geometry: tuple[Any, ...],
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The op. ``before``, ``behind``: mean, var, weight, bias, eps, eps_std, activation, negative_slope of a BatchNorm;
    ``geometry``: stride, padding, dilation (an int or a pair each), groups.
    """
    pairs = [[v, v] if isinstance(v, int) else list(v) for v in geometry[:3]]
    vectors, scalars = behind[:4], behind[4:]
    return call(
        op("bn_act_conv"), False, x, *before, weight, bias, *vectors, residual, *pairs, geometry[3], *scalars
    )  # fmt: skip
