"""NMS as torchvision's CUDA kernel computes it, pair by pair in numpy, and the shipped launcher on the PTX simulator."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
from typing import Any

import _cuda_launch as cuda
import numpy as np
import torch
from ptxsim import Report
from torch import Tensor

Array = np.ndarray


# ---- torchvision's arithmetic (read from its machine code, sm_80)


@functools.cache
def _libm_fma() -> Any:
    fma = ctypes.CDLL(ctypes.util.find_library("m")).fma
    fma.restype, fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    return np.frompyfunc(fma, 3, 1)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c with one rounding, in float32 or float64."""
    if a.dtype == np.float64:
        return np.asarray(_libm_fma()(a, b, c), dtype=np.float64)
    # In float64 the product is exact; the sum is rounded to odd, so that rounding it again to float32 is right.
    product, addend = a.astype(np.float64) * b.astype(np.float64), np.broadcast_to(c, np.broadcast(a, b, c).shape).astype(float)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = (np.ascontiguousarray(total).view(np.int64) & 1) == 0
    inexact = np.isfinite(total) & np.isfinite(error) & (error != 0)
    odd = np.where(inexact & even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return odd.astype(np.float32)


def suppressed(a: Array, b: Array, threshold: float, half: bool) -> Array:
    """Whether box ``a`` (4,) suppresses each of ``b`` (n, 4), which score less."""
    limit = np.float32(threshold).astype(a.dtype)
    rounded = (lambda v: v.astype(np.float16).astype(np.float32)) if half else (lambda v: v)
    zero = a.dtype.type(0)
    w = np.fmax(rounded(np.fmin(a[2], b[:, 2]) - np.fmax(a[0], b[:, 0])), zero)
    h = np.fmax(rounded(np.fmin(a[3], b[:, 3]) - np.fmax(a[1], b[:, 1])), zero)
    inter = w * h
    aw, ah, bw, bh = a[2] - a[0], rounded(a[3] - a[1]), b[:, 2] - b[:, 0], rounded(b[:, 3] - b[:, 1])
    aw, ah = np.broadcast_to(aw, bw.shape), np.broadcast_to(ah, bh.shape)
    both = fma(aw, ah, bw * bh) if half else fma(bw, bh, aw * ah)
    return inter / (both - inter) > limit


def transcription(boxes: Tensor, scores: Tensor, threshold: float, classes: Tensor | None = None) -> Tensor:
    """Indices kept by descending score, one box after another. bfloat16, which torchvision refuses, as float32."""
    wide = (boxes if boxes.dtype == torch.float64 else boxes.float()).numpy()
    order = scores.sort(stable=True, descending=True)[1].numpy()
    ids = np.zeros(len(order), dtype=np.int64) if classes is None else classes.numpy()
    kept = []
    with np.errstate(all="ignore"):
        while order.size:
            first, rest = order[0], order[1:]
            kept.append(first)
            hit = suppressed(wide[first], wide[rest], threshold, boxes.dtype == torch.float16) & (ids[rest] == ids[first])
            order = rest[~hit]
    return torch.tensor(np.array(kept, dtype=np.int64))


def padded_transcription(
    boxes: Tensor, scores: Tensor, classes: Tensor | None, threshold: float, score_threshold: float | None, max_output: int
) -> tuple[Tensor, Tensor]:
    """The same for every image, among the boxes above the score threshold: keep (B, max_output), count (B,)."""
    keep = torch.full((boxes.shape[0], max_output), -1)
    count = torch.zeros(boxes.shape[0], dtype=torch.int64)
    for b in range(boxes.shape[0]):
        rows = torch.arange(boxes.shape[1])
        if score_threshold is not None:
            rows = torch.where(scores[b].double() > score_threshold)[0]
        kept = transcription(boxes[b, rows], scores[b, rows], threshold, None if classes is None else classes[b, rows])
        kept = rows[kept][:max_output]
        keep[b, : kept.numel()], count[b] = kept, kept.numel()
    return keep, count


# ---- the launcher


def launch(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    threshold: float,
    score_threshold: float | None = None,
    max_output: int | None = None,
    **options: int,
) -> tuple[Tensor, Tensor, list[Report]]:
    """launch_nms_fwd on (B, N, 4) boxes: keep, count, and a report per kernel. No score threshold: no filter."""
    batch, count = scores.shape
    max_output = count if max_output is None else max_output
    keep, kept = torch.empty(batch, max_output, dtype=torch.int64), torch.empty(batch, dtype=torch.int64)
    with cuda.library().session(**options) as session:
        run = cuda.Launch("nms", session, "fwd")
        params = run.make(
            dtype=cuda.DTYPES[boxes.dtype], batch=batch, count=count, boxes=run.read(boxes, "boxes"),
            scores=run.read(scores, "scores"), classes=run.read(classes, "classes"), iou_threshold=threshold,
            filter=score_threshold is not None, score_threshold=score_threshold or 0.0, max_output=max_output,
            keep=run.pointer(keep, "keep", output=True), kept=run.pointer(kept, "kept", output=True),
        )  # fmt: skip
        memory = run.workspace(params)
        reports = run.run(params)
        assert len(reports) == session.call("nms_fwd_launches", params)
        del memory
    return keep, kept, reports


def sizes(batch: int, count: int, classes: bool, dtype: torch.dtype = torch.float32, filtered: bool = False) -> tuple[int, int]:
    """(bytes of workspace, launches) of a call; nothing is launched."""
    with cuda.library().session() as session:
        run = cuda.Launch("nms", session, "fwd")
        params = run.make(
            dtype=cuda.DTYPES[dtype], batch=batch, count=count, classes=64 if classes else 0, filter=filtered, max_output=count
        )
        return session.call("nms_fwd_workspace", params, restype=ctypes.c_int64), session.call("nms_fwd_launches", params)
