"""``nms`` under pytest-benchmark; options in conftest.py."""

OP = "nms"


def test_nms(measured):
    measured()
