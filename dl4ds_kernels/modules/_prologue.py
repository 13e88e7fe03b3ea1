"""The one-kernel inference path on CUDA of BatchNorm - relu - 1x1 convolution [- BatchNorm - activation]."""

from __future__ import annotations

from torch import Tensor, nn

from ..functional._prologue import NOTHING, prologue_conv, prologue_fits
from ._packed import Epilogue


def run_prologue_conv(
    x: Tensor, prologue: Epilogue, conv: nn.Conv2d, epilogue: Epilogue | None, backend: str | None
) -> Tensor | None:
    """``[act(bn(]conv(act(bn(x)))[))]``; None where the path does not apply and the caller goes the general way."""
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    behind = NOTHING if epilogue is None else epilogue
    if (
        prologue.running_mean is None
        or (epilogue is not None and epilogue.running_mean is None)
        or x.dim() != 4
        or not prologue_fits(x, weight, conv.padding, backend, bias, prologue.weight, prologue.bias, *behind[2:4])
        or x.shape[1] != conv.in_channels
    ):
        return None
    return prologue_conv(
        x, tuple(prologue), weight, bias, tuple(behind), (conv.stride, conv.padding, conv.dilation, conv.groups)
    )
