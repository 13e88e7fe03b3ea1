"""Reference of ``add_act``."""

from __future__ import annotations

from torch import Tensor

from .._activation import apply_activation


def add_act(x: Tensor, residual: Tensor, alpha: float, activation: int, negative_slope: float) -> Tensor:
    """``act(alpha * (x + residual))`` with torch's own rounding and broadcasting."""
    z = x + residual
    return apply_activation(z if alpha == 1.0 else alpha * z, activation, negative_slope)


def add3_act(x: Tensor, residual: Tensor, residual2: Tensor, alpha: float, activation: int, negative_slope: float) -> Tensor:
    """``act(alpha * (x + residual + residual2))``, added from left to right."""
    return add_act(x + residual, residual2, alpha, activation, negative_slope)
