"""The benchmark scripts load: they share helpers that no other test imports. Peers are imported only when one is timed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
# A folder's scripts see that folder and bench/; what pytest collects (bench_*.py, conftest.py) is its own way in.
SCRIPTS = sorted(p.relative_to(BENCH) for p in BENCH.rglob("*.py") if not p.name.startswith(("bench_", "conftest")))


@pytest.mark.slow
@pytest.mark.parametrize("folder", sorted({script.parent for script in SCRIPTS}), ids=str)
def test_scripts_load(folder: Path) -> None:
    # What lies in a package is imported under its name, a script by its own.
    package = f"{folder}." if (BENCH / folder / "__init__.py").exists() else ""
    names = [package + script.stem for script in SCRIPTS if script.parent == folder and script.stem != "__init__"]
    code = f"import sys; sys.path[:0] = {[str(BENCH / folder), str(BENCH)]!r}\n" + "\n".join(f"import {name}" for name in names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCH.parent)
    assert done.returncode == 0, done.stderr
