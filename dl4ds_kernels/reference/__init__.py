"""The slow, obvious versions in plain PyTorch: any dtype, differentiable, the truth of every test."""

from .add_act import add3_act, add_act
from .bn_act import bn_act
from .bn_act_max_pool import bn_act_max_pool
from .conv_bn_act import conv_bn_act
from .conv_transpose_bn_act import conv_transpose_bn_act
from .dense_block import dense_block
from .linear_act import linear_act
from .local_response_norm import local_response_norm
from .max_pool_indices import max_pool_indices, max_unpool
from .pool2d import avg_pool2d, global_avg_pool2d, max_pool2d
from .residual_block import residual_block
from .upsample_add import upsample_add

__all__ = [
    "add3_act",
    "add_act",
    "avg_pool2d",
    "bn_act",
    "bn_act_max_pool",
    "conv_bn_act",
    "conv_transpose_bn_act",
    "global_avg_pool2d",
    "dense_block",
    "linear_act",
    "local_response_norm",
    "max_pool2d",
    "max_pool_indices",
    "max_unpool",
    "residual_block",
    "upsample_add",
]
