"""What detection models need beside their layers: darknet's files, YOLOv1's decode, loss and targets, torchvision's NMS.

Everything but the NMS patch is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

from .patch import patch_torchvision_nms

_WHERE = {
    "CfgError": "cfg", "Section": "cfg", "parse_cfg": "cfg", "read_cfg": "cfg",
    "WeightSlot": "weights", "WeightsError": "weights", "WeightsHeader": "weights", "file_size": "weights",
    "load_weights": "weights", "read_header": "weights", "save_weights": "weights",
    "Detections": "yolo", "VOC_CLASSES": "yolo", "YoloLayout": "yolo", "clip_boxes": "yolo", "decode": "yolo",
    "detect": "yolo", "YoloLoss": "loss", "responsible_boxes": "loss", "yolo_loss": "loss", "encode_targets": "targets",
}  # fmt: skip

__all__ = ["patch_torchvision_nms", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
