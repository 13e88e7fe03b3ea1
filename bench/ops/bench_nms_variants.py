"""``nms_padded`` and the relatives of NMS under pytest-benchmark; options in conftest.py."""

OPS = ("nms_padded", "soft_nms", "diou_nms", "matrix_nms", "darknet_nms")


def test_nms_variants(measured):
    measured()
