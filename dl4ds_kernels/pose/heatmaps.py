"""Heatmaps of joints: drawn as targets, read back to a quarter of a pixel.

Reference: Newell et al., Stacked Hourglass Networks, 2016, and its code's conventions. Points are (x, y) in heatmap pixels,
pixel centres at whole numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def encode_heatmaps(
    points: Tensor, visible: Tensor, size: tuple[int, int], *, sigma: float = 1.0, radius: int | None = None
) -> Tensor:
    """A Gaussian of height 1 around the pixel of each joint, cut off at a square patch.

    Args:
        points: (N, J, 2) as (x, y) in heatmap pixels; the centre is the nearest pixel.
        visible: (N, J) bool; other joints, and those whose patch lies outside, give an empty map.
        size: (H, W). sigma: in pixels (1 in the paper). radius: of the patch; default ``3 * sigma`` rounded up.

    Returns: (N, J, H, W) of ``points``' dtype. Raises: RuntimeError for shapes that do not fit; ValueError for sigma <= 0.
    """
    if points.dim() != 3 or points.shape[2] != 2 or visible.shape != points.shape[:2]:
        raise RuntimeError(
            "encode_heatmaps: points, visible: expected (N, J, 2) and (N, J), "
            f"got {tuple(points.shape)} and {tuple(visible.shape)}"
        )
    if not sigma > 0:
        raise ValueError(f"encode_heatmaps: sigma: expected a positive number, got {sigma}")
    reach = int(-(-3 * sigma // 1)) if radius is None else radius
    height, width = size
    centre = (points + 0.5).floor()
    dx = torch.arange(width, device=points.device) - centre[..., 0, None]  # (N, J, W)
    dy = torch.arange(height, device=points.device) - centre[..., 1, None]  # (N, J, H)
    gx, gy = (torch.exp(-(d**2) / (2 * sigma**2)) * (d.abs() <= reach) for d in (dx, dy))
    return gy.unsqueeze(-1) * gx.unsqueeze(-2) * visible[..., None, None].to(points.dtype)


def combine_maximum(heatmaps: Tensor) -> Tensor:
    """Maps of several people (P, J, H, W) in one (J, H, W): the largest value of each pixel."""
    return heatmaps.amax(0)


def decode_heatmaps(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """The highest pixel of each map, moved a quarter of a pixel towards its higher neighbour.

    The move is made in x and in y, by the sign of the difference of the two neighbours, for pixels that are not on the border.
    Of equal pixels the first counts. A map without a positive value gives the point (0, 0).

    Args: heatmaps (N, J, H, W).
    Returns: points (N, J, 2) as (x, y) in heatmap pixels; scores (N, J), the map's largest value. No gradient.
    Raises: RuntimeError for another rank.
    """
    if heatmaps.dim() != 4:
        raise RuntimeError(f"decode_heatmaps: heatmaps: expected (N, J, H, W), got {tuple(heatmaps.shape)}")
    heatmaps = heatmaps.detach()
    n, joints, height, width = heatmaps.shape
    scores, place = heatmaps.flatten(2).max(2)
    y, x = place // width, place % width
    dtype = heatmaps.dtype if heatmaps.is_floating_point() else torch.float32
    points = torch.stack((x, y), -1).to(dtype)
    inside = (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
    flat = heatmaps.flatten(2)

    def at(offset: int) -> Tensor:
        return flat.gather(2, (place + offset).clamp(0, height * width - 1).unsqueeze(-1)).squeeze(-1)

    towards = torch.stack((at(1) - at(-1), at(width) - at(-width)), -1).sign().to(dtype)
    points = points + 0.25 * towards * inside.unsqueeze(-1)
    return points * (scores > 0).unsqueeze(-1), scores


def to_image(points: Tensor, stride: float = 4.0) -> Tensor:
    """Heatmap points (…, 2) in pixels of the image: the middle of the ``stride`` pixels that a heatmap pixel covers."""
    return (points + 0.5) * stride - 0.5


def flip_heatmaps(heatmaps: Tensor, pairs: list[tuple[int, int]]) -> Tensor:
    """Heatmaps (N, J, H, W) of a mirrored image as those of the image: mirrored back, left and right joints exchanged."""
    order = list(range(heatmaps.shape[1]))
    for left, right in pairs:
        order[left], order[right] = right, left
    return heatmaps.flip(-1)[:, order]
