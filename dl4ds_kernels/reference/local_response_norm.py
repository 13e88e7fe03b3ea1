"""Reference of ``local_response_norm``: the sum over the window written out channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """``x / (k + alpha / size * sum of x^2 over the window)^beta``, x (N, C, …)."""
    square, channels = x * x, x.shape[1]
    total = torch.zeros_like(x)
    for shift in range(-(size // 2), (size - 1) // 2 + 1):
        first, last = max(0, -shift), min(channels, channels - shift)
        if first < last:
            part = square[:, first + shift : last + shift]
            total = total + torch.cat(
                (part.new_zeros(_channels(x, first)), part, part.new_zeros(_channels(x, channels - last))), 1
            )
    return x / (k + alpha / size * total) ** beta


def _channels(x: Tensor, count: int) -> tuple[int, ...]:
    return (x.shape[0], count, *x.shape[2:])
