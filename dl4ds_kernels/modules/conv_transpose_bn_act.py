"""``ConvTransposeBNAct2d``: transposed convolution, BatchNorm and activation as one module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._activation import activation_code
from ._run import ActSpec
from ._transposed import run_conv_transpose_bn_act
from .bn_act import BNAct2d


class ConvTransposeBNAct2d(nn.Module):
    """``activation(bn(conv(x)))`` with a stock ``nn.ConvTranspose2d`` as ``conv`` and a BatchNorm2d as ``bn``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation: as
            ``nn.ConvTranspose2d`` (2x2 with stride 2 and without bias unless told otherwise).
        batch_norm: False leaves the BatchNorm out (``bn`` is None); the convolution then has a bias unless told otherwise.
        eps, momentum, eps_mode: of the BatchNorm, see :class:`BNAct2d`.
        activation, negative_slope: see :func:`dl4ds_kernels.functional.conv_transpose_bn_act`.

    Shape: x (N, C_in, H, W) -> (N, C_out, H_out, W_out), sizes as ``nn.ConvTranspose2d`` gives them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 2,
        stride: int | tuple[int, int] = 2,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool | None = None,
        dilation: int | tuple[int, int] = 1,
        *,
        batch_norm: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        eps_mode: str = "var",
        activation: str = "relu",
        negative_slope: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        activation_code("ConvTransposeBNAct2d", activation)
        made = {"device": device, "dtype": dtype}
        self.conv = nn.ConvTranspose2d(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups,
            not batch_norm if bias is None else bias, dilation, **made,
        )  # fmt: skip
        self.bn = BNAct2d(out_channels, eps, momentum, activation="none", eps_mode=eps_mode, **made) if batch_norm else None
        self.activation, self.negative_slope = activation, negative_slope
        self._act = ActSpec(activation, negative_slope)

    def forward(self, x: Tensor) -> Tensor:
        return run_conv_transpose_bn_act(x, self.conv, self.bn, self._act)

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
