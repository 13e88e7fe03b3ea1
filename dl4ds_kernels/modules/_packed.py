"""The inference path on the CPU: a packed weight and an op that does convolution and epilogue in one pass.

Every function returns None where the path does not apply, and the caller goes the general way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import _backend, _extension, _packing
from .._define import CPP, op
from ..functional._common import call
from ..functional.conv_bn_act import out_shape


class Epilogue(NamedTuple):
    """BatchNorm with running statistics (None: no BatchNorm) and an activation, in the order of the ops' schemas."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    eps_std: bool
    activation: int
    negative_slope: float

    def is_float32(self) -> bool:
        """Whether the kernels read these vectors without a conversion."""
        for v in (self.running_mean, self.running_var, self.weight, self.bias):
            if v is not None and v.dtype is not torch.float32:
                return False
        return True


def applies(x: Tensor, conv: nn.Conv2d, backend: str | None) -> bool:
    """Whether the path serves a call of this convolution on ``x`` at all."""
    asked = backend or _backend.current()
    return (
        asked in ("auto", "cpu")
        and type(conv.padding) is not str
        and type(x) is Tensor
        and x.dtype is torch.float32
        and x.is_cpu
        and x.numel() > 0
        and _packing.supported(conv._parameters["weight"])
        and _extension.status()["_C"].loaded
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
    )


def run_packed(
    x: Tensor, conv: nn.Conv2d, epilogue: Epilogue, residual: Tensor | None, exact: bool, backend: str | None
) -> Tensor | None:
    """``act(bn(conv(x)) [+ residual])``; x (N, C, H, W), residual (N, C_out, H_out, W_out)."""
    if not applies(x, conv, backend) or x.shape[1] != conv.in_channels or not epilogue.is_float32():
        return None
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    if residual is not None and not (
        residual.dtype is x.dtype
        and residual.device == x.device
        and tuple(residual.shape) == out_shape(x.shape, weight, *geometry[:3])
    ):
        return None
    algorithm, packed = _packing.packed_weight(conv, weight, x, *geometry, exact)
    if algorithm == _packing.LIBRARY:
        small = x.numel() // conv.in_channels * weight.numel() < _packing.MIN_LIBRARY_MACS
        if small or epilogue.running_mean is None:
            return None
        return call(op("conv_bn_act", CPP), False, x, packed, bias, *epilogue[:4], residual, *geometry, *epilogue[4:])
    return call(
        op("conv_bn_act_packed", CPP), False, x, weight, packed, algorithm, bias, *epilogue[:4], residual, *geometry,
        *epilogue[4:],
    )  # fmt: skip


def run_bn_act_conv_packed(
    xs: list[Tensor], prologue: Epilogue, conv: nn.Conv2d, epilogue: Epilogue, backend: str | None
) -> Tensor | None:
    """``act(bn(conv(act(bn(cat(xs))))))`` for a 1x1 convolution of stride 1; the concatenation is never written."""
    x = xs[0]
    if (
        not applies(x, conv, backend)
        or conv.kernel_size != (1, 1)
        or conv.stride != (1, 1)
        or conv.padding != (0, 0)
        or not (prologue.is_float32() and epilogue.is_float32())
        or sum(t.shape[1] for t in xs) != conv.in_channels
        or any(t.dtype is not torch.float32 or not t.is_cpu for t in xs)
        or any(t.shape[1] % 16 for t in xs[:-1])
    ):
        return None
    weight = conv._parameters["weight"]
    packed = _packing.direct_weight(conv, weight)
    if packed is None:
        return None
    return call(op("bn_act_conv_packed", CPP), False, xs, weight, packed, *prologue[:7], 1, conv._parameters["bias"], *epilogue)
