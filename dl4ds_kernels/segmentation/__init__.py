"""What segmentation models need beside their layers: tiles, losses, metrics, ensembles, connected components."""

from .components import connected_components
from .ensemble import unanimous, unanimous_classes
from .loss import separation_weights, weighted_cross_entropy
from .metrics import class_iou, confusion_matrix, mean_iou
from .tiles import mirror_pad, overlap_tile

__all__ = [
    "class_iou",
    "confusion_matrix",
    "connected_components",
    "mean_iou",
    "mirror_pad",
    "overlap_tile",
    "separation_weights",
    "unanimous",
    "unanimous_classes",
    "weighted_cross_entropy",
]
