"""Op contracts: schema, fake kernel, autograd formula. No maths, no device code. Importing this package defines the ops."""

from . import (  # noqa: F401
    _bn_act_conv,
    _conv2d,
    _conv_bn_act_tail,
    _conv_bn_act_train,
    _conv_dgrad,
    _conv_transpose_packed,
    _dense,
    add_act,
    bn_act,
    bn_act_max_pool,
    conv_bn_act,
    conv_transpose_bn_act,
    dense_block,
    linear_act,
    local_response_norm,
    max_pool_indices,
    nms,
    pool2d,
    residual_block,
    upsample_add,
)
