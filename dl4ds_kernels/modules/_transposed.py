"""Inference of ``nn.ConvTranspose2d`` with a 2x2 kernel and stride 2 on the CPU: one GEMM with the epilogue fused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _packing
from .._define import op
from ..functional._common import call
from ._packed import Epilogue, applies
from ._run import _no_global_hooks, is_plain

# Multiply-adds of a call from which the kernel wins over stock torch, alone and with a BatchNorm or activation to save.
_LEAST_ALONE = 40_000_000
_LEAST_FUSED = 2_000_000
NO_EPILOGUE = Epilogue(None, None, None, None, 0.0, False, 0, 0.0)


def is_two_by_two(conv: nn.Module) -> bool:
    """Whether this is exactly ``nn.ConvTranspose2d(C, C_out, 2, stride=2)``, without hooks or a patched forward."""
    return (
        type(conv) is nn.ConvTranspose2d
        and conv.kernel_size == (2, 2)
        and conv.stride == (2, 2)
        and conv.padding == (0, 0)
        and conv.output_padding == (0, 0)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and is_plain(conv)
    )


def run_conv_transpose_act(
    x: Tensor, conv: nn.ConvTranspose2d, epilogue: Epilogue = NO_EPILOGUE, *, backend: str | None = None
) -> Tensor | None:
    """``act(bn(conv(x)))``, x (N, C, H, W) -> (N, C_out, 2 H, 2 W) in channels_last; None where the path does not apply."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_two_by_two(conv):
        return None
    if conv.training:
        _packing.drop(conv)
        return None
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    least = _LEAST_ALONE if epilogue.running_mean is None and epilogue.activation == 0 else _LEAST_FUSED
    if (
        not applies(x, conv, backend)
        or x.dim() != 4
        or x.shape[1] != conv.in_channels
        or x.numel() // conv.in_channels * weight.numel() < least
        or not epilogue.is_float32()
        or (bias is not None and bias.dtype is not torch.float32)
        or any(v is not None and not v.is_contiguous() for v in (*epilogue[:4], bias))
    ):
        return None
    packed = _packing.transposed_weight(conv, weight)
    if packed is None:
        return None
    return call(op("conv_transpose_bn_act_packed"), False, x, weight, packed, bias, *epilogue)


def run_conv_transpose(x: Tensor, conv: nn.Module, *, backend: str | None = None) -> Tensor:
    """``conv(x)`` of a stock module: the kernel where it applies, the module otherwise."""
    if isinstance(x, Tensor) and _no_global_hooks():
        out = run_conv_transpose_act(x, conv, backend=backend)
        if out is not None:
            return out
    return conv(x)
