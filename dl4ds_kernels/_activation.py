"""Activation names and the integer codes that the op schemas carry (same numbers as ``csrc/common/activation.h``)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATION_CODES = {"none": 0, "relu": 1, "leaky_relu": 2, "relu6": 3, "silu": 4, "hardswish": 5}
ACTIVATION_NAMES = tuple(ACTIVATION_CODES)
# Piecewise linear with one bit of state per element: their derivative fits a bit mask.
MASK_CODES = frozenset(ACTIVATION_CODES[name] for name in ("relu", "leaky_relu", "relu6"))


def activation_code(op: str, activation: str) -> int:
    """Integer code of ``activation``; ``ValueError`` naming ``op`` for an unknown name."""
    try:
        return ACTIVATION_CODES[activation]
    except (KeyError, TypeError):
        raise ValueError(f"{op}: activation: expected one of {', '.join(ACTIVATION_NAMES)}, got {activation!r}") from None


def apply_activation(z: Tensor, code: int, negative_slope: float) -> Tensor:
    """Stock torch activation for ``code``; the truth that every kernel is compared with."""
    if code == 1:
        return torch.relu(z)
    if code == 0:
        return z
    if code == 2:
        return F.leaky_relu(z, negative_slope)
    if code == 3:
        return F.relu6(z)
    if code == 4:
        return F.silu(z)
    return F.hardswish(z)


def activation_grad(dout: Tensor, z: Tensor, code: int, negative_slope: float) -> Tensor:
    """``dout * activation'(z)`` by torch's own backward ops, edge values and NaN included."""
    aten = torch.ops.aten
    if code == 0:
        return dout
    if code == 1:
        return aten.threshold_backward(dout, z, 0)
    if code == 2:
        return aten.leaky_relu_backward(dout, z, negative_slope, False)
    if code == 3:
        return aten.hardtanh_backward(dout, z, 0.0, 6.0)
    if code == 4:
        return aten.silu_backward(dout, z)
    return aten.hardswish_backward(dout, z)
