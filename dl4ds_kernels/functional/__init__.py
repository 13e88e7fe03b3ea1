"""Public stateless API; every function takes and returns plain tensors."""

from .add_act import add_act
from .bn_act import bn_act
from .conv_bn_act import conv_bn_act
from .nms import batched_nms, nms, nms_padded
from .nms_variants import darknet_nms, diou_nms, matrix_nms, soft_nms

__all__ = [
    "add_act",
    "batched_nms",
    "bn_act",
    "conv_bn_act",
    "darknet_nms",
    "diou_nms",
    "matrix_nms",
    "nms",
    "nms_padded",
    "soft_nms",
]
