"""Coloured gratings: ten classes of small pictures from a seed, hard enough that a network has to learn filters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CLASSES = 10
_ORIENTATIONS = 5
_CYCLES = (2.0, 3.5)


def textures(count: int, *, size: int = 16, seed: int = 0, noise: float = 0.6) -> tuple[Tensor, Tensor]:
    """``count`` pictures of gratings; the class is orientation (five) and frequency (two), never colour, phase or contrast.

    Args:
        count: pictures. size: height and width in pixels. seed: the same seed gives the same pictures.
        noise: standard deviation of the noise added to every value; the grating's amplitude is 0.5 to 1.

    Returns: x (count, 3, size, size) float32 with about zero mean; y (count,) int64 in 0 … 9. Raises: ValueError for
    ``count`` < 0 or ``size`` < 4.
    """
    if count < 0 or size < 4:
        raise ValueError(f"textures: count, size: expected 0 or more and 4 or more, got {count} and {size}")
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=generator)
    angle = (y % _ORIENTATIONS) * (math.pi / _ORIENTATIONS) + 0.08 * torch.randn(count, generator=generator)
    cycles = torch.tensor(_CYCLES)[y // _ORIENTATIONS] * (1 + 0.06 * torch.randn(count, generator=generator))
    phase, contrast = torch.rand(2, count, generator=generator)
    colour = torch.randn(count, 3, generator=generator)
    colour = colour / colour.norm(dim=1, keepdim=True).clamp(min=1e-6) * (0.5 + 0.5 * contrast).unsqueeze(1)
    axis = (torch.arange(size) + 0.5) / size
    along = (angle.cos().view(-1, 1, 1) * axis.view(1, 1, -1) + angle.sin().view(-1, 1, 1) * axis.view(1, -1, 1)) * cycles.view(
        -1, 1, 1
    )
    wave = torch.sin(2 * math.pi * (along + phase.view(-1, 1, 1)))
    x = math.sqrt(3) * wave.unsqueeze(1) * colour.view(-1, 3, 1, 1)
    return x + noise * torch.randn(count, 3, size, size, generator=generator), y
