"""``bn_act_conv``: the pre-activation prologue, BatchNorm and activation of the input of a convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .._activation import activation_code
from ._common import check_floating, check_vector, eps_mode_flag, fail
from ._conv2d import conv2d
from ._prologue import NOTHING, prologue_conv, prologue_fits
from .bn_act import bn_act


def bn_act_conv(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    eps_mode: str = "var",
    activation: str = "relu",
    negative_slope: float = 0.1,
    backend: str | None = None,
) -> Tensor:
    """``conv2d(activation(batch_norm(x)), weight, bias)``: what a pre-activation or DenseNet layer does with its input.

    The BatchNorm cannot be folded into the convolution before it (the skip connection uses the same input), nor, with zero
    padding behind an activation, into the one after it. :func:`bn_act`, forward and backward, and the library convolution; in
    inference on CUDA a 1x1 convolution behind relu can normalise its input on the way in, in one kernel (docs/gpu-conv.md).

    Args:
        x: (N, C_in, H, W), NCHW or channels_last. running_mean, running_var, bn_weight, bn_bias: (C_in,), see :func:`bn_act`.
        weight: (C_out, C_in / groups, kH, kW). bias: (C_out,) or None.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``. Padding pads the activated tensor with zeros.
        training, momentum, eps, eps_mode, activation, negative_slope, backend: as in :func:`bn_act`.

    Returns:
        (N, C_out, H_out, W_out), laid out as ``conv2d`` lays it out. Differentiable once.

    Raises:
        TypeError: a tensor argument is not a tensor. RuntimeError: dtype, device, rank, shape or geometry do not fit.
        ValueError: one value per channel in training, unknown activation or mode.

    Reference: He et al., Identity Mappings in Deep Residual Networks, 2016.
    """
    try:
        if has_torch_function_variadic(x, weight):
            return handle_torch_function(
                bn_act_conv, (x, weight), x, running_mean, running_var, bn_weight, bn_bias, weight, bias, stride=stride,
                padding=padding, dilation=dilation, groups=groups, training=training, momentum=momentum, eps=eps,
                eps_mode=eps_mode, activation=activation, negative_slope=negative_slope, backend=backend,
            )  # fmt: skip
        if x.dim() != 4:
            fail("bn_act_conv", "x", "(N, C, H, W)", tuple(x.shape))
        if not training and running_mean is not None and prologue_fits(x, weight, padding, backend, bias, bn_weight, bn_bias):
            flag, code = eps_mode_flag("bn_act_conv", eps_mode), activation_code("bn_act_conv", activation)
            before = (running_mean, running_var, bn_weight, bn_bias, eps, flag, code, negative_slope)
            return prologue_conv(x, before, weight, bias, NOTHING, (stride, padding, dilation, groups))
        z = bn_act(
            x, running_mean, running_var, bn_weight, bn_bias, training=training, momentum=momentum, eps=eps,
            eps_mode=eps_mode, activation=activation, negative_slope=negative_slope, backend=backend,
        )  # fmt: skip
        return conv2d(z, weight, bias, stride, padding, dilation, groups, backend)
    except Exception:
        _explain(x, weight, bias, groups, activation, eps_mode, running_mean, running_var, bn_weight, bn_bias)
        raise


def _explain(
    x: Any, weight: Any, bias: Any, groups: int, activation: Any, eps_mode: Any, *vectors: Any
) -> None:  # fmt: skip
    """Raise the clear error for bad input; return where the input is fine and the error has another cause."""
    activation_code("bn_act_conv", activation)
    eps_mode_flag("bn_act_conv", eps_mode)
    check_floating("bn_act_conv", "x", x)
    check_floating("bn_act_conv", "weight", weight)
    if x.dim() != 4:
        fail("bn_act_conv", "x", "(N, C, H, W)", tuple(x.shape))
    if weight.dim() != 4:
        fail("bn_act_conv", "weight", "(C_out, C_in / groups, kH, kW)", tuple(weight.shape))
    channels = weight.shape[1] * groups
    if x.shape[1] != channels:
        fail("bn_act_conv", "x", f"{channels} channels for weight {tuple(weight.shape)} with groups={groups}", tuple(x.shape))
    if weight.device != x.device:
        fail("bn_act_conv", "weight", f"a tensor on {x.device} like x", weight.device)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        fail("bn_act_conv", "weight", f"dtype {x.dtype} like x", weight.dtype)
    check_vector("bn_act_conv", "bias", bias, x, weight.shape[0])
    for name, vector in zip(("running_mean", "running_var", "bn_weight", "bn_bias"), vectors, strict=True):
        check_vector("bn_act_conv", name, vector, x, channels)
