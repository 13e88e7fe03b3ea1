"""``local_response_norm`` under pytest-benchmark; options in conftest.py."""

OP = "local_response_norm"


def test_local_response_norm(measured):
    measured()
