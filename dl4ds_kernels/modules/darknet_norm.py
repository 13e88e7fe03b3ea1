"""BatchNorm as darknet trains it: normalising, too, with the unbiased variance of the batch (divisor N - 1).

PyTorch normalises with the biased variance and keeps a running average of the unbiased one; darknet uses the unbiased one for
both. With N values a channel and ``k = sqrt(N / (N - 1))`` the unbiased deviation is k times the biased one, so darknet's
result is the fused kernel's with ``weight / k`` and ``eps / k`` (or ``eps / k^2`` under the root): no kernel of its own, and
the gradients of both are right because k is a constant.

Reference: darknet, src/blas.c (variance_cpu, normalize_cpu) and src/batchnorm_layer.c.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..functional import bn_act
from ._run import is_plain
from .bn_act import BNAct2d, batch_statistics_choice
from .conv_bn_act import ConvBNAct2d


def darknet_bn_act(x: Tensor, bn: BNAct2d, activation: str = "none", negative_slope: float = 0.1) -> Tensor:
    """``activation(bn(x))`` in training with the unbiased variance of the batch.

    Args: x (N, C, H, W), at least two values a channel. Returns the same shape; updates the running statistics of ``bn``.
    """
    training, momentum, running_mean, running_var = batch_statistics_choice(bn)
    values = x.numel() // max(x.shape[1], 1)
    weight, eps = bn.weight, bn.eps
    if training and values > 1:
        k = math.sqrt(values / (values - 1))
        weight, eps = weight / k, eps / (k if bn.eps_mode == "std" else k * k)
    return bn_act(
        x, running_mean, running_var, weight, bn.bias, training=training, momentum=momentum, eps=eps, eps_mode=bn.eps_mode,
        activation=activation, negative_slope=negative_slope,
    )  # fmt: skip


class DarknetBatchNorm2d(BNAct2d):
    """``BNAct2d`` without activation, normalising with the unbiased variance while it trains; the same in eval."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, activation="none", **options)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.training or residual is not None:
            return super().forward(x, residual)
        self._check_input_dim(x)
        return darknet_bn_act(x, self)


class DarknetConvBNAct2d(ConvBNAct2d):
    """``ConvBNAct2d`` whose BatchNorm trains as darknet's does; in eval it is a ``ConvBNAct2d``."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        bn = self.bn
        if not bn.training or residual is not None or type(bn) is not BNAct2d or not is_plain(bn):
            return super().forward(x, residual)
        return darknet_bn_act(self.conv(x), bn, self.activation, self.negative_slope)
