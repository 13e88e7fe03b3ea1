"""``linear_act`` in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from .._activation import ACTIVATION_CODES, apply_activation


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none", negative_slope: float = 0.1
) -> Tensor:
    """``act(x @ weight^T + bias)``: x (…, in), weight (out, in), bias (out,) -> (…, out)."""
    z = x @ weight.t()
    return apply_activation(z if bias is None else z + bias, ACTIVATION_CODES[activation], negative_slope)
