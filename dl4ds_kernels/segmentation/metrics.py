"""Mean intersection over union from a confusion matrix that may be summed over many pictures."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int, *, ignore_index: int | None = 255) -> Tensor:
    """Pixels by true class (rows) and predicted class (columns).

    Args:
        prediction, target: integers of one shape. num_classes: K.
        ignore_index: pixels whose target is this do not count (255 in VOC); None counts all.

    Returns: (K, K) int64, to be added up over batches. Raises: RuntimeError for different shapes; ValueError for a class out of
    range.
    """
    if prediction.shape != target.shape:
        raise RuntimeError(
            f"confusion_matrix: prediction: expected shape {tuple(target.shape)} like target, got {tuple(prediction.shape)}"
        )
    prediction, target = prediction.flatten().long(), target.flatten().long()
    if ignore_index is not None:
        counted = target != ignore_index
        prediction, target = prediction[counted], target[counted]
    for name, value in (("prediction", prediction), ("target", target)):
        if value.numel() and not (int(value.min()) >= 0 and int(value.max()) < num_classes):
            raise ValueError(
                f"confusion_matrix: {name}: expected classes 0 to {num_classes - 1}, "
                f"got {int(value.min())} to {int(value.max())}"
            )
    return torch.bincount(target * num_classes + prediction, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class (K,) in fp64; NaN for a class that is neither there nor predicted."""
    confusion = confusion.double()
    inter = confusion.diagonal()
    return inter / (confusion.sum(0) + confusion.sum(1) - inter)


def mean_iou(confusion: Tensor) -> float:
    """Average of :func:`class_iou` over the classes that occur; NaN if none does."""
    return float(class_iou(confusion).nanmean())
