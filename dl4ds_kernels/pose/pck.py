"""Percentage of correct keypoints."""

from __future__ import annotations

import torch
from torch import Tensor


def pck(points: Tensor, target: Tensor, visible: Tensor, scale: Tensor | float, threshold: float = 0.5) -> tuple[Tensor, float]:
    """Share of joints whose distance to the truth is at most ``threshold`` times ``scale``.

    Args:
        points, target: (N, J, 2). visible: (N, J) bool, which joints count.
        scale: a number, or (N,), in the points' unit: the head's size for PCKh, the torso's for FLIC's PCK@0.2; the hourglass
            code's own measure is a tenth of the heatmap (6.4).
        threshold: 0.5 for PCKh@0.5.

    Returns: shares of each joint (J,), NaN for a joint that nobody shows; the share of all counted joints, NaN if none counts.
    Raises: RuntimeError for shapes that do not fit.
    """
    if points.shape != target.shape or points.dim() != 3 or points.shape[2] != 2 or visible.shape != points.shape[:2]:
        raise RuntimeError(
            "pck: points, target, visible: expected (N, J, 2) twice and (N, J), "
            f"got {tuple(points.shape)}, {tuple(target.shape)}, {tuple(visible.shape)}"
        )
    if isinstance(scale, Tensor):
        if scale.shape != points.shape[:1]:
            raise RuntimeError(f"pck: scale: expected shape ({points.shape[0]},), got {tuple(scale.shape)}")
        scale = scale.unsqueeze(1)
    distance = (points - target).double().norm(dim=-1)
    right = (distance <= threshold * scale) & visible
    counted = visible.sum(0).double()
    return right.sum(0) / counted, float(right.sum() / counted.sum()) if bool(visible.any()) else float("nan")


def normalised_distance(points: Tensor, target: Tensor, scale: Tensor | float) -> Tensor:
    """Distances (N, J) in units of ``scale``, for curves over the threshold."""
    scale = scale.unsqueeze(1) if isinstance(scale, Tensor) else scale
    return torch.linalg.vector_norm(points - target, dim=-1) / scale
