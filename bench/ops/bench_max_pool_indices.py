"""``max_pool_indices`` under pytest-benchmark; options in conftest.py."""

OP = "max_pool_indices"


def test_max_pool_indices(measured):
    measured()
