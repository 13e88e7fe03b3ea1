"""``add3_act`` under pytest-benchmark; options in conftest.py."""

OP = "add3_act"


def test_add3_act(measured):
    measured()
