"""Multi-crop evaluation: the average of a classifier's probabilities over five or ten crops of a picture.

Reference: Krizhevsky et al., 2012: four corners and the centre, and their mirror images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def five_crops(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """The four corners and the centre.

    Args: images (N, C, H, W); size of the crops, at most (H, W).
    Returns: (N, 5, C, h, w): upper left, upper right, lower left, lower right, centre. Raises: ValueError for a larger size.
    """
    height, width = (size, size) if isinstance(size, int) else size
    big_h, big_w = images.shape[-2:]
    if not (0 < height <= big_h and 0 < width <= big_w):
        raise ValueError(f"five_crops: size: expected at most {big_h} x {big_w}, got {height} x {width}")
    down, right = big_h - height, big_w - width
    # Halves go to the even side, as torchvision's center_crop rounds.
    corners = ((0, 0), (0, right), (down, 0), (down, right), (round(down / 2), round(right / 2)))
    return torch.stack([images[..., y : y + height, x : x + width] for y, x in corners], 1)


def ten_crops(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """:func:`five_crops` of the pictures and of their mirror images: (N, 10, C, h, w)."""
    return torch.cat((five_crops(images, size), five_crops(images.flip(-1), size)), 1)


def multi_crop(model: nn.Module, images: Tensor, size: int | tuple[int, int], crops: int = 10) -> Tensor:
    """Class probabilities, averaged over the crops of each picture.

    Args:
        model: a classifier (M, C, h, w) -> logits (M, K), in eval mode.
        images: (N, C, H, W). size: of the crops. crops: 1 (the centre), 5 or 10.

    Returns: (N, K), rows that sum to 1. Raises: ValueError for another number of crops or a size that does not fit.
    """
    if crops not in (1, 5, 10):
        raise ValueError(f"multi_crop: crops: expected 1, 5 or 10, got {crops!r}")
    views = ten_crops(images, size) if crops == 10 else five_crops(images, size)
    views = views[:, 4:] if crops == 1 else views
    return model(views.flatten(0, 1)).softmax(1).unflatten(0, views.shape[:2]).mean(1)
