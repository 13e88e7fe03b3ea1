"""``bn_act`` under pytest-benchmark; options in conftest.py."""

OP = "bn_act"


def test_bn_act(measured):
    measured()
