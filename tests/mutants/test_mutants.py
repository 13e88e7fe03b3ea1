"""Every mutant still applies, to exactly one place; running them is ``python -m tests.mutants`` and part of the full suite."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.catalog import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_applies(mutant: Mutant) -> None:
    """A change of the code that moves the line has to move the mutant."""
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file}: {text.count(mutant.old)} places"
    assert mutant.new not in ("", mutant.old)
    assert any((ROOT / part).exists() for part in mutant.tests), mutant.tests


def test_catalog() -> None:
    kinds = Counter(m.kind for m in MUTANTS)
    assert len(MUTANTS) >= 25 and min(kinds[kind] for kind in ("python", "cpu", "cuda")) >= 6
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.full
def test_all_are_killed() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.mutants"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
