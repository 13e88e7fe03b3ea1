"""Synthetic microscope pictures: round cells with exact masks, an uneven background, noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cells(count: int, *, size: int = 64, seed: int = 0, noise: float = 0.15) -> tuple[Tensor, Tensor]:
    """Pictures of 3 to 7 elliptic cells, some of them touching.

    Args:
        count: pictures. size: pixels on each side. seed: the same seed gives the same pictures.
        noise: its standard deviation.

    Returns: x (count, 1, size, size) float32 of about 0 to 1; masks (count, size, size) int64: 0 background, k for the
    k-th cell (``masks > 0`` is the segmentation).
    """
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    pictures, masks = torch.empty(count, 1, size, size), torch.zeros(count, size, size, dtype=torch.int64)
    for i in range(count):
        slope, turn, number = torch.rand(3, generator=generator).tolist()
        along = (x * math.cos(6.28 * turn) + y * math.sin(6.28 * turn)) / size
        picture = 0.25 + 0.25 * slope * along
        for k in range(1, 4 + int(5 * number)):
            cx, cy, r, flat, angle, light = torch.rand(6, generator=generator).tolist()
            a = size * (0.07 + 0.08 * r)
            b = a * (0.6 + 0.4 * flat)
            dx, dy = x - size * cx, y - size * cy
            u = (dx * math.cos(math.pi * angle) + dy * math.sin(math.pi * angle)) / a
            v = (dy * math.cos(math.pi * angle) - dx * math.sin(math.pi * angle)) / b
            inside = u * u + v * v <= 1
            masks[i][inside] = k
            texture = 1 + 0.25 * torch.sin(u * 5 + 6.28 * light) * torch.cos(v * 4)
            picture = torch.where(inside, (0.5 + 0.35 * light) * texture, picture)
        pictures[i, 0] = picture + noise * torch.randn(size, size, generator=generator)
    return pictures, masks
