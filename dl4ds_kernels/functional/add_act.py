"""``add_act``: residual addition and activation in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _backend, reference
from .._activation import ACTIVATION_CODES, MASK_CODES, activation_code, apply_activation
from .._backend import MIN_NUMEL, REFERENCE, STOCK, select
from .._define import op
from ._common import broadcasts, call, check_tensor, fail, needs_grad

_SMALL = MIN_NUMEL["add_act"]


def add_act(
    x: Tensor,
    residual: Tensor,
    *,
    alpha: float = 1.0,
    activation: str = "relu",
    negative_slope: float = 0.1,
    backend: str | None = None,
) -> Tensor:
    """``activation(alpha * (x + residual))``.

    Replaces ``relu(x + residual)`` of a residual block: two reads and one write instead of three reads and two writes.
    Backward keeps one bit an element for relu, leaky_relu and relu6, and both inputs for silu and hardswish.

    Args:
        x: any shape, dense or strided; float32, float64, float16 or bfloat16 (other dtypes go to stock torch).
        residual: same device; a different shape, dtype or layout is handled as ``torch.add`` does, by stock torch.
        alpha: scale after the addition (scaled residual learning uses ``1 / sqrt(2)``).
        activation: "relu", "leaky_relu", "relu6", "silu", "hardswish" or "none".
        negative_slope: of leaky_relu.
        backend: overrides ``dk.backend`` for this call.

    Returns:
        A tensor of the broadcast shape with the strides ``torch.add`` gives; never aliases an input. Differentiable once.

    Raises:
        TypeError: an input is not a tensor. RuntimeError: devices or shapes do not fit, as ``torch.add`` raises.
        ValueError: unknown activation or backend.
    """
    try:
        if (
            type(x) is Tensor
            and activation == "relu"
            and alpha == 1.0
            and backend is None
            and _backend.untouched
            and x.numel() < _SMALL
            and not is_compiling()
        ):
            return torch.relu(torch.add(x, residual))  # host overhead decides here: nothing else may run before
        if has_torch_function_variadic(x, residual):
            return handle_torch_function(
                add_act, (x, residual), x, residual, alpha=alpha, activation=activation, negative_slope=negative_slope,
                backend=backend,
            )  # fmt: skip
        code = ACTIVATION_CODES[activation]
        path = select("add_act", x, backend)
        if path is STOCK or x.dtype != residual.dtype or x.shape != residual.shape or not x.is_floating_point():
            z = torch.add(x, residual)
            return apply_activation(z if alpha == 1.0 else alpha * z, code, negative_slope)
        if path is REFERENCE:
            return reference.add_act(x, residual, alpha, code, negative_slope)
        grad = needs_grad(x, residual)
        return call(op("add_act", path), grad, x, residual, alpha, code, negative_slope, grad and code in MASK_CODES)[0]
    except Exception:
        _explain(x, residual, activation)
        raise


def _explain(x: Any, residual: Any, activation: Any) -> None:
    """Raise the clear error for bad input; return where the input is fine and the error has another cause."""
    activation_code("add_act", activation)
    check_tensor("add_act", "x", x)
    check_tensor("add_act", "residual", residual)
    if residual.device != x.device:
        fail("add_act", "residual", f"a tensor on {x.device} like x", residual.device)
    if not broadcasts(x.shape, residual.shape):
        fail("add_act", "residual", f"a shape that broadcasts with x {tuple(x.shape)}", tuple(residual.shape))
