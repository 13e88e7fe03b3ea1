"""Reference of ``conv_transpose_bn_act``: torch's transposed convolution, then the ``bn_act`` reference."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._activation import apply_activation
from .bn_act import bn_act


def conv_transpose_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    eps_std: bool,
    activation: int,
    negative_slope: float,
) -> Tensor:
    """With running statistics; without them there is no BatchNorm."""
    y = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    if running_mean is None:
        return apply_activation(y, activation, negative_slope)
    return bn_act(y, bn_weight, bn_bias, running_mean, running_var, None, False, 0.0, eps, eps_std, activation, negative_slope)[
        0
    ]
