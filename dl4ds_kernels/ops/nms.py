"""Contracts of ``nms``, ``batched_nms`` and ``nms_padded``. Indices have no gradient, so there is no autograd formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._define import define_op

_HALF = (torch.float16, torch.bfloat16)


def _fake(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _fake_batched(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    return _fake(boxes, scores, iou_threshold)


def _fake_padded(
    boxes: Tensor, scores: Tensor, class_ids: Tensor | None, iou_threshold: float, score_threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    batch = boxes.shape[0]
    return boxes.new_empty((batch, max_output), dtype=torch.int64), boxes.new_empty((batch,), dtype=torch.int64)


def _autocast(dtype: torch.dtype, boxes: Tensor, scores: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Under autocast half-precision inputs become float32, as torchvision's do; so boxes and scores may differ in dtype."""
    return (*(x.float() if x.dtype in _HALF else x for x in (boxes, scores)), *rest)


define_op(
    "nms",
    "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
    fake=_fake,
    autocast=_autocast,
    tags=(torch.Tag.dynamic_output_shape,),
)
define_op(
    "batched_nms",
    "(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor",
    stem="nms",
    fake=_fake_batched,
    autocast=_autocast,
    tags=(torch.Tag.dynamic_output_shape,),
)
define_op(
    "nms_padded",
    "(Tensor boxes, Tensor scores, Tensor? class_ids, float iou_threshold, float score_threshold, int max_output) "
    "-> (Tensor keep, Tensor count)",
    stem="nms",
    fake=_fake_padded,
    autocast=_autocast,
)
