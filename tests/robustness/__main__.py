"""``python -m tests.robustness RESULTS.xml… [--report bench/results/faults.md]``: the table of F01-F54 from runs of the tests.

The runs are pytest's: ``pytest tests/robustness -m "not full" --junitxml=default.xml``, and the ``full`` part in as many pieces
as are convenient. A test that is in several files counts once, with its last outcome. Exit code 1: a row failed or is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import torch

ROWS = [f"F{row:02}" for row in range(1, 55)]


def outcomes(paths: list[Path]) -> dict[str, tuple[str, str]]:
    """Test id -> (outcome, reason of a skip)."""
    found: dict[str, tuple[str, str]] = {}
    for path in paths:
        for case in ET.parse(path).iter("testcase"):
            skipped = case.find("skipped")
            failed = any(case.find(tag) is not None for tag in ("failure", "error"))
            outcome = "failed" if failed else "skipped" if skipped is not None else "passed"
            reason = "" if skipped is None else skipped.get("message", "").removeprefix("Skipped: ")
            found[f"{case.get('classname')}::{case.get('name')}"] = (outcome, reason)
    return found


def row_of(test: str) -> str:
    match = re.search(r"::test_(F\d\d)_", test)
    return match[1] if match else "other"


def table(found: dict[str, tuple[str, str]]) -> list[str]:
    lines = ["| row | passed | failed | skipped | reasons of the skips |", "|---|---:|---:|---:|---|"]
    for row in [*ROWS, "other"]:
        tests = [value for test, value in found.items() if row_of(test) == row]
        count = Counter(outcome for outcome, _ in tests)
        reasons = "; ".join(sorted({reason for _, reason in tests if reason}))
        lines.append(f"| {row} | {count['passed']} | {count['failed']} | {count['skipped']} | {reasons} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files of pytest --junitxml")
    parser.add_argument("--report", type=Path, help="write the table as Markdown")
    arguments = parser.parse_args()
    found = outcomes(arguments.results)
    bad = sorted(test for test, (outcome, _) in found.items() if outcome == "failed")
    missing = [row for row in ROWS if not any(row_of(test) == row for test in found)]
    silent = [row for row in ROWS if not any(row_of(test) == row and value[0] == "passed" for test, value in found.items())]
    count = Counter(outcome for outcome, _ in found.values())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    lines = [
        "# Fault suite", "",
        "Written by `python -m tests.robustness RESULTS.xml… --report …` from runs of `pytest tests/robustness` (default and",
        "`full` part). \"other\": fuzzing, soak, thread and install tests without a row of the checklist.", "",
        f"Commit {commit}, {os.cpu_count()} cores, torch {torch.__version__}: "
        f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped."
        f" Rows without a passing test: {', '.join(silent) or 'none'}.", "",
        *table(found), *([""] if bad else []), *(f"- failed: `{test}`" for test in bad),
    ]  # fmt: skip
    if arguments.report:
        arguments.report.write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")
    return int(bool(bad or missing))


if __name__ == "__main__":
    sys.exit(main())
