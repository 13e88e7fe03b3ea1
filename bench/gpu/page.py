"""The report of ``bench/gpu_check.py`` as one HTML file: nothing loaded from elsewhere, everything escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader

from dl4ds_kernels.cli._page import environment


def results(document: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(part, what was checked, what came of it)."""
    for part, found in document["checks"].items():
        for name, text in found.items():
            yield part, name, text


def is_wrong(text: str) -> bool:
    """Neither right nor left out for a reason."""
    return text != "right" and not text.startswith("SKIP")


def _shares(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Timed rows of ours with their share of the copy bandwidth."""
    ceiling = document.get("ceilings", {}).get("copy_gbytes_per_s")
    rows = [row for row in document.get("timings", []) if row["ours"] and row["median_ms"] is not None]
    return [row | {"share": row["gbytes_per_s"] / ceiling if ceiling else None} for row in rows]


def render(document: dict[str, Any]) -> str:
    """The page of a report."""
    found = list(results(document))
    parts = {
        part: Counter("wrong" if is_wrong(text) else text.partition(":")[0].lower() for p, _, text in found if p == part)
        for part in document["checks"]
    }
    return (
        environment(FileSystemLoader(Path(__file__).parent))
        .get_template("page.html.j2")
        .render(
            document=document,
            parts=parts,
            problems=[row for row in found if is_wrong(row[2])],
            skips=[row for row in found if row[2].startswith("SKIP")],
            rows=_shares(document),
        )
    )
