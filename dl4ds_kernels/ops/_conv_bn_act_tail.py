"""Contract of ``conv_bn_act_tail``: the end of a bottleneck block in inference on CUDA.

``act2(bn2(conv1x1(act(bn(conv(x))))) [+ residual])``: one kernel where 64 channels lie between the convolutions and that is
expected to be faster (csrc/ops/conv_bn_act/conv_bn_act_tail*), else ``conv_bn_act`` twice, which is what every other backend
does. So there is no CPU or Triton kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._define import define_op, has_kernel
from .conv_bn_act import _convolve


def has_tail(namespace: str, x: Tensor) -> bool:
    """Whether the op has a kernel for x (fp64 has none)."""
    return x.is_cuda and x.dtype != torch.float64 and has_kernel("conv_bn_act_tail", namespace, "cuda")


def _fake(x: Tensor, *args: Any) -> Tensor:
    z = _convolve(x, args[0], args[1], (*args[9:12], 1))
    return _convolve(z, args[12], args[13], ([1, 1], [0, 0], [1, 1], 1))


def _autocast(dtype: torch.dtype, x: Tensor, *args: Any) -> tuple[Any, ...]:
    """As two calls of ``conv_bn_act``: operands, biases and residual in the autocast dtype, BatchNorm vectors as they are."""

    def cast(t: Tensor | None) -> Tensor | None:
        return t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype)

    weight, bias, *before = args[:12]
    weight2, bias2, *behind = args[12:22]
    return (cast(x), cast(weight), cast(bias), *before, cast(weight2), cast(bias2), *behind, cast(args[22]))


def _fake_route(*args: Any) -> list[int]:
    raise RuntimeError("conv_bn_act_tail_route: asks about eager calls; it needs tensors with memory")


define_op(
    "conv_bn_act_tail",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor running_mean, Tensor running_var, Tensor? bn_weight, Tensor? bn_bias, "
    "float eps, bool eps_std, int activation, int[] stride, int[] padding, int[] dilation, Tensor weight2, Tensor? bias2, "
    "Tensor running_mean2, Tensor running_var2, Tensor? bn_weight2, Tensor? bn_bias2, float eps2, bool eps_std2, "
    "int activation2, float negative_slope, Tensor? residual) -> Tensor",
    fake=_fake,
    autocast=_autocast,
    stem="conv_bn_act",
    triton=False,
)
# What dk.explain tells of a CUDA call: dl4ds_kernels/_cuda_conv.py.
define_op(
    "conv_bn_act_tail_route",
    "(Tensor x, Tensor weight, Tensor weight2, bool residual, int[] stride, int[] padding, int[] dilation, int activation, "
    "int activation2) -> int[]",
    fake=_fake_route,
    stem="conv_bn_act",
    triton=False,
)
