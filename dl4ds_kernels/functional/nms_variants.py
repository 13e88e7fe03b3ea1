"""Relatives of NMS: ``soft_nms``, ``diou_nms``, ``matrix_nms``, and darknet's class-wise NMS of YOLOv1.

Plain torch operations, so they run on every device and dtype (16-bit floats are computed in float32). ``soft_nms`` and
``diou_nms`` decide one box after another, as their definitions do: a Python step per box kept. Use them after a score threshold
or a top-k, as the papers do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import check_floating, check_tensor, fail
from .nms import batched_nms


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None = None,
    *,
    method: str = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.001,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS: neighbours of a selected box lose score instead of being dropped.

    Repeatedly the box of highest current score is selected (the first of equal ones) and every box still there is rescored by
    its IoU with it: ``linear`` multiplies by ``1 - IoU`` where the IoU is at least ``iou_threshold``; ``gaussian`` multiplies
    by ``exp(-IoU^2 / sigma)``. It ends when no score is above ``score_threshold``.

    Args:
        boxes: (N, 4) as (x1, y1, x2, y2). scores: (N,), not negative (NaN scores take no part).
        idxs: (N,) integer class of each box; then boxes of other classes keep their scores. None: one class.
        method: "linear" or "gaussian". iou_threshold: of the linear method. sigma: of the Gaussian, above 0.
        score_threshold: in [0, 1) for probabilities.

    Returns:
        (K,) int64 indices in the order of selection, and their (K,) final scores, which descend; the scores are differentiable
        in ``scores``, not in ``boxes``.

    Raises:
        TypeError, RuntimeError: as :func:`nms`. ValueError: unknown method, or sigma not above 0.

    Source: Bodla, Singh, Chellappa, Davis, Soft-NMS, ICCV 2017, equations 3 and 4 of section 3.
    """
    _check("soft_nms", boxes, scores, idxs)
    if method not in ("linear", "gaussian"):
        fail("soft_nms", "method", "'linear' or 'gaussian'", repr(method), ValueError)
    if not sigma > 0:
        fail("soft_nms", "sigma", "a number above 0", sigma, ValueError)
    wide = _widen(boxes)
    left = torch.where(scores > score_threshold)[0]
    current = scores[left].to(wide.dtype)
    keep, final = [], []
    while left.numel():
        best = int(current.detach().argmax())
        keep.append(left[best])
        final.append(current[best])
        iou = _iou(wide[left[best]], wide[left])[0]
        linear = method == "linear"
        factor = torch.where(iou >= iou_threshold, 1 - iou, 1) if linear else torch.exp(-(iou * iou) / sigma)
        if idxs is not None:
            factor = torch.where(idxs[left] == idxs[left[best]], factor, 1)
        current = current * factor
        stays = current > score_threshold
        stays[best] = False
        left, current = left[stays], current[stays]
    if not keep:
        return left, scores[:0]
    return torch.stack(keep), torch.stack(final).to(scores.dtype)


def diou_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, idxs: Tensor | None = None) -> Tensor:
    """NMS that drops a box when IoU less the normalised distance of the centres is above the threshold.

    ``IoU - d^2 / c^2 > iou_threshold``, d the distance of the centres, c the diagonal of the smallest box around both: of two
    boxes with the same overlap the one whose centre is farther away is more likely another object. Strict, as in :func:`nms`
    (the paper drops at equality too). NaN never drops a box.

    Args:
        boxes, scores: as in :func:`nms`. iou_threshold: any float. idxs: (N,) integer classes, or None.

    Returns:
        (K,) int64 indices of the boxes kept, by descending score (NaN first, equal ones by index). No gradient.

    Raises:
        TypeError, RuntimeError: as :func:`nms`.

    Source: Zheng et al., Distance-IoU Loss, AAAI 2020, equations 7 and 12.
    """
    _check("diou_nms", boxes, scores, idxs)
    wide = _widen(boxes).detach()
    left = scores.sort(stable=True, descending=True)[1]
    keep = []
    while left.numel():
        keep.append(left[0])
        rest = left[1:]
        iou, enclosing = _iou(wide[left[0]], wide[rest])
        centres = (wide[:, :2] + wide[:, 2:]) / 2
        distance = (centres[rest] - centres[left[0]]).square().sum(1)
        drops = iou - distance / enclosing > iou_threshold
        if idxs is not None:
            drops &= idxs[rest] == idxs[left[0]]
        left = rest[~drops]
    return torch.stack(keep) if keep else left


def matrix_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None = None, *, method: str = "gaussian", sigma: float = 2.0
) -> Tensor:
    """Matrix NMS: all boxes are rescored at once, without a sequential decision.

    With boxes by descending score, box j is multiplied by ``min over i < j of f(IoU_ij) / f(max over k < i of IoU_ki)``:
    decayed by its neighbours, but less by those that are themselves suppressed. ``f(u) = exp(-sigma u^2)`` or ``1 - u``.

    Args:
        boxes: (N, 4). scores: (N,). idxs: (N,) integer classes, or None. method: "gaussian" or "linear".

    Returns:
        (N,) scores in input order; threshold them to select. Differentiable in ``scores`` and ``boxes``. Memory O(N^2).

    Raises:
        TypeError, RuntimeError: as :func:`nms`. ValueError: unknown method.

    Source: Wang, Zhang, Kong, Li, Shen, SOLOv2, NeurIPS 2020, section 3.4 (equations 4 to 6), with boxes for masks.
    """
    _check("matrix_nms", boxes, scores, idxs)
    if method not in ("linear", "gaussian"):
        fail("matrix_nms", "method", "'linear' or 'gaussian'", repr(method), ValueError)
    order = scores.sort(stable=True, descending=True)[1]
    wide = _widen(boxes)[order]
    before = torch.ones(len(order), len(order), dtype=torch.bool, device=boxes.device).triu(1)
    if idxs is not None:
        before &= idxs[order][:, None] == idxs[order]
    iou = torch.where(before, _iou(wide[:, None], wide)[0], 0)
    if not len(order):
        return scores.clone()
    worst = iou.amax(0)[:, None]  # of each box with those before it
    if method == "gaussian":
        decay = torch.exp(-sigma * (iou * iou - worst * worst))
    else:
        decay = (1 - iou) / (1 - worst).clamp(min=torch.finfo(iou.dtype).tiny)
    factor = torch.where(before, decay, torch.inf).amin(0).clamp(max=1)  # the first box of a class has no neighbour
    return scores * torch.empty_like(factor).scatter(0, order, factor).to(scores.dtype)


def darknet_nms(boxes: Tensor, probs: Tensor, iou_threshold: float, objectness: Tensor | None = None) -> Tensor:
    """Darknet's NMS of YOLOv1: class by class, a suppressed box loses its probability of that class only.

    For each class the boxes of positive probability are taken by descending probability; a later one whose IoU with a kept one
    is above the threshold gets 0. A box may so be dropped for one class and stay for another. Equal probabilities are taken by
    index (darknet's qsort leaves their order open).

    Args:
        boxes: (N, 4) as (x1, y1, x2, y2). probs: (N, C) class scores, as decoded (confidence times class probability).
        iou_threshold: darknet's demo uses 0.4, its VOC validation 0.5.
        objectness: (N,); boxes with 0 are out for every class. None: all are in.

    Returns:
        (N, C): ``probs`` with zeros where suppressed, not positive or NaN. Differentiable in ``probs``.

    Raises:
        TypeError, RuntimeError: as :func:`nms`.

    Source: darknet's do_nms_sort (src/box.c) as used by examples/yolo.c.
    """
    check_floating("darknet_nms", "boxes", boxes)
    check_floating("darknet_nms", "probs", probs)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        fail("darknet_nms", "boxes", "shape (N, 4)", tuple(boxes.shape))
    if probs.dim() != 2 or probs.shape[0] != boxes.shape[0]:
        fail("darknet_nms", "probs", f"shape ({boxes.shape[0]}, C), a row per box", tuple(probs.shape))
    takes_part = probs.detach() > 0
    if objectness is not None:
        check_tensor("darknet_nms", "objectness", objectness)
        if objectness.shape != boxes.shape[:1]:
            fail("darknet_nms", "objectness", f"shape {tuple(boxes.shape[:1])}", tuple(objectness.shape))
        takes_part &= (objectness != 0)[:, None]
    rows, classes = torch.where(takes_part)
    kept = batched_nms(boxes[rows], probs.detach()[rows, classes].to(boxes.dtype), classes, iou_threshold)
    stays = torch.zeros_like(takes_part)
    stays[rows[kept], classes[kept]] = True
    return torch.where(stays, probs, 0)


def _widen(boxes: Tensor) -> Tensor:
    return boxes.float() if boxes.element_size() == 2 else boxes


def _iou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU of boxes (..., 4) that broadcast, 0 where the union is; and the squared diagonal of the smallest box around both."""
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    inter = size.prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
    return torch.where(union > 0, inter / torch.where(union > 0, union, 1), 0), around.square().sum(-1)


def _check(name: str, boxes: Tensor, scores: Tensor, idxs: Tensor | None) -> None:
    check_floating(name, "boxes", boxes)
    check_floating(name, "scores", scores)
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        fail(name, "boxes", "shape (N, 4)", tuple(boxes.shape))
    if scores.shape != boxes.shape[:1]:
        fail(name, "scores", f"shape {tuple(boxes.shape[:1])}, one per box", tuple(scores.shape))
    if scores.device != boxes.device:
        fail(name, "scores", f"a tensor on {boxes.device} like boxes", scores.device)
    if idxs is not None:
        check_tensor(name, "idxs", idxs)
        if idxs.shape != scores.shape:
            fail(name, "idxs", f"shape {tuple(scores.shape)} like scores", tuple(idxs.shape))
