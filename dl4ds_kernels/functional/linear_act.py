"""``linear_act``: a fully connected layer and its activation, for inference on few rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import reference
from .._activation import activation_code, apply_activation
from .._backend import REFERENCE, STOCK, current, select
from .._define import op
from ._common import broadcasts, call, check_tensor, fail, needs_grad

_OP = "linear_act"
# Measured on 2 cores of a Zen 4: weights from which we are faster, and rows up to which the weight's way from memory decides.
_LEAST_WEIGHTS = 500_000
_MOST_ROWS = 16


def _fits(x: Any, weight: Any, bias: Any) -> bool:
    """Whether the kernel computes this call; stock torch computes the others, and the gradients."""
    return (
        type(x) is Tensor
        and isinstance(weight, Tensor)
        and (bias is None or isinstance(bias, Tensor))
        and all(t.dtype is torch.float32 and t.is_cpu for t in (x, weight, *(() if bias is None else (bias,))))
        and weight.dim() == 2
        and x.dim() >= 1
        and x.shape[-1] == weight.shape[1]
        and (bias is None or tuple(bias.shape) == (weight.shape[0],))
        and not needs_grad(x, weight, bias)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _path(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> str:
    asked = backend or current()
    if asked == "reference":
        return REFERENCE
    if asked not in ("auto", "cpu") or not _fits(x, weight, bias):
        return STOCK
    if asked == "auto":
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        if weight.numel() < _LEAST_WEIGHTS or not 0 < rows <= _MOST_ROWS or not weight.is_contiguous():
            return STOCK
    return select(_OP, x, backend)


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str = "none", negative_slope: float = 0.1,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """``activation(torch.nn.functional.linear(x, weight, bias))``.

    For up to 16 rows of fp32 on the CPU, where no gradient is asked for, a kernel of our own reads the weight at the speed of
    the memory (it is what such a layer costs) and as it lies: nothing is packed or kept. Everything else and training is
    stock torch. Sums are made in pieces of 64 vectors and in an order that depends on ``in_features`` alone: a
    row's result is the same in any batch and with any number of threads.

    Args:
        x: (…, in_features). weight: (out_features, in_features). bias: (out_features,) or None.
        activation: "none", "relu", "leaky_relu" (with ``negative_slope``), "relu6", "silu" or "hardswish".
        backend: overrides ``dk.backend`` for this call ("cpu" or "reference").

    Returns:
        (…, out_features), contiguous. Differentiable in x, weight and bias (by stock torch).

    Raises:
        The types of ``torch.nn.functional.linear``. TypeError: an argument is not a tensor. RuntimeError: rank, features,
        dtype or device do not fit (NotImplementedError: an activation that torch does not compute for the dtype).
        ValueError: unknown activation.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            linear_act, tensors, x, weight, bias, activation=activation, negative_slope=negative_slope, backend=backend
        )  # fmt: skip
    code = activation_code(_OP, activation)
    path = _path(x, weight, bias, backend)
    try:
        if path == STOCK:
            if x.device != weight.device:  # torch 2.14 computes on a weight without memory (meta) without a word
                raise RuntimeError
            return apply_activation(TF.linear(x, weight, bias), code, negative_slope)
        if path == REFERENCE:
            return reference.linear_act(x, weight, bias, activation, negative_slope)
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        out = call(op(_OP, path), False, flat, weight, bias, code, negative_slope)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])
    except Exception:
        _explain(x, weight, bias, activation)
        raise


def _explain(x: Any, weight: Any, bias: Any, activation: str) -> None:
    """Raise the clear error for bad input; return where the input is fine and the error has another cause."""
    check_tensor(_OP, "x", x)
    check_tensor(_OP, "weight", weight)
    if bias is not None:
        check_tensor(_OP, "bias", bias)
    if x.dim() == 0:
        fail(_OP, "x", "(…, in_features)", "a scalar")
    # torch takes a vector as the weight of one output, but then no bias.
    if weight.dim() != 2 and not (weight.dim() == 1 and bias is None):
        fail(_OP, "weight", "shape (out_features, in_features)", tuple(weight.shape))
    if x.shape[-1] != weight.shape[-1]:
        fail(
            _OP, "x", f"{weight.shape[-1]} features for weight {tuple(weight.shape)}", f"{x.shape[-1]} (shape {tuple(x.shape)})"
        )
    others = [("weight", weight)] + ([] if bias is None else [("bias", bias)])
    for name, tensor in others:
        if tensor.device != x.device:
            fail(_OP, name, f"a tensor on {x.device} like x", tensor.device)
        if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            fail(_OP, name, f"dtype {x.dtype} like x", tensor.dtype)
    if bias is not None and not broadcasts(bias.shape, (*x.shape[:-1], weight.shape[0])):
        fail(_OP, "bias", f"shape (out_features,) = ({weight.shape[0]},)", tuple(bias.shape))
    if not x.is_floating_point():
        fail(_OP, "x", f"a floating-point tensor for activation '{activation}'", x.dtype, NotImplementedError)
