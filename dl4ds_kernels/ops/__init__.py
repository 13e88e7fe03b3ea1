"""Op contracts: schema, fake kernel, autograd formula. No maths, no device code. Importing this package defines the ops."""

from . import _conv_transpose_packed, add_act, bn_act, conv_bn_act, max_pool_indices, nms, pool2d, upsample_add  # noqa: F401
