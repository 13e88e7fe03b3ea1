"""``conv_transpose_bn_act``: 2-D transposed convolution, BatchNorm and activation, the way up of U-Net and DeconvNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import reference
from .._activation import ACTIVATION_CODES, activation_code, apply_activation
from .._backend import REFERENCE, STOCK, current, is_large, select
from .._define import CPP, op
from ._common import call, check_floating, check_vector, eps_mode_flag, fail, needs_grad
from .bn_act import bn_act
from .conv_bn_act import _pair

_OP = "conv_transpose_bn_act"
_MIN_NUMEL_PLAIN = 262144


def conv_transpose_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    batch_norm: bool | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    eps_mode: str = "var",
    activation: str = "relu",
    negative_slope: float = 0.1,
    backend: str | None = None,
) -> Tensor:
    """``activation(batch_norm(conv_transpose2d(x, weight, bias)))``, or without BatchNorm.

    Without gradients and with running statistics (or no BatchNorm) this is one op: on the CPU the library's transposed
    convolution followed in place by one pass, in Triton one kernel for 2x2 with stride 2 and a single group (a GEMM with 4
    C_out columns that stores each value where it belongs), the library's otherwise. In training, or where a gradient is
    needed, the library's transposed convolution is followed by :func:`bn_act`, forward and backward.

    Args:
        x: (N, C_in, H, W); NCHW or channels_last; float32, float64, float16 or bfloat16.
        weight: (C_in, C_out / groups, kH, kW). bias: (C_out,) or None.
        running_mean, running_var, bn_weight, bn_bias: (C_out,), see :func:`bn_act`.
        stride, padding, output_padding, dilation, groups: as in ``torch.nn.functional.conv_transpose2d``.
        batch_norm: False leaves BatchNorm out, True demands it; None: there is one if any of its tensors is given or
            ``training`` is set.
        training, momentum, eps, eps_mode, activation, negative_slope, backend: as in :func:`bn_act`.

    Returns:
        (N, C_out, H_out, W_out), laid out as ``conv_transpose2d`` lays it out. Differentiable once.

    Raises:
        TypeError: a tensor argument is not a tensor. RuntimeError: dtype, device, rank, shape or geometry do not fit.
        ValueError: one value per channel in training, unknown activation or mode.

    Reference: Ronneberger et al., U-Net, 2015 (2x2 with stride 2).
    """
    try:
        if has_torch_function_variadic(x, weight):
            return handle_torch_function(
                conv_transpose_bn_act, (x, weight), x, weight, bias, running_mean=running_mean, running_var=running_var,
                bn_weight=bn_weight, bn_bias=bn_bias, stride=stride, padding=padding, output_padding=output_padding,
                dilation=dilation, groups=groups, batch_norm=batch_norm, training=training, momentum=momentum, eps=eps,
                eps_mode=eps_mode, activation=activation, negative_slope=negative_slope, backend=backend,
            )  # fmt: skip
        if batch_norm is None:
            batch_norm = training or any(t is not None for t in (running_mean, running_var, bn_weight, bn_bias))
        fused = (
            x.dim() == 4
            and not (batch_norm and (training or running_mean is None or running_var is None))
            and not needs_grad(x, weight, bias, bn_weight, bn_bias)
        )
        code = ACTIVATION_CODES[activation]
        path = select(_OP, x, backend) if fused else STOCK
        # Measured: without BatchNorm our op gains only where a second tensor's memory costs more than its host time.
        plain = path is CPP and not batch_norm and (backend or current()) == "auto"
        if plain and (code in (0, 1) or not is_large(x, _MIN_NUMEL_PLAIN)):
            y = torch.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
            return y.relu_() if code == 1 else apply_activation(y, code, negative_slope)
        if path is not STOCK:
            vectors = (running_mean, running_var, bn_weight, bn_bias) if batch_norm else (None,) * 4
            geometry = (_pair(stride), _pair(padding), _pair(output_padding), _pair(dilation), groups)
            eps_std = eps_mode != "var" and eps_mode_flag(_OP, eps_mode)
            arguments = (x, weight, bias, *vectors, *geometry, eps, eps_std, code, negative_slope)
            if path is REFERENCE:
                return reference.conv_transpose_bn_act(*arguments)
            return call(op(_OP, path), False, *arguments)
        y = torch.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
        if not batch_norm:
            return apply_activation(y, code, negative_slope)
        return bn_act(
            y, running_mean, running_var, bn_weight, bn_bias, training=training, momentum=momentum, eps=eps,
            eps_mode=eps_mode, activation=activation, negative_slope=negative_slope, backend=backend,
        )  # fmt: skip
    except Exception:
        _explain(x, weight, bias, groups, activation, running_mean, running_var, bn_weight, bn_bias)
        raise


def _explain(x: Any, weight: Any, bias: Any, groups: int, activation: Any, *vectors: Any) -> None:
    """Raise the clear error for bad input; return where the input is fine and the error has another cause."""
    activation_code(_OP, activation)
    check_floating(_OP, "x", x)
    check_floating(_OP, "weight", weight)
    if x.dim() != 4:
        fail(_OP, "x", "(N, C_in, H, W)", tuple(x.shape))
    if weight.dim() != 4:
        fail(_OP, "weight", "(C_in, C_out / groups, kH, kW)", tuple(weight.shape))
    if x.shape[1] != weight.shape[0]:
        fail(_OP, "x", f"{weight.shape[0]} channels for weight {tuple(weight.shape)}", f"{x.shape[1]} (shape {tuple(x.shape)})")
    if weight.device != x.device:
        fail(_OP, "weight", f"a tensor on {x.device} like x", weight.device)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        fail(_OP, "weight", f"dtype {x.dtype} like x", weight.dtype)
    names = ("bias", "running_mean", "running_var", "bn_weight", "bn_bias")
    for name, vector in zip(names, (bias, *vectors), strict=True):
        check_vector(_OP, name, vector, x, weight.shape[1] * groups)
    if (vectors[0] is None) != (vectors[1] is None):
        fail(_OP, "running_mean, running_var", "both or neither", "one of them", ValueError)
