"""Intermediate supervision: every stack of an hourglass network answers for the same targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked_mse(heatmaps: Sequence[Tensor], target: Tensor, *, visible: Tensor | None = None) -> Tensor:
    """Sum over the stacks of the mean squared error.

    Args:
        heatmaps: of each stack, (N, J, H, W). target: (N, J, H, W).
        visible: (N, J); maps of other joints do not count, neither in the sum nor in the mean. None: all count, empty ones too.

    Returns: a scalar; 0 where nothing counts. Differentiable. Raises: RuntimeError for shapes that differ; ValueError for no
    stack.
    """
    if not heatmaps:
        raise ValueError("stacked_mse: heatmaps: expected at least one stack, got none")
    for i, one in enumerate(heatmaps):
        if one.shape != target.shape:
            raise RuntimeError(
                f"stacked_mse: heatmaps: expected shape {tuple(target.shape)} like target, got {tuple(one.shape)} at {i}"
            )
    if visible is None:
        return torch.stack([(one - target).square().mean() for one in heatmaps]).sum()
    if visible.shape != target.shape[:2]:
        raise RuntimeError(f"stacked_mse: visible: expected shape {tuple(target.shape[:2])}, got {tuple(visible.shape)}")
    counted = visible.to(target.dtype)[..., None, None]
    values = (counted.sum() * target.shape[2] * target.shape[3]).clamp(min=1)
    return torch.stack([((one - target).square() * counted).sum() / values for one in heatmaps]).sum()
