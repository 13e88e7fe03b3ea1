"""``upsample_add`` under pytest-benchmark; options in conftest.py."""

OP = "upsample_add"


def test_upsample_add(measured):
    measured()
