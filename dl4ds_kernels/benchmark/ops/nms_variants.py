"""``nms_padded`` against torchvision's NMS image by image; its relatives against their definitions in Python floats.

Stock torch has no other implementation of ``soft_nms``, ``diou_nms``, ``matrix_nms`` and ``darknet_nms``: no ratio means much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ... import functional as F
from .._case import Case, Problem, Run, Unavailable
from . import nms

_IOU, _MOST, _CLASSES = 0.5, 100, 4
Row = list[float]


def _iou(a: Row, b: Row) -> float:
    inter = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


def _diou(a: Row, b: Row) -> float:
    distance = math.dist((a[0] + a[2], a[1] + a[3]), (b[0] + b[2], b[1] + b[3])) / 2
    around = (max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1]))
    return _iou(a, b) - distance**2 / (around[0] ** 2 + around[1] ** 2)


def _greedy(boxes: list[Row], scores: Row, overlap: Callable[[Row, Row], float]) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda k: -scores[k]):
        if all(overlap(boxes[k], boxes[i]) <= _IOU for k in kept):
            kept.append(i)
    return kept


def _define_soft(boxes: list[Row], scores: Row) -> tuple[Tensor, Tensor]:
    left, now, keep, final = list(range(len(boxes))), list(scores), [], []
    while left:
        best = max(left, key=now.__getitem__)
        if now[best] <= 0.001:
            break
        left.remove(best)
        keep.append(best)
        final.append(now[best])
        for k in left:
            now[k] *= math.exp(-(_iou(boxes[best], boxes[k]) ** 2) / 0.5)
    return torch.tensor(keep, dtype=torch.int64), torch.tensor(final, dtype=torch.float64)


def _define_diou(boxes: list[Row], scores: Row) -> tuple[Tensor]:
    return (torch.tensor(_greedy(boxes, scores, _diou), dtype=torch.int64),)


def _define_matrix(boxes: list[Row], scores: Row) -> tuple[Tensor]:
    order = sorted(range(len(boxes)), key=lambda k: -scores[k])
    worst: dict[int, float] = {}
    out = [0.0] * len(boxes)
    for at, j in enumerate(order):
        overlaps = {i: _iou(boxes[i], boxes[j]) for i in order[:at]}
        worst[j] = max(overlaps.values(), default=0.0)
        decay = min((math.exp(-2.0 * (u * u - worst[i] ** 2)) for i, u in overlaps.items()), default=1.0)
        out[j] = scores[j] * min(decay, 1.0)
    return (torch.tensor(out, dtype=torch.float64),)


def _class_scores(scores: Tensor) -> Tensor:
    """(N, C): the same scores in another order for each class."""
    return torch.stack([scores.roll(7 * c) for c in range(_CLASSES)], 1)


def _define_darknet(boxes: list[Row], scores: Row) -> tuple[Tensor]:
    probs = _class_scores(torch.tensor(scores, dtype=torch.float64))
    out = torch.zeros_like(probs)
    for c in range(_CLASSES):
        members = [i for i in range(len(boxes)) if probs[i, c] > 0]
        kept = _greedy([boxes[i] for i in members], probs[members, c].tolist(), _iou)
        rows = [members[k] for k in kept]
        out[rows, c] = probs[rows, c]
    return (out,)


def _stock_padded(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    import torchvision

    above = torch.where(scores > 0)[0]
    kept = above[torchvision.ops.nms(boxes[above], scores[above], _IOU)][:_MOST]
    keep = kept.new_full((1, _MOST), -1)
    keep[0, : len(kept)] = kept
    return keep, torch.tensor([len(kept)], device=boxes.device)


class Variant:
    """One of them as an op of ``bench`` and ``info``; ``definition`` takes lists, or None for ``nms_padded``."""

    STOCK, DEFAULT, differentiable = ("eager",), "yolo", False

    def __init__(self, outputs: tuple[str, ...], ours: Callable[..., Any], definition: Callable[..., Any] | None) -> None:
        self._outputs, self._ours, self._definition = outputs, ours, definition
        self.problem = lru_cache(maxsize=1)(self._problem)

    select = staticmethod(nms.select)

    def _named(self, results: Any) -> dict[str, Tensor]:
        return dict(zip(self._outputs, results if isinstance(results, tuple) else (results,), strict=True))

    def _eager(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        if self._definition is None:
            return _stock_padded(boxes, scores)
        return self._definition(boxes.tolist(), scores.tolist())

    def _problem(self, case: Case) -> Problem:
        inputs = nms.make_inputs(case)
        inputs.pop("idxs", None)
        # The contract of nms_padded is stock's own answer on the device; the others are defined by their formulas.
        on_device = [t.to(case.device) for t in inputs.values()]
        return Problem(inputs, {name: t.cpu() for name, t in self._named(self._eager(*on_device)).items()})

    def setup(self, case: Case, provider: str) -> Run:
        """The call of one provider."""
        made = self.problem(case)
        boxes, scores = (t.to(case.device, copy=True) for t in made.inputs.values())
        if provider == "eager":
            call: Callable[[], Any] = partial(self._eager, boxes, scores)
        elif provider in ("auto", "reference", "triton") or provider == torch.device(case.device).type:
            # Plain torch operations: the variants have no backend= and run the same way for each.
            call = partial(self._ours, boxes, scores, provider)
        else:
            raise Unavailable(f"{case.op} has no provider {provider!r}; known: eager, auto, reference, {case.device}")
        return Run(
            call, lambda: self._named(call()), boxes.numel() * boxes.element_size() + scores.numel() * scores.element_size()
        )


def _padded(boxes: Tensor, scores: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return F.nms_padded(boxes[None], scores[None], iou_threshold=_IOU, max_output=_MOST, backend=backend)


nms_padded = Variant(("keep", "count"), _padded, None)
soft_nms = Variant(("keep", "scores"), lambda boxes, scores, backend: F.soft_nms(boxes, scores), _define_soft)
diou_nms = Variant(("keep",), lambda boxes, scores, backend: F.diou_nms(boxes, scores, _IOU), _define_diou)
matrix_nms = Variant(("scores",), lambda boxes, scores, backend: F.matrix_nms(boxes, scores), _define_matrix)
darknet_nms = Variant(
    ("probs",), lambda boxes, scores, backend: F.darknet_nms(boxes, _class_scores(scores), _IOU), _define_darknet
)
