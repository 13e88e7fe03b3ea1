"""One file an op: ``select(selection)`` of named shapes, ``problem(case)`` with the fp64 truth, ``setup(case, provider)``.

``STOCK`` and ``DEFAULT`` are what a run compares with and which shapes it takes unless told otherwise.
"""

from . import add_act, bn_act, conv_bn_act, nms

OPS = {"add_act": add_act, "bn_act": bn_act, "conv_bn_act": conv_bn_act, "nms": nms}

__all__ = ["OPS"]
