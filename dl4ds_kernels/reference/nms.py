"""Reference of non-maximum suppression: torchvision's CPU rule written out, one kept box at a time.

Order: scores descending, stable, NaN first. A box is suppressed when its IoU with a kept box before it exceeds the threshold,
strictly. The IoU is computed in the boxes' dtype (float32 for 16-bit floats), each operation rounded once, and its quotient is
compared with the threshold in double precision. Nothing is cleaned up first: inverted boxes have negative areas, 0 / 0 is NaN
and suppresses nothing, and where a coordinate is NaN, max and min give the kept box's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _max(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a < b, b, a)


def _min(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b < a, b, a)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices (K,) int64 of the boxes kept, by descending score. boxes (N, 4) as (x1, y1, x2, y2), scores (N,)."""
    boxes = boxes.float() if boxes.element_size() == 2 else boxes
    undecided = scores.sort(stable=True, descending=True)[1]
    x1, y1, x2, y2 = boxes[undecided].unbind(1)
    area = (x2 - x1) * (y2 - y1)
    zero = boxes.new_zeros(())
    kept = []
    while undecided.numel():
        kept.append(undecided[0])
        w = _max(zero, _min(x2[0], x2[1:]) - _max(x1[0], x1[1:]))
        h = _max(zero, _min(y2[0], y2[1:]) - _max(y1[0], y1[1:]))
        inter = w * h
        iou = inter / (area[0] + area[1:] - inter)
        stays = ~(iou.double() > iou_threshold)
        undecided, x1, y1, x2, y2, area = (t[1:][stays] for t in (undecided, x1, y1, x2, y2, area))
    return torch.stack(kept) if kept else undecided


def batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, solve: Callable[[Tensor, Tensor, float], Tensor] = nms
) -> Tensor:
    """``solve`` on each class by itself; the kept of all classes by descending score, equal scores by index. idxs (N,)."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for class_id in idxs.unique():  # a NaN class equals nothing: its boxes are not kept
        members = torch.where(idxs == class_id)[0]
        keep[members[solve(boxes[members], scores[members], iou_threshold)]] = True
    rows = torch.where(keep)[0]
    return rows[scores[rows].sort(stable=True, descending=True)[1]]


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    class_ids: Tensor | None,
    iou_threshold: float,
    score_threshold: float,
    max_output: int,
    solve: Callable[[Tensor, Tensor, float], Tensor] = nms,
) -> tuple[Tensor, Tensor]:
    """Per image the first ``max_output`` kept among the boxes above the score threshold: keep (B, max_output), count (B,)."""
    batch = boxes.shape[0]
    keep = torch.full((batch, max_output), -1, dtype=torch.int64, device=boxes.device)
    count = torch.zeros(batch, dtype=torch.int64, device=boxes.device)
    for b in range(batch):
        rows = torch.where(scores[b].double() > score_threshold)[0]
        if class_ids is None:
            kept = solve(boxes[b, rows], scores[b, rows], iou_threshold)
        else:
            kept = batched_nms(boxes[b, rows], scores[b, rows], class_ids[b, rows], iou_threshold, solve)
        kept = kept[:max_output]
        keep[b, : kept.numel()] = rows[kept]
        count[b] = kept.numel()
    return keep, count
