"""Training targets of YOLOv1: every object belongs to the cell that holds its centre."""

from __future__ import annotations

import torch
from torch import Tensor

from .yolo import YoloLayout

# Darknet leaves objects out that are narrower than this share of the image.
MIN_SIDE = 0.005
# Of a centre computed from corners in fp32.
_ROUNDING = 1e-6


def encode_targets(
    boxes: Tensor, labels: Tensor, layout: YoloLayout, image_size: tuple[int, int], *, min_side: float = MIN_SIDE
) -> Tensor:
    """Darknet's truth of one image.

    A cell has room for one object: of several, the first in ``boxes`` stays. A centre on the right or lower border belongs to
    the last cell.

    Args:
        boxes: (M, 4) as (x1, y1, x2, y2) in pixels. labels: (M,) integers below ``layout.classes``.
        image_size: (H, W) of the picture in pixels. min_side: objects narrower than this share of the image are left out.

    Returns: (S * S, 1 + C + 4) float: whether the cell has an object, its class one-hot, and its box (x, y, w, h) with x, y
    within the cell and w, h of the image (not square roots).
    Raises: RuntimeError for other shapes; ValueError for a label out of range or a centre outside the picture.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        raise RuntimeError(
            "encode_targets: boxes, labels: expected shapes (M, 4) and (M,), "
            f"got {tuple(boxes.shape)} and {tuple(labels.shape)}"
        )
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < layout.classes):
        raise ValueError(f"encode_targets: labels: expected 0 to {layout.classes - 1}, got {labels.tolist()}")
    height, width = image_size
    side = layout.side
    truth = torch.zeros(side * side, 1 + layout.classes + 4, dtype=boxes.dtype, device=boxes.device)
    share = boxes / boxes.new_tensor([width, height, width, height])
    for (x1, y1, x2, y2), label in zip(share.tolist(), labels.tolist(), strict=True):
        x, y, w, h = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
        if not (min(x, y) >= -_ROUNDING and max(x, y) <= 1 + _ROUNDING):
            raise ValueError(f"encode_targets: boxes: expected centres inside the picture of {height} x {width}, got {(x, y)}")
        if w < min_side or h < min_side:
            continue
        x, y = min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)
        column, row = min(int(x * side), side - 1), min(int(y * side), side - 1)
        cell = truth[row * side + column]
        if cell[0] == 0:
            cell[0] = cell[1 + label] = 1
            cell[1 + layout.classes :] = cell.new_tensor([x * side - column, y * side - row, w, h])
    return truth
