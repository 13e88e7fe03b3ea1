"""A run of the tests as one page: junit files of pytest in, markdown out.

    python tools/test_summary.py build/test-full*.xml --out bench/results/test-full.md --title "make test-full"

By folder: passed, failed, skipped, seconds. Then every failure, and every reason to skip with how often it was given.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

KINDS = ("passed", "failed", "skipped")


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    """(kind, message) of a <testcase>; an error in setup or teardown is a failure, an expected failure a skip as in pytest."""
    for tag, kind in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if (found := case.find(tag)) is not None:
            return kind, (found.get("message") or "").strip()
    return "passed", ""


def room(classname: str) -> str:
    """tests.ops.test_nms -> tests/ops; a file at the top stands for itself."""
    parts = classname.split(".")
    parts = parts[: next((i + 1 for i, part in enumerate(parts) if part.startswith("test_")), len(parts))]
    return "/".join(parts[:2]) if len(parts) > 2 else "/".join(parts)


def shorten(text: str, most: int = 160) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= most else line[: most - 1] + "…"


def render(files: list[Path], title: str, note: str = "") -> str:
    from dl4ds_kernels.benchmark import machine

    counts: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: Counter[str] = Counter()
    failures: list[tuple[str, str]] = []
    reasons: Counter[str] = Counter()
    for case in (case for file in files for case in ElementTree.parse(file).iter("testcase")):
        kind, message = outcome(case)
        where = room(case.get("classname", "?"))
        counts[where][kind] += 1
        seconds[where] += float(case.get("time", 0))
        if kind == "failed":
            failures.append((f"{case.get('classname')}::{case.get('name')}", message))
        elif kind == "skipped":
            reasons[shorten(message)] += 1
    facts = machine()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    whole = sum(counts.values(), Counter())
    lines = [
        f"# {title}",
        "",
        f"By `python tools/test_summary.py`. Commit {commit}, {facts['date']}; {facts['cpu']}, {facts['threads']} threads, "
        f"torch {facts['torch']}, Python {facts['python']}. {note}".rstrip(),
        "",
        "| tests | passed | failed | skipped | seconds |",
        "|---|---:|---:|---:|---:|",
        *(f"| {w} | {' | '.join(str(counts[w][k]) for k in KINDS)} | {seconds[w]:.0f} |" for w in sorted(counts)),
        f"| **all** | {' | '.join(str(whole[k]) for k in KINDS)} | {sum(seconds.values()):.0f} |",
        "",
    ]
    if failures:
        lines += ["## Failed", "", *(f"- `{name}`: {shorten(message)}" for name, message in failures), ""]
    if reasons:
        lines += ["## Skipped, and why", "", *(f"- {n}: {reason}" for reason, n in reasons.most_common()), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="without it: standard output")
    parser.add_argument("--title", default="Test run")
    parser.add_argument("--note", default="", help="a sentence for the head of the page")
    options = parser.parse_args()
    text = render(options.files, options.title, options.note)
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
