"""bench/ops/nms.py: a small run gives equal boxes, a row per provider, goals and a plot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="torchvision is what is compared with")
pytest.importorskip("matplotlib", reason="draws the plot")
ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_small_run(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "bench/ops/nms.py", "--sizes", "100,400", "--budget", "0.01"]
    command += ["--json", tmp_path / "nms.json", "--plot", tmp_path / "nms.png"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300)
    assert "WRONG" not in done.stdout and done.returncode in (0, 1), done.stderr  # 1: a goal of speed missed on a busy machine
    document = json.loads((tmp_path / "nms.json").read_text())
    ours = [row for row in document["rows"] if row["provider"] == "ours"]
    assert len(ours) == 8 and all(row["equal"] and row["median_ms"] > 0 for row in ours)
    assert {"torchvision", "ours", "sort"} <= {row["provider"] for row in document["rows"]}
    assert any("never slower than torchvision" in goal["goal"] for goal in document["goals"])
    assert (tmp_path / "nms.png").stat().st_size > 10_000


def test_committed_results_meet_the_goals() -> None:
    """What README quotes: a whole run, in which nothing was missed."""
    document = json.loads((ROOT / "bench/results/nms.json").read_text())
    assert {row["n"] for row in document["rows"]} >= {100, 1000, 5000, 10_000, 20_000, 50_000}
    assert {row["regime"] for row in document["rows"]} == {"heavy", "sparse", "clustered", "classes"}
    assert len(document["goals"]) == 7 and all(goal["met"] for goal in document["goals"])
    assert all(row["equal"] for row in document["rows"] if row["provider"] == "ours")
