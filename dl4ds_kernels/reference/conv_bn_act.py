"""Reference of ``conv_bn_act``: convolution, then the ``bn_act`` reference."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .bn_act import bn_act


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    training: bool,
    momentum: float,
    eps: float,
    eps_std: bool,
    activation: int,
    negative_slope: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(out, new_running_mean, new_running_var)`` as in :func:`~dl4ds_kernels.reference.bn_act.bn_act`."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return bn_act(
        y, bn_weight, bn_bias, running_mean, running_var, residual, training, momentum, eps, eps_std, activation, negative_slope
    )
