"""Public stateless API; every function takes and returns plain tensors."""

from .add_act import add_act
from .add_bn_act import add_bn_act
from .bn_act import bn_act
from .bn_act_conv import bn_act_conv
from .bn_act_max_pool import bn_act_max_pool
from .conv_bn_act import conv_bn_act
from .conv_transpose_bn_act import conv_transpose_bn_act
from .dense_block import dense_block
from .linear_act import linear_act
from .local_response_norm import local_response_norm
from .max_pool_indices import max_pool_indices, max_unpool
from .nms import batched_nms, nms, nms_padded
from .nms_variants import darknet_nms, diou_nms, matrix_nms, soft_nms
from .pool2d import avg_pool2d, global_avg_pool2d, max_pool2d
from .residual_block import BNParams, ConvParams, basic_block, bottleneck, preact_basic_block, preact_bottleneck
from .upsample_add import upsample_add

__all__ = [
    "BNParams",
    "ConvParams",
    "add_act",
    "add_bn_act",
    "avg_pool2d",
    "basic_block",
    "batched_nms",
    "bn_act",
    "bn_act_conv",
    "bn_act_max_pool",
    "bottleneck",
    "conv_bn_act",
    "conv_transpose_bn_act",
    "darknet_nms",
    "dense_block",
    "diou_nms",
    "global_avg_pool2d",
    "linear_act",
    "local_response_norm",
    "matrix_nms",
    "max_pool2d",
    "max_pool_indices",
    "max_unpool",
    "nms",
    "nms_padded",
    "preact_basic_block",
    "preact_bottleneck",
    "soft_nms",
    "upsample_add",
]
