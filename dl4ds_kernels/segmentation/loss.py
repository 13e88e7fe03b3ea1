"""U-Net's loss: cross entropy with a weight for every pixel, and the weights that keep touching objects apart.

Reference: Ronneberger et al., U-Net, 2015, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
    """Pixelwise softmax cross entropy, each pixel times its weight.

    Args:
        logits: (N, K, …). target: (N, …) int64 classes. weight: (N, …) or None for 1.
        reduction: "mean" divides by the sum of the weights, "sum" does not divide, "none" keeps the pixels.

    Returns: a scalar, or (N, …). Differentiable in logits and weight. Raises: RuntimeError for shapes that do not fit;
    ValueError for another reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"weighted_cross_entropy: reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    expected = (logits.shape[0], *logits.shape[2:])
    for name, value in (("target", target), ("weight", weight)):
        if value is not None and tuple(value.shape) != expected:
            raise RuntimeError(f"weighted_cross_entropy: {name}: expected shape {expected}, got {tuple(value.shape)}")
    losses = F.cross_entropy(logits, target, reduction="none")
    weight = torch.ones_like(losses) if weight is None else weight
    losses = losses * weight
    if reduction == "none":
        return losses
    return losses.sum() / weight.sum() if reduction == "mean" else losses.sum()


def separation_weights(
    instances: Tensor, *, class_weight: Tensor | None = None, w0: float = 10.0, sigma: float = 5.0
) -> Tensor:
    """``w_c + w0 * exp(-(d1 + d2)^2 / (2 sigma^2))``: d1, d2 are the distances to the nearest and second nearest object.

    Where there are fewer than two objects the second term is 0.

    Args:
        instances: (H, W) integers, 0 background, each object its own number from 1 on.
        class_weight: (2,) weights of background and objects; None balances them: each class gets the same total, and the
            average is 1 (1 where only one class is present).
        w0, sigma: height and width in pixels of the borders' weight.

    Returns: (H, W) float32. Raises: RuntimeError for another rank; ImportError without scipy, whose exact Euclidean distance
    transform this uses.
    """
    if instances.dim() != 2 or instances.is_floating_point():
        raise RuntimeError(
            f"separation_weights: instances: expected integers (H, W), got {instances.dtype} {tuple(instances.shape)}"
        )
    foreground = (instances > 0).long()
    if class_weight is None:
        share = torch.bincount(foreground.flatten(), minlength=2).double() / foreground.numel()
        class_weight = torch.where(share > 0, 1 / (share.clamp(min=1e-12) * int((share > 0).sum())), torch.zeros_like(share))
    weights = class_weight.float().to(instances.device)[foreground]
    labels = [label for label in instances.unique().tolist() if label > 0]
    if len(labels) < 2:
        return weights
    try:
        from scipy import ndimage
    except ImportError:
        raise ImportError("separation_weights: expected scipy (pip install scipy), which is not installed") from None
    maps = [torch.from_numpy(ndimage.distance_transform_edt((instances != label).cpu().numpy())) for label in labels]
    nearest = torch.stack(maps).topk(2, dim=0, largest=False).values.sum(0)
    return weights + (w0 * torch.exp(-(nearest**2) / (2 * sigma**2))).float().to(instances.device)
