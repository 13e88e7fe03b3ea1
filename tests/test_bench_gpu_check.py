"""bench/gpu_check.py as a program: a failing part costs nothing but itself. What it finds is for a GPU or a dry run to say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    pytest.importorskip("jinja2", reason="the report is a template")
    import gpu_check

    return gpu_check


def test_a_part_that_raises_is_a_problem_and_not_the_end(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def poisoned(_: dict[str, Any]) -> dict[str, str]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered <b>")

    def later(document: dict[str, Any]) -> dict[str, str]:
        kept = json.loads((tmp_path / "r.json").read_text())  # what came before is on disk already
        assert list(kept["checks"]) == ["first", "second"]
        document["figures"] = 3
        return {"call": "right"}

    parts = {"first": lambda _: {"a": "right", "b": "SKIP: no"}, "second": poisoned, "third": later}
    monkeypatch.setattr(gpu_check, "parts", lambda place, options: parts)
    place = gpu_check.Place("cpu")
    document = gpu_check.check(place, argparse.Namespace(report=tmp_path / "r"))
    wrong = [row for row in gpu_check.page.results(document) if gpu_check.page.is_wrong(row[2])]
    assert [row[0] for row in wrong] == ["second"] and "illegal memory access" in wrong[0][2]
    assert json.loads((tmp_path / "r.json").read_text())["figures"] == 3
    page = (tmp_path / "r.html").read_text()
    assert "illegal memory access" in page and "<b>" not in page
    out = capsys.readouterr().out
    assert "[2/3] second" in out and "1 WRONG" in out and out.count("right\n") == 2


def test_every_part_is_there(gpu_check: Any) -> None:
    options = argparse.Namespace(no_sanitizer=False, no_simulator=False, no_timing=False, batch=1, rounds=1, report=Path("x"))
    names = list(gpu_check.parts(gpu_check.Place("cpu"), options))
    assert names[:2] == ["info", "parity against fp64"] and names[-2:] == ["timed calls", "models"]
    assert {*gpu_check.rules.RULES, "faults", "compute-sanitizer", "PTX simulator", "ways of a convolution"} <= {*names}
    options.no_sanitizer = options.no_simulator = options.no_timing = True
    fewer = list(gpu_check.parts(gpu_check.Place("cpu"), options))
    assert {*names} - {*fewer} == {"compute-sanitizer", "PTX simulator", "timed calls", "models"}
