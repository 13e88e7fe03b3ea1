"""``add_bn_act`` and ``bn_act_conv`` under pytest-benchmark; options in conftest.py."""

OPS = ("add_bn_act", "bn_act_conv")


def test_preact(measured):
    measured()
