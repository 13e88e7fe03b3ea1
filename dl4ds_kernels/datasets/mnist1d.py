"""MNIST-1D: one-dimensional digits of 40 values, made from a seed (nothing is downloaded).

Ten hand-drawn curves of 12 points are padded, stretched, scaled, moved, filled up with correlated noise where they are zero,
sheared and sampled again. Curves and constants are the paper's; the random numbers are torch's, so that the samples are others
than those of its published file.

Reference: Greydanus and Kobak, Scaling Down Deep Learning with MNIST-1D, 2024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = 10
LENGTH = 40
# The pen's place across the page at 12 heights, for the digits 0 to 9.
_CURVES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
_PADDING = (36, 60)
_POINTS = 12 + _PADDING[1]
_SCALE, _MOVE, _CORRELATED, _INDEPENDENT, _SHEAR = 0.4, 48, 0.25, 0.02, 0.75


def templates() -> Tensor:
    """The ten curves, (10, 12) float64: each of variance 1/36, beginning at 0."""
    curves = torch.tensor(_CURVES, dtype=torch.float64)
    curves = (curves - curves.mean(1, keepdim=True)) / curves.std(1, correction=0, keepdim=True)
    return (curves - curves[:, :1]) / 6


def _resample(x: Tensor, length: Tensor, points: int) -> Tensor:
    """Linear interpolation of the first ``length[i]`` values of row i at ``points`` places, ends included."""
    place = torch.linspace(0, 1, points, dtype=x.dtype) * (length - 1).unsqueeze(1)
    left = place.floor().long().clamp(max=x.shape[1] - 2)
    left = torch.minimum(left, (length - 2).unsqueeze(1))
    share = place - left
    return x.gather(1, left) * (1 - share) + x.gather(1, left + 1) * share


def _smooth(noise: Tensor) -> Tensor:
    """A Gaussian of two points' width over the rows, cut at four widths, mirrored at the ends (the end twice)."""
    reach = torch.arange(-8, 9, dtype=noise.dtype)
    kernel = (-0.5 * (reach / 2) ** 2).exp()
    # torch has no mirror that repeats the end: it is put together.
    padded = torch.cat((noise[:, :8].flip(1), noise, noise[:, -8:].flip(1)), 1)
    return F.conv1d(padded.unsqueeze(1), (kernel / kernel.sum()).view(1, 1, -1)).squeeze(1)


def signals(
    curves: Tensor, padding: Tensor, scale: Tensor, move: Tensor, correlated: Tensor, independent: Tensor, shear: Tensor
) -> Tensor:
    """The transformation with its random numbers as arguments.

    Args: curves (N, 12) float64; padding (N,) int64, zeros behind the curve; scale (N,); move (N,) int64, points to the right;
    correlated, independent (N, 72), noise before smoothing and as it is; shear (N,), the slope taken away.
    Returns: (N, 40) float64.
    """
    padded = F.pad(curves + 1e-8, (0, _PADDING[1]))  # the small number tells a zero of the curve from padding
    x = _resample(padded, 12 + padding, _POINTS) * scale.unsqueeze(1)
    x = x.gather(1, (torch.arange(_POINTS) - move.unsqueeze(1)) % _POINTS)
    x = torch.where(x != 0, x, _smooth(correlated)) + independent
    x = x - shear.unsqueeze(1) * torch.linspace(-0.5, 0.5, _POINTS, dtype=x.dtype)
    return _resample(x, torch.full_like(padding, _POINTS), LENGTH)


def mnist1d(count: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``count`` signals, classes drawn evenly.

    Args: count: signals. seed: the same seed gives the same signals.
    Returns: x (count, 40) float32, of mean 0 and variance 1 over all of them; y (count,) int64 in 0 … 9.
    Raises: ValueError for ``count`` < 1.
    """
    if count < 1:
        raise ValueError(f"mnist1d: count: expected 1 or more, got {count}")
    generator = torch.Generator().manual_seed(seed)
    y = torch.randperm(count, generator=generator) % CLASSES
    padding = torch.randint(_PADDING[0], _PADDING[1] + 1, (count,), generator=generator)
    move = torch.randint(_MOVE, (count,), generator=generator)
    scale, shear = torch.rand(2, count, generator=generator, dtype=torch.float64) - 0.5
    correlated, independent = torch.randn(2, count, _POINTS, generator=generator, dtype=torch.float64)
    x = signals(
        templates()[y], padding, 1 + _SCALE * scale, move, _CORRELATED * correlated, _INDEPENDENT * independent, _SHEAR * shear
    )
    return ((x - x.mean()) / x.std(correction=0)).float(), y
