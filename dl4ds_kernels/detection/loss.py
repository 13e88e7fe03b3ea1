"""YOLOv1's loss, as the paper writes it and as darknet computes it.

Reference: Redmon et al., You Only Look Once, 2016, section 2.2; darknet's detection layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .yolo import YoloLayout

_WORST_RMSE = 20.0


class YoloLoss(NamedTuple):
    """Sums over the batch. ``total`` is what to differentiate, the next five its parts; ``cost`` is what darknet prints, the
    sum of squares of its gradient (so the scales enter squared), without gradient; ``mean_iou`` of the responsible boxes."""

    total: Tensor
    position: Tensor
    size: Tensor
    objects: Tensor
    no_objects: Tensor
    classes: Tensor
    cost: Tensor
    mean_iou: Tensor


def yolo_loss(
    output: Tensor,
    truth: Tensor,
    layout: YoloLayout,
    *,
    variant: str = "paper",
    coord_scale: float = 5.0,
    object_scale: float = 1.0,
    noobject_scale: float = 0.5,
    class_scale: float = 1.0,
    rescore: bool = True,
) -> YoloLoss:
    """Squared errors of position, size, confidence and class.

    In each cell with an object one box is responsible: the one of highest IoU with the truth, or of smallest RMSE where none
    overlaps it. Its confidence should be its IoU (``rescore``; no gradient flows through it) or 1; that of every other box of
    the image should be 0. Cells without an object take part in no other term.

    Args:
        output: (N, layout.outputs). truth: (N, S * S, 1 + C + 4) from :func:`~.targets.encode_targets`.
        variant: "paper" is the sum of scale times squared error; "darknet" half of it, whose gradient is darknet's
            ``scale * (output - target)``.
        coord_scale, object_scale, noobject_scale, class_scale: factors of the terms.
        rescore: the confidence's target is the IoU.

    Returns: a :class:`YoloLoss`; differentiable in ``output``.
    Raises: RuntimeError for shapes that do not fit; ValueError for another variant.
    """
    if variant not in ("paper", "darknet"):
        raise ValueError(f"yolo_loss: variant: expected 'paper' or 'darknet', got {variant!r}")
    classes, confidences, boxes = layout.split(output)
    expected = (output.shape[0], layout.side * layout.side, 1 + layout.classes + 4)
    if tuple(truth.shape) != expected:
        raise RuntimeError(f"yolo_loss: truth: expected shape {expected}, got {tuple(truth.shape)}")
    has = truth[..., 0] != 0  # (N, cells)
    want_class, want_box = truth[..., 1 : 1 + layout.classes], truth[..., 1 + layout.classes :]
    best, iou = responsible_boxes(boxes.detach(), want_box, layout)
    mine = torch.zeros_like(confidences, dtype=torch.bool).scatter_(2, best.unsqueeze(-1), has.unsqueeze(-1))

    chosen = boxes.gather(2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(2)[has]
    wanted = want_box[has]
    size = chosen[:, 2:] if layout.sqrt else chosen[:, 2:].sign() * chosen[:, 2:].abs().clamp(min=1e-12).sqrt()
    confidence = confidences.gather(2, best.unsqueeze(-1)).squeeze(-1)[has]
    iou = iou[has]
    target = iou if rescore else torch.ones_like(iou)
    errors = (
        (coord_scale, wanted[:, :2] - chosen[:, :2]),
        (coord_scale, wanted[:, 2:].sqrt() - size),
        (object_scale, target - confidence),
        (noobject_scale, confidences[~mine]),
        (class_scale, want_class[has] - classes[has]),
    )
    factor = 1.0 if variant == "paper" else 0.5
    parts = [factor * scale * error.square().sum() for scale, error in errors]
    with torch.no_grad():
        cost = sum((scale * error).square().sum() for scale, error in errors)
        mean_iou = iou.mean() if iou.numel() else iou.new_zeros(())
    return YoloLoss(sum(parts), *parts, cost, mean_iou)


def responsible_boxes(boxes: Tensor, want: Tensor, layout: YoloLayout) -> tuple[Tensor, Tensor]:
    """Which of a cell's boxes (N, cells, B, 4) answers for the truth (N, cells, 4): its index (N, cells) and IoU (N, cells).

    Of equal boxes the first. Both are (x, y, w, h) with x, y within the cell.
    """
    x, y, w, h = boxes.unbind(-1)
    if layout.sqrt:
        w, h = w * w, h * h
    tx, ty, tw, th = (t.unsqueeze(-1) for t in want.unbind(-1))
    x, y, tx, ty = (t / layout.side for t in (x, y, tx, ty))
    iou = _iou(x, y, w, h, tx, ty, tw, th)
    rmse = ((x - tx) ** 2 + (y - ty) ** 2 + (w - tw) ** 2 + (h - th) ** 2).sqrt()
    by_iou = iou.argmax(-1)
    # Darknet starts at 20 and, should nothing be better, at no box; here the first box then answers.
    by_rmse = torch.where(rmse < _WORST_RMSE, rmse, torch.full_like(rmse, _WORST_RMSE)).argmin(-1)
    best = torch.where(iou.amax(-1) > 0, by_iou, by_rmse)
    return best, iou.gather(-1, best.unsqueeze(-1)).squeeze(-1)


def _iou(x: Tensor, y: Tensor, w: Tensor, h: Tensor, tx: Tensor, ty: Tensor, tw: Tensor, th: Tensor) -> Tensor:
    """IoU of boxes given by centre and size; 0 where they do not overlap."""

    def overlap(a: Tensor, da: Tensor, b: Tensor, db: Tensor) -> Tensor:
        return torch.minimum(a + da / 2, b + db / 2) - torch.maximum(a - da / 2, b - db / 2)

    across, down = overlap(x, w, tx, tw), overlap(y, h, ty, th)
    inter = torch.where((across < 0) | (down < 0), torch.zeros_like(across), across * down)
    iou = inter / (w * h + tw * th - inter)
    return torch.where(iou.isnan(), torch.zeros_like(iou), iou)
