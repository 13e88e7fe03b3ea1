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
from .._define import CPP, op
from ._common import broadcasts, call, check_tensor, fail, needs_grad

_SMALL = MIN_NUMEL["add_act"]
_KEEPS_NOTHING = MASK_CODES | {0}  # activations whose gradient needs a bit an element, or not even that


def add_act(
    x: Tensor,
    residual: Tensor,
    residual2: Tensor | None = None,
    *,
    alpha: float = 1.0,
    activation: str = "relu",
    negative_slope: float = 0.1,
    backend: str | None = None,
) -> Tensor:
    """``activation(alpha * (x + residual [+ residual2]))``, added from left to right.

    Replaces ``relu(x + residual)`` of a residual block: two reads and one write instead of three reads and two writes.
    Backward keeps one bit an element for relu, leaky_relu and relu6, and both inputs for silu and hardswish. A third operand
    (the step between two hourglasses: input + features + heatmaps) saves one more pass; with silu or hardswish and a gradient,
    stock torch adds the first two.

    Args:
        x: any shape, dense or strided; float32, float64, float16 or bfloat16 (other dtypes go to stock torch).
        residual: same device; a different shape, dtype or layout is handled as ``torch.add`` does, by stock torch.
        residual2: a third operand, as ``residual``.
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
            and residual2 is None
            and activation == "relu"
            and alpha == 1.0
            and backend is None
            and _backend.untouched
            and not is_compiling()  # before the size: a comparison would tie compiled code to one batch size
            and x.numel() < _SMALL
        ):
            return torch.relu(torch.add(x, residual))  # host overhead decides here: nothing else may run before
        if has_torch_function_variadic(x, residual, residual2):
            return handle_torch_function(
                add_act, (x, residual, residual2), x, residual, residual2, alpha=alpha, activation=activation,
                negative_slope=negative_slope, backend=backend,
            )  # fmt: skip
        code = ACTIVATION_CODES[activation]
        if residual2 is not None:
            return _add3_act(x, residual, residual2, alpha, code, negative_slope, backend)
        path = select("add_act", x, backend)
        if path is STOCK or x.dtype != residual.dtype or x.shape != residual.shape or not x.is_floating_point():
            z = torch.add(x, residual)
            return apply_activation(z if alpha == 1.0 else alpha * z, code, negative_slope)
        if path is REFERENCE:
            return reference.add_act(x, residual, alpha, code, negative_slope)
        grad = needs_grad(x, residual)
        return call(op("add_act", path), grad, x, residual, alpha, code, negative_slope, grad and code in MASK_CODES)[0]
    except Exception:
        _explain(x, residual, residual2, activation)
        raise


def _add3_act(
    x: Tensor, residual: Tensor, residual2: Tensor, alpha: float, code: int, negative_slope: float, backend: str | None
) -> Tensor:
    path = select("add3_act", x, backend)
    fits = x.dtype == residual.dtype == residual2.dtype and x.shape == residual.shape == residual2.shape
    grad = needs_grad(x, residual, residual2)
    if path is CPP and grad and (backend or _backend.current()) == "auto":
        # Host overhead of two autograd ops: measured, with an activation 4 times the size breaks even, a plain sum at 16 times.
        path = path if _backend.is_large(x, (16 if code == 0 else 4) * MIN_NUMEL["add3_act"]) else STOCK
    if path is STOCK or not fits or not x.is_floating_point():
        z = x + residual + residual2
        return apply_activation(z if alpha == 1.0 else alpha * z, code, negative_slope)
    if path is REFERENCE:
        return reference.add3_act(x, residual, residual2, alpha, code, negative_slope)
    if grad and code not in _KEEPS_NOTHING:
        return call(op("add_act", path), grad, x + residual, residual2, alpha, code, negative_slope, False)[0]
    return call(op("add3_act", path), grad, x, residual, residual2, alpha, code, negative_slope, grad and code in MASK_CODES)[0]


def _explain(x: Any, residual: Any, residual2: Any, activation: Any) -> None:
    """Raise the clear error for bad input; return where the input is fine and the error has another cause."""
    activation_code("add_act", activation)
    check_tensor("add_act", "x", x)
    check_tensor("add_act", "residual", residual)
    for name, other in (("residual", residual), ("residual2", residual2)):
        if other is None:
            continue
        check_tensor("add_act", name, other)
        if other.device != x.device:
            fail("add_act", name, f"a tensor on {x.device} like x", other.device)
        if not broadcasts(x.shape, other.shape):
            fail("add_act", name, f"a shape that broadcasts with x {tuple(x.shape)}", tuple(other.shape))
