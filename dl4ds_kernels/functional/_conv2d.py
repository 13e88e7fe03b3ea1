"""``conv2d`` of a training step, as the functionals and modules call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backend import select
from .._cpu_conv import choose
from .._define import CPP, op


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """``torch.conv2d``, by ``conv2d_step`` where one of its three convolutions (output, gradients) has a faster kernel.

    Shapes, layouts and errors as ``torch.conv2d``. fp32 maps in channels_last on the CPU, eager mode; there differentiable
    once.
    """
    if x.device.type == "cpu" and x.dim() == 4 and not isinstance(padding, str) and not torch.compiler.is_compiling():
        geometry = tuple((v, v) if isinstance(v, int) else tuple(v) for v in (stride, padding, dilation))
        if select("conv_bn_act", x, backend) == CPP and any(choose(x, weight, (*geometry, groups))):
            return op("conv2d_step")(x, weight, bias, *geometry, groups)
    return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
