"""``bn_act_max_pool``: BatchNorm, activation and max-pooling, keeping only the input for backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import reference
from .._activation import ACTIVATION_CODES, activation_code
from .._backend import REFERENCE, STOCK, select
from .._define import op
from ._common import call, check_floating, check_vector, eps_mode_flag, fail, needs_grad
from .bn_act import bn_act
from .conv_bn_act import _pair

Size = int | tuple[int, int]


def bn_act_max_pool(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kernel_size: Size = 3,
    stride: Size | None = 2,
    pool_padding: Size = 1,
    dilation: Size = 1,
    ceil_mode: bool = False,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    eps_mode: str = "var",
    activation: str = "relu",
    negative_slope: float = 0.1,
    backend: str | None = None,
) -> Tensor:
    """``max_pool2d(activation(batch_norm(x)))``, what follows the first convolution of a ResNet or DenseNet.

    With gradients one autograd node that keeps ``x`` and per-channel statistics; the activated map and the places of its
    maxima are made again in backward. Without, :func:`bn_act` and torch's pooling.

    Args:
        x: (N, C, H, W), NCHW or channels_last; float32, float64, float16 or bfloat16.
        kernel_size, stride, pool_padding, dilation, ceil_mode: as in ``torch.nn.functional.max_pool2d``.
        running_mean, running_var, weight, bias, training, momentum, eps, eps_mode, activation, negative_slope, backend: as in
            :func:`bn_act`.

    Returns:
        (N, C, H_out, W_out), channels_last if ``x`` is. Differentiable once in x, weight and bias.

    Raises:
        TypeError: a tensor argument is not a tensor. RuntimeError: dtype, device, rank or shape do not fit.
        ValueError: one value per channel in training, unknown activation or mode.
    """
    try:
        if has_torch_function_variadic(x):
            return handle_torch_function(
                bn_act_max_pool, (x,), x, running_mean, running_var, weight, bias, kernel_size=kernel_size, stride=stride,
                pool_padding=pool_padding, dilation=dilation, ceil_mode=ceil_mode, training=training, momentum=momentum,
                eps=eps, eps_mode=eps_mode, activation=activation, negative_slope=negative_slope, backend=backend,
            )  # fmt: skip
        stride = kernel_size if stride is None else stride
        eps_std = eps_mode != "var" and eps_mode_flag("bn_act_max_pool", eps_mode)
        path = select("bn_act_max_pool", x, backend)
        if path is REFERENCE:
            out, new_mean, new_var = reference.bn_act_max_pool(
                x, weight, bias, running_mean, running_var, None, training, momentum, eps, eps_std,
                ACTIVATION_CODES[activation], negative_slope, pool=(kernel_size, stride, pool_padding, dilation, ceil_mode),
            )  # fmt: skip
        elif path is STOCK or x.dim() != 4 or x.numel() <= x.shape[1] or not needs_grad(x, weight, bias):
            z = bn_act(
                x, running_mean, running_var, weight, bias, training=training, momentum=momentum, eps=eps, eps_mode=eps_mode,
                activation=activation, negative_slope=negative_slope, backend=backend,
            )  # fmt: skip
            return TF.max_pool2d(z, kernel_size, stride, pool_padding, dilation, ceil_mode)
        else:
            out, _, _, new_mean, new_var = call(
                op("bn_act_max_pool", path), True, x, weight, bias, running_mean, running_var, training, momentum, eps, eps_std,
                ACTIVATION_CODES[activation], negative_slope, _pair(kernel_size), _pair(stride), _pair(pool_padding),
                _pair(dilation), ceil_mode,
            )  # fmt: skip
        if training and running_mean is not None:
            with torch.no_grad():
                running_mean.copy_(new_mean)
                running_var.copy_(new_var)
        return out
    except Exception:
        _explain(x, activation, running_mean, running_var, weight, bias)
        raise


def _explain(x: Any, activation: Any, *vectors: Any) -> None:
    """Raise the clear error for bad input; return where the input is fine and the error has another cause."""
    activation_code("bn_act_max_pool", activation)
    check_floating("bn_act_max_pool", "x", x)
    if x.dim() != 4:
        fail("bn_act_max_pool", "x", "(N, C, H, W)", tuple(x.shape))
    for name, vector in zip(("running_mean", "running_var", "weight", "bias"), vectors, strict=True):
        check_vector("bn_act_max_pool", name, vector, x, x.shape[1])
