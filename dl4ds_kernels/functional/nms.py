"""Non-maximum suppression: ``nms``, ``batched_nms`` and the fixed-size ``nms_padded``.

The C++ and CUDA kernels give torchvision's indices on their device: its rule differs between the two. Where there is no kernel
of ours, and while a model is exported, torchvision's own serves (the reference where it is not installed): ``batched_nms``
class by class, ``nms_padded`` image by image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .._backend import REFERENCE, STOCK, select
from .._define import op
from ..reference import nms as reference
from ._common import check_floating, check_tensor, fail


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, backend: str | None = None) -> Tensor:
    """Non-maximum suppression, index for index what ``torchvision.ops.nms`` gives on the same device.

    Boxes are taken by descending score (NaN scores first, equal scores by index); a box is dropped when its IoU with a box
    kept before it is greater than ``iou_threshold``. On the CPU the IoU in the boxes' dtype is compared with the threshold in
    double precision; on CUDA the threshold is narrowed to float32 and the union is one fused multiply-add, as in torchvision's
    kernel. float16 follows the device too: computed in float32 on the CPU, where torchvision refuses it, and with torchvision's
    roundings on CUDA (use ``boxes.float()`` for float32 there). bfloat16 is computed in float32. Boxes without area, inverted
    boxes and NaN or infinite coordinates follow the same formula: for a threshold of 0 or more they are always kept and
    suppress nothing.

    Args:
        boxes: (N, 4) as (x1, y1, x2, y2), any strides; float32, float64, float16 or bfloat16.
        scores: (N,), dtype and device of ``boxes``.
        iou_threshold: any float; below 0 and NaN mean what the comparison gives.
        backend: overrides ``dk.backend`` for this call ("cpu", "cuda", "triton", "reference").

    Returns:
        (K,) int64 indices of the boxes kept, by descending score, on ``boxes``' device. No gradient.

    Raises:
        TypeError: an input is not a tensor. RuntimeError: shapes, dtypes or devices do not fit.
    """
    try:
        if has_torch_function_variadic(boxes, scores):
            return handle_torch_function(nms, (boxes, scores), boxes, scores, iou_threshold, backend=backend)
        path = select("nms", boxes, backend)
        if path not in _PLAIN:
            return op("nms", path)(boxes, scores, iou_threshold)
        return _solver(path)(boxes, scores, iou_threshold)
    except Exception:
        _explain("nms", boxes, scores, 1)
        raise


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, backend: str | None = None) -> Tensor:
    """:func:`nms` within each class: boxes of different classes never suppress each other.

    True per-class arithmetic, as in torchvision's class-by-class loop. Up to 1,000 boxes (on CUDA 25,000)
    ``torchvision.ops.batched_nms`` instead moves the classes apart by an offset, which loses digits of the coordinates: a pair
    whose IoU lies within that rounding of the threshold may be decided otherwise there. Equal scores come out by index;
    torchvision's loop leaves their order to an unstable sort.

    Args:
        boxes, scores, iou_threshold, backend: as in :func:`nms`.
        idxs: (N,) class of each box; any integer or float dtype and any values (boxes whose class is NaN are not kept).

    Returns:
        (K,) int64 indices of the boxes kept, by descending score over all classes. An empty ``boxes`` gives an empty result
        whatever the other arguments are.

    Raises:
        TypeError: an input is not a tensor. RuntimeError: shapes, dtypes or devices do not fit.
    """
    try:
        if has_torch_function_variadic(boxes, scores, idxs):
            return handle_torch_function(
                batched_nms, (boxes, scores, idxs), boxes, scores, idxs, iou_threshold, backend=backend
            )
        if boxes.numel() == 0:
            return boxes.new_empty((0,), dtype=torch.int64)
        path = select("batched_nms", boxes, backend)
        if path in _PLAIN:
            _check_classes("batched_nms", "idxs", idxs, scores)
            return reference.batched_nms(boxes, scores, idxs, iou_threshold, _solver(path))
        if not idxs.is_floating_point():
            return op("batched_nms", path)(boxes, scores, idxs.long(), iou_threshold)
        _check_classes("batched_nms", "idxs", idxs, scores)
        rows = torch.where(idxs == idxs)[0]
        ids = idxs[rows].unique(return_inverse=True)[1]
        return rows[op("batched_nms", path)(boxes[rows], scores[rows], ids, iou_threshold)]
    except Exception:
        _explain("batched_nms", boxes, scores, 1, "idxs", idxs)
        raise


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    class_ids: Tensor | None = None,
    *,
    iou_threshold: float,
    score_threshold: float = 0.0,
    max_output: int,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """NMS of a batch with results of a fixed size, so that it compiles and exports without data-dependent shapes.

    Boxes that do not score above ``score_threshold`` (NaN scores among them) take no part.

    Args:
        boxes: (B, N, 4) as in :func:`nms`. scores: (B, N).
        class_ids: (B, N) integers; suppression then stays within a class, as in :func:`batched_nms`. None: one class.
        iou_threshold, backend: as in :func:`nms`.
        score_threshold: float("-inf") lets all but NaN and -inf scores through.
        max_output: entries per image, at least 0.

    Returns:
        keep: (B, max_output) int64, per image the indices of the highest-scoring kept boxes by descending score, then -1.
        count: (B,) int64, how many entries of ``keep`` are indices. No gradient.

    Raises:
        TypeError: an input is not a tensor. RuntimeError: shapes, dtypes or devices do not fit, or ``max_output`` is negative.
    """
    try:
        if has_torch_function_variadic(boxes, scores, class_ids):
            return handle_torch_function(
                nms_padded, (boxes, scores, class_ids), boxes, scores, class_ids, iou_threshold=iou_threshold,
                score_threshold=score_threshold, max_output=max_output, backend=backend,
            )  # fmt: skip
        classes = class_ids if class_ids is None else class_ids.long()
        path = select("nms_padded", boxes, backend)
        if path not in _PLAIN:
            return op("nms_padded", path)(boxes, scores, classes, iou_threshold, score_threshold, max_output)
        _explain("nms_padded", boxes, scores, 2, "class_ids", class_ids)
        return reference.nms_padded(boxes, scores, classes, iou_threshold, score_threshold, max_output, _solver(path))
    except Exception:
        _explain("nms_padded", boxes, scores, 2, "class_ids", class_ids)
        raise


_PLAIN = (STOCK, REFERENCE)


def _solver(path: str) -> Callable[[Tensor, Tensor, float], Tensor]:
    return reference.nms if path is REFERENCE else _stock_nms() or reference.nms


@lru_cache(maxsize=1)
def _stock_nms() -> Callable[[Tensor, Tensor, float], Tensor] | None:
    try:
        import torchvision
    except Exception:  # not installed, or built for another torch
        return None
    return torchvision.ops.nms


def _check_classes(name: str, argument: str, classes: Any, scores: Tensor) -> None:
    check_tensor(name, argument, classes)
    if classes.shape != scores.shape:
        fail(name, argument, f"shape {tuple(scores.shape)} like scores", tuple(classes.shape))
    if classes.device != scores.device:
        fail(name, argument, f"a tensor on {scores.device} like scores", classes.device)
    if classes.is_complex():
        fail(name, argument, "an integer or floating-point tensor", classes.dtype)


def _explain(name: str, boxes: Any, scores: Any, dims: int, argument: str = "", classes: Any = None) -> None:
    """Raise the clear error for bad input; return where the input is fine and the error has another cause."""
    check_floating(name, "boxes", boxes)
    check_tensor(name, "scores", scores)
    shape = "(N, 4)" if dims == 1 else "(B, N, 4)"
    if boxes.dim() != dims + 1 or boxes.shape[-1] != 4:
        fail(name, "boxes", f"shape {shape}", tuple(boxes.shape))
    if scores.shape != boxes.shape[:-1]:
        fail(name, "scores", f"shape {tuple(boxes.shape[:-1])}, one per box", tuple(scores.shape))
    if scores.dtype != boxes.dtype and not torch.is_autocast_enabled(boxes.device.type):
        fail(name, "scores", f"dtype {boxes.dtype} like boxes", scores.dtype)
    if scores.device != boxes.device:
        fail(name, "scores", f"a tensor on {boxes.device} like boxes", scores.device)
    if classes is not None or argument == "idxs":  # class_ids may be absent
        _check_classes(name, argument, classes, scores)
