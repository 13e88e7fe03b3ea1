"""``linear_act`` under pytest-benchmark; options in conftest.py."""

OPS = ("linear_act",)


def test_linear_act(measured):
    measured()
