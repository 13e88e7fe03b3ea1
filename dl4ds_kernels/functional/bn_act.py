"""``bn_act``: BatchNorm, optional residual addition and activation in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _backend, reference
from .._activation import ACTIVATION_CODES, MASK_CODES, activation_code, apply_activation
from .._backend import MIN_NUMEL, REFERENCE, STOCK, current, select
from .._define import CPP, op
from ._common import call, check_floating, check_residual, check_vector, eps_mode_flag, fail, needs_grad

_SMALL = MIN_NUMEL["bn_act"]


def bn_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    eps_mode: str = "var",
    activation: str = "relu",
    negative_slope: float = 0.1,
    backend: str | None = None,
) -> Tensor:
    """``activation(batch_norm(x) [+ residual])``; parameters as in ``torch.nn.functional.batch_norm``.

    Statistics and arithmetic are fp32 (fp64 for fp64 input) with one rounding at the store, and the same bits on every run.
    Backward recomputes the pre-activation value from ``x``; with a residual it keeps one bit an element.

    Args:
        x: (N, C, …) with 2 to 5 dimensions (more go to stock torch), dense in NCHW or channels_last order or a slice of such
            a tensor; float32, float64, float16 or bfloat16.
        running_mean, running_var: (C,); updated in place when ``training``. Both may be None when ``training``.
        weight, bias: (C,) or None; ``x``'s dtype, or float32 beside half-precision ``x``.
        residual: added before the activation; a shape or dtype other than ``x``'s is added by stock torch.
        training: batch statistics (True) or running statistics (False).
        momentum: of the running statistics' update. eps: added to the variance.
        eps_mode: "var" is ``sqrt(var + eps)`` (PyTorch); "std" is ``sqrt(var) + eps`` (darknet, the lecture).
        activation: "relu", "leaky_relu", "relu6", "silu", "hardswish" or "none". negative_slope: of leaky_relu.
        backend: overrides ``dk.backend`` for this call.

    Returns:
        (N, C, …), dense: channels_last if ``x`` is, else contiguous. Differentiable once in x, weight, bias and residual.

    Raises:
        TypeError: a tensor argument is not a tensor. ValueError: one value per channel in training, unknown activation or mode.
        RuntimeError: dtype, device, rank or shape do not fit (NotImplementedError for a dtype without kernels).

    Reference: Ioffe and Szegedy, Batch Normalization, 2015.
    """
    try:
        if training and x.numel() == x.shape[1]:
            _one_value_per_channel(x)
        if eps <= 0.0 and (training or eps < 0.0):
            fail("bn_act", "eps", "a positive number" + (" when training" if training else " or 0"), eps, ValueError)
        if (
            type(x) is Tensor
            and residual is None
            and eps_mode == "var"
            and backend is None
            and _backend.untouched
            and not is_compiling()  # before the size: a comparison would tie compiled code to one batch size
            and x.numel() < _SMALL
        ):
            # Host overhead decides here. torch.batch_norm is what F.batch_norm calls after its own checks.
            z = torch.batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, _cudnn(x))
            return torch.relu(z) if activation == "relu" else apply_activation(z, ACTIVATION_CODES[activation], negative_slope)
        if has_torch_function_variadic(x, residual):
            return handle_torch_function(
                bn_act, (x, residual), x, running_mean, running_var, weight, bias, residual=residual, training=training,
                momentum=momentum, eps=eps, eps_mode=eps_mode, activation=activation, negative_slope=negative_slope,
                backend=backend,
            )  # fmt: skip
        code = ACTIVATION_CODES[activation]
        if residual is not None and (residual.dtype != x.dtype or residual.shape != x.shape):
            z = bn_act(
                x, running_mean, running_var, weight, bias, training=training, momentum=momentum, eps=eps,
                eps_mode=eps_mode, activation="none", backend=backend,
            )  # fmt: skip
            return apply_activation(z + residual, code, negative_slope)
        return _dispatch(
            x, running_mean, running_var, weight, bias, residual, training, momentum, eps,
            eps_mode != "var" and eps_mode_flag("bn_act", eps_mode), code, negative_slope, backend,
        )  # fmt: skip
    except Exception:
        _explain(x, running_mean, running_var, weight, bias, residual, training, activation)
        raise


def _cudnn(x: Tensor) -> bool:
    return x.is_cuda and torch.backends.cudnn.enabled


def _dispatch(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    eps_std: bool,
    code: int,
    negative_slope: float,
    backend: str | None,
) -> Tensor:
    path = select("bn_act", x, backend)
    if path is CPP and x.dim() > 5 and (backend or current()) == "auto":
        path = STOCK  # the kernels end at five dimensions, torch does not
    if x.numel() == 0:
        path, eps_std = STOCK, False  # nothing to normalise: stock torch has the shapes and leaves the running statistics alone
    if path is STOCK and not eps_std:
        z = torch.batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps, _cudnn(x))
        return apply_activation(z if residual is None else z + residual, code, negative_slope)
    if path is STOCK or path is REFERENCE:
        out, new_mean, new_var = reference.bn_act(
            x, weight, bias, running_mean, running_var, residual, training, momentum, eps, eps_std, code, negative_slope
        )
    else:
        grad = needs_grad(x, weight, bias, residual)
        save_mask = grad and residual is not None and code in MASK_CODES
        out, _, _, _, new_mean, new_var = call(
            op("bn_act", path), grad, x, weight, bias, running_mean, running_var, residual, training, momentum, eps, eps_std,
            code, negative_slope, save_mask,
        )  # fmt: skip
    if training and running_mean is not None:
        with torch.no_grad():
            running_mean.copy_(new_mean)
            running_var.copy_(new_var)
    return out


def _one_value_per_channel(x: Tensor) -> None:
    if x.numel():
        shape = tuple(x.shape)
        fail("bn_act", "x", "more than 1 value per channel when training", f"input size {shape}", ValueError)


def _explain(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, residual: Any, training: bool, activation: Any
) -> None:
    """Raise the clear error for bad input; return where the input is fine and the error has another cause."""
    activation_code("bn_act", activation)
    check_floating("bn_act", "x", x)
    if not 2 <= x.dim() <= 5:
        fail("bn_act", "x", "2 to 5 dimensions (N, C, …)", f"{x.dim()} (shape {tuple(x.shape)})")
    channels = x.shape[1]
    if training and x.numel() == channels:
        _one_value_per_channel(x)  # before the vectors, as in torch
    for name, vector in (("running_mean", running_mean), ("running_var", running_var), ("weight", weight), ("bias", bias)):
        check_vector("bn_act", name, vector, x, channels)
    if running_mean is None or running_var is None:
        if not training:
            fail("bn_act", "running_mean, running_var", "both when training=False", "None")
        if running_mean is not running_var:
            fail("bn_act", "running_mean, running_var", "both or neither", "one of them", ValueError)
    if residual is not None:
        check_residual("bn_act", residual, x.shape, x.device)
