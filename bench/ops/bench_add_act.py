"""``add_act`` under pytest-benchmark; options in conftest.py."""

OP = "add_act"


def test_add_act(measured):
    measured()
