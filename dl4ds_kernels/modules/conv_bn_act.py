"""``ConvBNAct2d``: convolution, BatchNorm, optional residual and activation as one module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._run import ActSpec, run_conv_bn_act
from .bn_act import BNAct2d


class ConvBNAct2d(nn.Module):
    """``activation(bn(conv(x)) [+ residual])`` with the attribute names ``conv`` and ``bn`` of timm and torchvision.

    ``conv`` is a stock ``nn.Conv2d`` and ``bn`` a BatchNorm2d without activation of its own, so that hooks, SyncBatchNorm
    conversion and state_dicts work as with the two layers. In eval without gradients the convolution runs with a prepacked
    weight and one fused epilogue.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as ``nn.Conv2d`` (bias off).
        eps, momentum, eps_mode: of the BatchNorm, see :class:`BNAct2d`.
        activation, negative_slope: see :func:`dl4ds_kernels.functional.conv_bn_act`.

    Shape: x (N, C_in, H, W), residual (N, C_out, H_out, W_out) -> (N, C_out, H_out, W_out).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        eps_mode: str = "var",
        activation: str = "relu",
        negative_slope: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        self.bn = BNAct2d(out_channels, eps, momentum, activation="none", eps_mode=eps_mode, device=device, dtype=dtype)
        self.activation, self.negative_slope = activation, negative_slope
        self._act = ActSpec(activation, negative_slope)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return run_conv_bn_act(x, self.conv, self.bn, self._act, residual)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
