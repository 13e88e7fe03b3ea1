"""One file an op: ``select(selection)`` of named shapes, ``problem(case)`` with the fp64 truth, ``setup(case, provider)``.

``STOCK`` and ``DEFAULT`` are what a run compares with and which shapes it takes unless told otherwise.
"""

from . import (
    add3_act,
    add_act,
    bn_act,
    conv_bn_act,
    conv_transpose_bn_act,
    local_response_norm,
    max_pool_indices,
    nms,
    upsample_add,
)

OPS = {
    "add_act": add_act,
    "add3_act": add3_act,
    "bn_act": bn_act,
    "conv_bn_act": conv_bn_act,
    "conv_transpose_bn_act": conv_transpose_bn_act,
    "local_response_norm": local_response_norm,
    "max_pool_indices": max_pool_indices,
    "nms": nms,
    "upsample_add": upsample_add,
}

__all__ = ["OPS"]
