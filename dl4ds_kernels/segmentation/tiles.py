"""Overlap-tile prediction: pictures of any size through a network whose valid convolutions take a border off.

Reference: Ronneberger et al., U-Net, 2015, figure 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def mirror_pad(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Mirror the borders of the spatial dimensions of x (N, C, …); the border pixel itself is not repeated.

    Wider borders than the picture are mirrored again, as ``numpy.pad(mode="reflect")`` does. One pixel is repeated.
    """
    for dim, (low, high) in enumerate(zip(before, after, strict=True), 2):
        size = x.shape[dim]
        place = torch.arange(-low, size + high, device=x.device)
        period = max(2 * (size - 1), 1)
        place = place.remainder(period)
        x = x.index_select(dim, torch.minimum(place, period - place) if size > 1 else torch.zeros_like(place))
    return x


def overlap_tile(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int | Sequence[int],
    margin: int | Sequence[int],
    *,
    batch_size: int = 1,
) -> Tensor:
    """Predict every pixel of ``x`` from tiles with their full surroundings, mirrored at the picture's border.

    The result equals one pass over the mirrored picture (for a network without batch statistics whose output does not depend
    on where the tile starts; a network with pooling asks for tile starts that are multiples of its pooling).

    Args:
        network: (B, C, *tile) -> (B, K, *(tile - 2 * margin)).
        x: (N, C, …) with 1 to 3 spatial dimensions. tile: input size. margin: what the network takes off each side (92 for the
            2-D U-Net, 44 for the 3-D one).
        batch_size: tiles that go through the network at once.

    Returns: (N, K, …) of ``x``'s spatial size. Raises: ValueError where the margin leaves nothing of a tile; RuntimeError where
    the network's output has another size.
    """
    spatial = tuple(x.shape[2:])
    tiles = (tile,) * len(spatial) if isinstance(tile, int) else tuple(tile)
    margins = (margin,) * len(spatial) if isinstance(margin, int) else tuple(margin)
    step = tuple(t - 2 * m for t, m in zip(tiles, margins, strict=True))
    if len(tiles) != len(spatial) or min(step) < 1 or batch_size < 1:
        raise ValueError(f"overlap_tile: tile, margin: expected tile > 2 * margin in each of {spatial}, got {tiles}, {margins}")
    rest = [(-size) % s for size, s in zip(spatial, step, strict=True)]
    padded = mirror_pad(x, margins, [m + r for m, r in zip(margins, rest, strict=True)])
    starts = list(itertools.product(*(range(0, size, s) for size, s in zip(spatial, step, strict=True))))
    work = [(n, start) for n in range(x.shape[0]) for start in starts]
    out: Tensor | None = None
    for i in range(0, len(work), batch_size):
        chunk = work[i : i + batch_size]
        result = network(torch.stack([_window(padded[n], start, tiles) for n, start in chunk]))
        if tuple(result.shape[2:]) != step:
            raise RuntimeError(
                f"overlap_tile: network: expected outputs of size {step} for tiles {tiles}, got {tuple(result.shape[2:])}"
            )
        if out is None:
            full = [size + r for size, r in zip(spatial, rest, strict=True)]
            out = result.new_empty(x.shape[0], result.shape[1], *full)
        for (n, start), piece in zip(chunk, result, strict=True):
            _window(out[n], start, step).copy_(piece)
    if out is None:
        raise ValueError(f"overlap_tile: x: expected at least one picture with pixels, got shape {tuple(x.shape)}")
    return _window(out, (0,) * len(spatial), spatial)


def _window(x: Tensor, start: Sequence[int], size: Sequence[int]) -> Tensor:
    """A view of the last dimensions of ``x``."""
    first = x.dim() - len(size)
    for dim, (begin, length) in enumerate(zip(start, size, strict=True), first):
        x = x.narrow(dim, begin, length)
    return x
