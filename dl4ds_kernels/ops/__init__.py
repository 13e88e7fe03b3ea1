"""Op contracts: schema, fake kernel, autograd formula. No maths, no device code. Importing this package defines the ops."""

from . import add_act, bn_act, conv_bn_act, conv_transpose_bn_act, local_response_norm, max_pool_indices, nms, upsample_add  # noqa: F401
