"""The inference poolings and ``max_unpool`` under pytest-benchmark; options in conftest.py."""

OPS = ("max_pool2d", "avg_pool2d", "global_avg_pool2d", "max_unpool")


def test_pool2d(measured):
    measured()
