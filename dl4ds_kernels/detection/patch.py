"""Redirects torchvision's NMS to ours, so that detection models use it without a change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.library import Library

from .. import _extension
from .._define import CPP, has_kernel, op

_lock = threading.Lock()
_depth = 0
_library: Library | None = None
# With more coordinates torchvision.ops.batched_nms loops over the classes; else it offsets them and calls nms once.
_CLASSWISE_FROM = {"cpu": 4000, "cuda": 100_000}


@contextmanager
def patch_torchvision_nms() -> Iterator[None]:
    """Within the block, torchvision's NMS runs our kernels: same indices, less time, on CUDA less memory.

    The operator ``torchvision::nms`` itself is redirected, so everything that reaches it is: ``torchvision.ops.nms`` under any
    name it was imported by, detection models, scripted and compiled models. ``torchvision.ops.batched_nms`` takes our one-pass
    kernel where torchvision would loop over the classes. float16 and bfloat16 boxes, which torchvision refuses on the CPU, are
    served.

    Process-wide and reentrant; the last block to end restores torchvision. CUDA tensors without our CUDA part, and quantized
    boxes, keep torchvision's kernels. Script models outside the block.

    Raises:
        ImportError: torchvision is not installed. RuntimeError: our C++ part is not loaded (the message says why).
    """
    import torchvision.ops.boxes

    if not _extension.status()["_C"].loaded:
        raise RuntimeError(f"patch_torchvision_nms: {_extension.missing_reason('cpu')}")
    _enter(torchvision.ops)
    try:
        yield
    finally:
        _leave(torchvision.ops)


def _enter(ops: object) -> None:
    global _depth, _library
    with _lock:
        _depth += 1
        if _depth > 1:
            return
        _library = Library("torchvision", "IMPL")
        for key in ("CPU", "CUDA"):
            if has_kernel("nms", CPP, key.lower()):
                _library.impl("nms", op("nms"), key)
        stock = ops.boxes.batched_nms

        def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
            from .. import functional

            device = boxes.device.type
            if has_kernel("batched_nms", CPP, device) and boxes.numel() > _CLASSWISE_FROM[device]:
                rows = functional.batched_nms(boxes, scores, idxs, iou_threshold).sort()[0]
                return rows[
                    scores[rows].sort(descending=True)[1]
                ]  # torchvision's last step; it decides the order of equal scores
            return stock(boxes, scores, idxs, iou_threshold)

        batched_nms.stock = stock
        ops.boxes.batched_nms = ops.batched_nms = batched_nms


def _leave(ops: object) -> None:
    global _depth, _library
    with _lock:
        _depth -= 1
        if _depth:
            return
        _library._destroy()
        _library = None
        ops.boxes.batched_nms = ops.batched_nms = ops.boxes.batched_nms.stock
