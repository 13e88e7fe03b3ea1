"""tools/test_summary.py: what the page says of a run is what the run said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASES = """
import pytest

def test_right(): pass
def test_wrong(): assert 1 == 2, "one | two"
@pytest.fixture
def broken(): raise OSError("no disk")
def test_setup(broken): pass
@pytest.mark.parametrize("i", range(3))
def test_left_out(i): pytest.skip("needs an NVIDIA GPU")
"""


def test_counts_failures_and_reasons(tmp_path: Path) -> None:
    (tmp_path / "test_cases.py").write_text(CASES)
    call = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--junitxml=run.xml",
        "test_cases.py",
        "-c",
        "/dev/null",
    ]
    subprocess.run(call, cwd=tmp_path, capture_output=True)
    call = [sys.executable, ROOT / "tools/test_summary.py", "run.xml", "run.xml", "--title", "A run", "--out", "run.md"]
    subprocess.run(call, cwd=tmp_path, check=True)
    page = (tmp_path / "run.md").read_text()
    assert page.startswith("# A run\n")
    assert "| test_cases | 2 | 4 | 6 |" in page and "| **all** | 2 | 4 | 6 |" in page  # the file was given twice
    assert "`test_cases::test_wrong`: AssertionError: one \\| two" in page and "no disk" in page
    assert "- 6: needs an NVIDIA GPU" in page
