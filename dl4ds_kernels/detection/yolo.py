"""YOLOv1's output: its layout in memory, boxes and scores from it, and detections after class-wise suppression.

Reference: Redmon et al., You Only Look Once, 2016, and darknet, whose flat output vector holds all class probabilities, then
all confidences, then all boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import batched_nms

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


@dataclass(frozen=True)
class YoloLayout:
    """Grid and output: ``side`` x ``side`` cells, ``boxes`` boxes a cell, ``classes`` classes a cell.

    ``sqrt``: the network's w and h are square roots of the box's share of the image (darknet, the shipped nets).
    """

    side: int = 7
    boxes: int = 2
    classes: int = 20
    sqrt: bool = True

    @property
    def outputs(self) -> int:
        """Length of the vector of one image: S * S * (B * 5 + C)."""
        return self.side * self.side * (self.boxes * 5 + self.classes)

    def split(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of an output (N, S * S * (B * 5 + C)).

        Returns: class probabilities (N, S * S, C); confidences (N, S * S, B); boxes (N, S * S, B, 4) as (x, y, w, h), x and y
        within the cell, w and h of the image. Cells go row by row. Raises: RuntimeError for another shape.
        """
        if output.dim() != 2 or output.shape[1] != self.outputs:
            raise RuntimeError(f"yolo: output: expected shape (N, {self.outputs}) for {self}, got {tuple(output.shape)}")
        cells = self.side * self.side
        a, b = cells * self.classes, cells * (self.classes + self.boxes)
        return (
            output[:, :a].unflatten(1, (cells, self.classes)),
            output[:, a:b].unflatten(1, (cells, self.boxes)),
            output[:, b:].unflatten(1, (cells, self.boxes, 4)),
        )

    def join(self, classes: Tensor, confidences: Tensor, boxes: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        return torch.cat((classes.flatten(1), confidences.flatten(1), boxes.flatten(1)), 1)


class Detections(NamedTuple):
    """Of one image, by descending score: boxes (K, 4) as (x1, y1, x2, y2) in pixels, scores (K,), labels (K,) int64."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def decode(output: Tensor, layout: YoloLayout, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Boxes and class scores of every predictor.

    Args:
        output: (N, layout.outputs), as the network gives it (no sigmoid, no softmax).
        image_size: (H, W) in pixels of the picture that the boxes are for.

    Returns: boxes (N, S * S * B, 4) as (x1, y1, x2, y2) in pixels, not clipped; scores (N, S * S * B, C), confidence times
    class probability. Differentiable. Raises: RuntimeError for an output of another shape.
    """
    classes, confidences, boxes = layout.split(output)
    height, width = image_size
    cell = torch.arange(layout.side * layout.side, device=output.device)
    column, row = (cell % layout.side).view(1, -1, 1), (cell // layout.side).view(1, -1, 1)
    x, y, w, h = boxes.unbind(-1)
    if layout.sqrt:
        w, h = w * w, h * h
    x, y = (x + column) / layout.side * width, (y + row) / layout.side * height
    half_w, half_h = w * width / 2, h * height / 2
    corners = torch.stack((x - half_w, y - half_h, x + half_w, y + half_h), -1)
    return corners.flatten(1, 2), (confidences.unsqueeze(-1) * classes.unsqueeze(2)).flatten(1, 2)


def clip_boxes(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes (…, 4) cut off at the picture's border, image_size (H, W)."""
    height, width = image_size
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


def detect(
    output: Tensor,
    layout: YoloLayout,
    image_size: tuple[int, int],
    *,
    score_threshold: float = 0.2,
    iou_threshold: float = 0.4,
) -> list[Detections]:
    """Decode, drop scores that are not above the threshold, suppress within each class (a box may stay in several classes).

    The thresholds' defaults are those of darknet's demo; its evaluation takes 0.001 and 0.5. Suppression sees whole boxes;
    those returned are clipped to the picture.

    Args: as :func:`decode`; iou_threshold: boxes of a class that overlap a better one by more are dropped.
    Returns: one :class:`Detections` an image. No gradient.
    """
    with torch.no_grad():
        boxes, scores = decode(output, layout, image_size)
        found = []
        for b, s in zip(boxes, scores, strict=True):
            which, labels = torch.where(s > score_threshold)
            kept = batched_nms(b[which], s[which, labels], labels, iou_threshold)
            which, labels = which[kept], labels[kept]
            found.append(Detections(clip_boxes(b[which], image_size), s[which, labels], labels))
    return found
