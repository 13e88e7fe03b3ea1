"""``OrderedResidual2d``: the lecture's three orders of operations in a residual block, without normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import add_act
from .residual import conv3x3

_ORDERS = ("a", "b", "c")


class OrderedResidual2d(nn.Module):
    """``scale * (x + branch(x))`` with a branch of 3x3 convolutions and ReLUs in one of three orders.

    "a": conv, ReLU. The branch is never negative, so that values can only grow. "b": ReLU, conv. The branch takes either sign,
    but a negative input gives a constant one. "c": ReLU, conv, ReLU, conv: the usual choice, behind an ordinary first layer.

    Args:
        channels: of input and output. order: "a", "b" or "c". scale: ``1 / sqrt(2)`` keeps the variance of the activations.
        bias: of the convolutions.

    Shape: x (N, channels, H, W) -> the same. Raises: ValueError for another order.
    Reference: Prince, Understanding Deep Learning, section 11.2.
    """

    def __init__(self, channels: int, order: str = "c", *, scale: float = 1.0, bias: bool = True) -> None:
        super().__init__()
        if order not in _ORDERS:
            raise ValueError(f"OrderedResidual2d: order: expected 'a', 'b' or 'c', got {order!r}")
        self.order, self.scale = order, scale
        self.conv1 = conv3x3(channels, channels, bias=bias)
        self.conv2 = conv3x3(channels, channels, bias=bias) if order == "c" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "a":
            branch = torch.relu(self.conv1(x))
        else:
            branch = self.conv1(torch.relu(x))
            if self.conv2 is not None:
                branch = self.conv2(torch.relu(branch))
        return add_act(x, branch, alpha=self.scale, activation="none")

    def extra_repr(self) -> str:
        return f"order={self.order}, scale={self.scale}"
