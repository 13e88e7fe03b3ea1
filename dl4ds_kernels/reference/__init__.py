"""The slow, obvious versions in plain PyTorch: any dtype, differentiable, the truth of every test."""

from .add_act import add3_act, add_act
from .bn_act import bn_act
from .conv_bn_act import conv_bn_act
from .conv_transpose_bn_act import conv_transpose_bn_act
from .local_response_norm import local_response_norm
from .max_pool_indices import max_pool_indices, max_unpool
from .upsample_add import upsample_add

__all__ = [
    "add3_act",
    "add_act",
    "bn_act",
    "conv_bn_act",
    "conv_transpose_bn_act",
    "local_response_norm",
    "max_pool_indices",
    "max_unpool",
    "upsample_add",
]
