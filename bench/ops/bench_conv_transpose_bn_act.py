"""``conv_transpose_bn_act`` under pytest-benchmark; options in conftest.py."""

OP = "conv_transpose_bn_act"


def test_conv_transpose_bn_act(measured):
    measured()
