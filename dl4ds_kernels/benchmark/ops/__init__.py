"""One file an op or family.

``select(selection)`` of named shapes, ``problem(case)`` with the fp64 truth, ``setup(case, provider)``.

``STOCK`` and ``DEFAULT`` are what a run compares with and which shapes it takes unless told otherwise. Every public function of
``dl4ds_kernels.functional`` is in one of them (``COVERS``): ``info`` runs each once.
"""

from typing import Any

from . import (
    add3_act,
    add_act,
    blocks,
    bn_act,
    conv_bn_act,
    conv_transpose_bn_act,
    linear_act,
    local_response_norm,
    max_pool_indices,
    nms,
    nms_variants,
    pool2d,
    preact,
    upsample_add,
)

OPS: dict[str, Any] = {
    "add_act": add_act,
    "add3_act": add3_act,
    "add_bn_act": preact.add_bn_act,
    "avg_pool2d": pool2d.avg_pool2d,
    "basic_block": blocks.basic_block,
    "bn_act": bn_act,
    "bn_act_conv": preact.bn_act_conv,
    "bn_act_max_pool": blocks.bn_act_max_pool,
    "bottleneck": blocks.bottleneck,
    "conv_bn_act": conv_bn_act,
    "conv_transpose_bn_act": conv_transpose_bn_act,
    "darknet_nms": nms_variants.darknet_nms,
    "dense_block": blocks.dense_block,
    "diou_nms": nms_variants.diou_nms,
    "global_avg_pool2d": pool2d.global_avg_pool2d,
    "linear_act": linear_act.linear_act,
    "local_response_norm": local_response_norm,
    "matrix_nms": nms_variants.matrix_nms,
    "max_pool2d": pool2d.max_pool2d,
    "max_pool_indices": max_pool_indices,
    "max_unpool": pool2d.max_unpool,
    "nms": nms,
    "nms_padded": nms_variants.nms_padded,
    "preact_basic_block": blocks.preact_basic_block,
    "preact_bottleneck": blocks.preact_bottleneck,
    "soft_nms": nms_variants.soft_nms,
    "upsample_add": upsample_add,
}
# Functions that a case of another name measures.
COVERS = {"batched_nms": "nms"}
NMS = ("nms", "nms_padded", "soft_nms", "diou_nms", "matrix_nms", "darknet_nms")  # boxes, not maps: no layout, no gradient


def differentiable(op: str) -> bool:
    """Whether ``fwd+bwd`` of an op is measured: not of boxes, and not of what has no gradient of its own."""
    return bool(getattr(OPS[op], "differentiable", op not in NMS))


__all__ = ["COVERS", "NMS", "OPS", "differentiable"]
