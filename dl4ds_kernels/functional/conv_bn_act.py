"""``conv_bn_act``: 2-D convolution, BatchNorm, optional residual addition and activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import reference
from .._activation import ACTIVATION_CODES, MASK_CODES, activation_code, apply_activation
from .._backend import REFERENCE, STOCK, select
from .._define import CPP, op
from ..ops import _conv_bn_act_train
from ..ops._layout import conv_out_shape
from ._common import call, check_floating, check_residual, check_vector, eps_mode_flag, fail, needs_grad
from ._conv2d import conv2d
from .bn_act import bn_act


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    residual: Tensor | None = None,
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
    exact: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``activation(batch_norm(conv2d(x, weight, bias)) [+ residual])``.

    Without gradients and with running statistics this is one op: the library convolution (oneDNN, cuDNN; Triton's own for 1x1
    and 3x3) followed in place by one pass that applies scale, shift, residual and activation. In training, or where a gradient
    is needed, the library convolution is followed by :func:`bn_act`, forward and backward; on CUDA, training takes the batch
    statistics from the convolution's own epilogue where that is expected to be faster (docs/gpu-conv.md).

    Args:
        x: (N, C, H, W) or unbatched (C, H, W); NCHW or channels_last.
        weight: (C_out, C / groups, kH, kW). bias: (C_out,) or None.
        running_mean, running_var, bn_weight, bn_bias: (C_out,), see :func:`bn_act`.
        residual: (N, C_out, H_out, W_out), added before the activation.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv2d``, "valid" and "same" included.
        training, momentum, eps, eps_mode, activation, negative_slope, backend: as in :func:`bn_act`.
        exact: keep to algorithms within 2x of stock torch's own rounding error. Every algorithm in this release is.

    Returns:
        (N, C_out, H_out, W_out), laid out as ``conv2d`` lays it out. Differentiable once.

    Raises:
        TypeError: a tensor argument is not a tensor. RuntimeError: dtype, device, rank, shape or geometry do not fit.
        ValueError: one value per channel in training, unknown activation or mode.
    """
    try:
        if has_torch_function_variadic(x, weight, residual):
            return handle_torch_function(
                conv_bn_act, (x, weight, residual), x, weight, bias, running_mean=running_mean, running_var=running_var,
                bn_weight=bn_weight, bn_bias=bn_bias, residual=residual, stride=stride, padding=padding, dilation=dilation,
                groups=groups, training=training, momentum=momentum, eps=eps, eps_mode=eps_mode, activation=activation,
                negative_slope=negative_slope, exact=exact, backend=backend,
            )  # fmt: skip
        fused = (
            not training
            and x.dim() == 4
            and not isinstance(padding, str)
            and running_mean is not None
            and not needs_grad(x, weight, bias, bn_weight, bn_bias, residual)
        )
        path = select("conv_bn_act", x, backend) if fused else STOCK
        if path is not STOCK:
            return _fused(
                path, x, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual,
                (_pair(stride), _pair(padding), _pair(dilation), groups), momentum, eps,
                eps_mode != "var" and eps_mode_flag("conv_bn_act", eps_mode), ACTIVATION_CODES[activation], negative_slope,
            )  # fmt: skip
        if training and _conv_bn_act_train.has_train(CPP, x) and select("conv_bn_act", x, backend) == CPP:
            out = _train(
                x, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual,
                (_pair(stride), padding, _pair(dilation), groups), momentum, eps,
                eps_mode != "var" and eps_mode_flag("conv_bn_act", eps_mode), ACTIVATION_CODES[activation], negative_slope,
            )  # fmt: skip
            if out is not None:
                return out
        y = conv2d(x, weight, bias, stride, padding, dilation, groups, backend)
        unbatched = y.dim() == 3
        if unbatched:
            y = y.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
        out = bn_act(
            y, running_mean, running_var, bn_weight, bn_bias, residual=residual, training=training, momentum=momentum,
            eps=eps, eps_mode=eps_mode, activation=activation, negative_slope=negative_slope, backend=backend,
        )  # fmt: skip
        return out.squeeze(0) if unbatched else out
    except Exception:
        _explain(
            x, weight, bias, residual, stride, padding, dilation, groups, activation,
            running_mean, running_var, bn_weight, bn_bias,
        )  # fmt: skip
        raise


def _fused(
    path: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    residual: Tensor | None,
    geometry: tuple[list[int], list[int], list[int], int],
    momentum: float,
    eps: float,
    eps_std: bool,
    code: int,
    negative_slope: float,
) -> Tensor:
    """The inference op on the kernels of ``path``."""
    if path is REFERENCE:
        return reference.conv_bn_act(
            x, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual, *geometry, False, momentum, eps, eps_std,
            code, negative_slope,
        )[0]  # fmt: skip
    fits = residual is None or (
        residual.dtype == x.dtype and tuple(residual.shape) == out_shape(x.shape, weight, *geometry[:3])
    )
    out = call(
        op("conv_bn_act", path), False, x, weight, bias, running_mean, running_var, bn_weight, bn_bias,
        residual if fits else None, *geometry, eps, eps_std, code if fits else 0, negative_slope,
    )  # fmt: skip
    # A residual of another shape or dtype is left to torch's own broadcasting and promotion.
    return out if fits else apply_activation(out + residual, code, negative_slope)


def _train(
    x: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, residual: Tensor | None, geometry: tuple[Any, ...], momentum: float,
    eps: float, eps_std: bool, code: int, negative_slope: float,
) -> Tensor | None:  # fmt: skip
    """The training op; None for what it leaves to the layers one by one (whose errors are the clearer ones)."""
    stride, padding, dilation, groups = geometry
    if x.dim() != 4 or weight.dim() != 4 or isinstance(padding, str):
        return None
    geometry = (stride, _pair(padding), dilation, groups)
    shape = out_shape(x.shape, weight, *geometry[:3])
    if min(shape) < 1 or shape[0] * shape[2] * shape[3] == 1:
        return None
    if residual is not None and (residual.dtype != x.dtype or tuple(residual.shape) != shape):
        return None
    grad = needs_grad(x, weight, bias, bn_weight, bn_bias, residual)
    out, _, _, _, _, new_mean, new_var = call(
        op("conv_bn_act_train"), grad, x, weight, bias, running_mean, running_var, bn_weight, bn_bias, residual, *geometry,
        momentum, eps, eps_std, code, negative_slope, grad and residual is not None and code in MASK_CODES,
    )  # fmt: skip
    if running_mean is not None:
        with torch.no_grad():
            running_mean.copy_(new_mean)
            running_var.copy_(new_var)
    return out


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def out_shape(
    shape: Sequence[int], weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """(N, C_out, H_out, W_out) of the convolution of an input of ``shape`` (N, C, H, W)."""
    return conv_out_shape(shape, weight.shape, stride, padding, dilation)


def _explain(
    x: Any, weight: Any, bias: Any, residual: Any, stride: Any, padding: Any, dilation: Any, groups: int, activation: Any,
    *vectors: Any,
) -> None:  # fmt: skip
    """Raise the clear error for bad input; return where the input is fine and the error has another cause."""
    activation_code("conv_bn_act", activation)
    check_floating("conv_bn_act", "x", x)
    check_floating("conv_bn_act", "weight", weight)
    if x.dim() not in (3, 4):
        fail("conv_bn_act", "x", "(N, C, H, W) or (C, H, W)", tuple(x.shape))
    if weight.dim() != 4:
        fail("conv_bn_act", "weight", "(C_out, C / groups, kH, kW)", tuple(weight.shape))
    channels, channels_out = weight.shape[1] * groups, weight.shape[0]
    if x.shape[-3] != channels:
        fail(
            "conv_bn_act",
            "x",
            f"{channels} channels for weight {tuple(weight.shape)} with groups={groups}",
            f"{x.shape[-3]} (shape {tuple(x.shape)})",
        )
    if weight.device != x.device:
        fail("conv_bn_act", "weight", f"a tensor on {x.device} like x", weight.device)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        fail("conv_bn_act", "weight", f"dtype {x.dtype} like x", weight.dtype)
    for name, vector in zip(("bias", "running_mean", "running_var", "bn_weight", "bn_bias"), (bias, *vectors), strict=True):
        check_vector("conv_bn_act", name, vector, x, channels_out)
    if residual is not None:
        shape = torch.conv2d(x.to("meta"), weight.to("meta"), None, stride, padding, dilation, groups).shape
        check_residual("conv_bn_act", residual, shape, x.device)
