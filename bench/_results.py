"""Where result files go and how they are written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def save(path: Path, document: dict[str, Any]) -> None:
    """Write a result file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table; all columns but the first are right-aligned."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def models_table(rows: list[dict[str, Any]]) -> str:
    """Medians in milliseconds; the ratio is to the best of all peers of the row."""
    names = list(dict.fromkeys(key for row in rows for key in row["candidates"]))
    lines = []
    for row in rows:
        found = row["candidates"]
        times = [f"{found[n]['median_ms']:.1f}" if n in found else "-" for n in names]
        ratios = [f"{row[key]:.2f}x" if key in row else "wrong" for key in ("ratio_ours", "ratio_ours_exact")]
        lines.append([row["name"], *times, row["best_peer"], *ratios, f"{row['goal']:.2f}x", f"{row['floor_ms']:.1f}"])
    return markdown(["model", *(f"{n} ms" for n in names), "best peer", "ours", "exact", "goal", "direct floor ms"], lines)
