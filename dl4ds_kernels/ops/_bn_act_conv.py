"""Contract of ``bn_act_conv``: ``conv2d(act(batch_norm(x)))`` in inference on CUDA, and a BatchNorm and activation behind it.

A 1x1 convolution can normalise its input on the way in (csrc/ops/conv_bn_act/conv_bn_act_prologue*); everything else is
``bn_act`` and then the convolution, which is what every other backend does, so there is no CPU or Triton kernel. In training
the prologue would save nothing: the filter's gradient needs the normalised input, so backward would make it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._define import define_op, has_kernel
from .conv_bn_act import _convolve


def has_prologue(namespace: str, x: Tensor) -> bool:
    """Whether the op has a kernel for x (fp64 has none)."""
    return x.is_cuda and x.dtype != torch.float64 and has_kernel("bn_act_conv", namespace, "cuda")


def _fake(x: Tensor, *args: Any) -> Tensor:
    weight, bias, geometry = args[8], args[9], args[15:19]
    return _convolve(x, weight, bias, geometry)


def _autocast(dtype: torch.dtype, x: Tensor, *args: Any) -> tuple[Any, ...]:
    """The functionals ask for the op where x is of the autocast dtype: the filter and what is added follow it."""

    def cast(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dtype == torch.float64 else t.to(x.dtype)

    return (x, *args[:8], cast(args[8]), cast(args[9]), *args[10:14], cast(args[14]), *args[15:])


def _fake_route(*args: Any) -> list[int]:
    raise RuntimeError("bn_act_conv_route: asks about eager calls; it needs tensors with memory")


define_op(
    "bn_act_conv",
    "(Tensor x, Tensor in_mean, Tensor in_var, Tensor? in_weight, Tensor? in_bias, float in_eps, bool in_eps_std, "
    "int in_activation, float in_slope, Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    "Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups, float eps, "
    "bool eps_std, int activation, float negative_slope) -> Tensor",
    fake=_fake,
    autocast=_autocast,
    stem="conv_bn_act",
    triton=False,
)
# What dk.explain tells of a CUDA call: dl4ds_kernels/_cuda_conv.py.
define_op(
    "bn_act_conv_route",
    "(Tensor x, Tensor weight, int in_activation, bool epilogue, bool residual, int[] stride, int[] padding, int[] dilation, "
    "int groups, int activation) -> int[]",
    fake=_fake_route,
    stem="conv_bn_act",
    triton=False,
)
