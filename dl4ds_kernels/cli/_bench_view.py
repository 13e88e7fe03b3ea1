"""What ``bench`` prints and writes: one small table a case, CSV, the messages and the exit code."""

from __future__ import annotations

import csv
import io
import itertools
from dataclasses import fields
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from .. import benchmark
from ._console import err, fail, out


def to_csv(rows: list[benchmark.Row]) -> str:
    """The rows with a header line; a cell that a spreadsheet would run as a formula is quoted with an apostrophe."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(benchmark.Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _harmless(value) for key, value in row.as_dict().items()} for row in rows)
    return text.getvalue()


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def key(row: benchmark.Row) -> tuple[str, ...]:
    """What the rows of one case have in common."""
    return (row.case, row.shape, row.dtype, row.layout, row.direction)


def rate(row: benchmark.Row) -> str:
    """GFLOP/s where the case has arithmetic to speak of, else GB/s."""
    if row.median_ms is None:
        return ""
    return f"{row.gflop_per_s:.0f} GFLOP/s" if row.gflop_per_s is not None else f"{row.gbytes_per_s:.1f} GB/s"


def show(rows: list[benchmark.Row], machine: dict[str, Any]) -> None:
    """One small table a case, the fastest row marked."""
    console = out()
    where = machine["gpus"][0]["name"] if rows[0].device.startswith("cuda") else machine["cpu"]
    console.print(f"{escape(where)}, {machine['threads']} threads, torch {machine['torch']}")
    for (name, shape, dtype, layout, direction), group in itertools.groupby(rows, key):
        listed = list(group)
        fastest = min((row.median_ms for row in listed if row.median_ms is not None), default=None)
        heading = f"[bold]{escape(listed[0].op)}[/] {escape(name)} {shape} {dtype} {layout} {direction}"
        table = Table(title=heading, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("provider", no_wrap=True)
        for column in ("median ms", "p20 - p80", "rate", "faults", "error", "vs first", "vs fastest"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in listed:
            table.add_row(*_cells(row), style="bold" if row.median_ms == fastest and fastest is not None else None)
        console.print(table)
    console.print(
        "error: max |y - fp64| / max |fp64|; vs: how many times faster than the first and the fastest stock row", style="dim"
    )


def _cells(row: benchmark.Row) -> list[str]:
    provider = f"ours: {row.provider}" if row.ours else row.provider
    error = "-" if row.error is None else f"{row.error:.1e}"
    if row.median_ms is None:
        color = "red" if benchmark.failed(row) else "yellow"
        return [provider, f"[{color}]{row.status}[/]", "", "", "", error, "", ""]
    ratios = ["" if value is None else f"{value:.2f}x" for value in (row.speedup, row.speedup_best_stock)]
    return [
        provider,
        f"{row.median_ms:.3f}",
        f"{row.p20_ms:.3f} - {row.p80_ms:.3f}",
        rate(row),
        f"{row.faults:.0f}",
        error,
        *ratios,
    ]


def finish(rows: list[benchmark.Row], fail_below: float | None) -> None:
    """Messages of the rows without a speed, and the exit code."""
    for row in rows:
        if row.message:
            where = f"{row.case} {row.dtype} {row.layout} {row.direction} {row.provider}"
            err().print(f"{escape(where)}: {row.status}: {escape(row.message)}", soft_wrap=True)
    bad = [row for row in rows if benchmark.failed(row)]
    if bad:
        fail(f"{len(bad)} of {len(rows)} rows failed: " + ", ".join(sorted({f"{row.provider} {row.status}" for row in bad})))
    slow = [row for row in rows if row.ours and fail_below is not None and not (row.speedup_best_stock or 0.0) >= fail_below]
    if slow:
        worst = min(slow, key=lambda row: row.speedup_best_stock or 0.0)
        fail(
            f"{len(slow)} rows below {fail_below}x; the slowest is {worst.case} {worst.provider} at {worst.speedup_best_stock}x"
        )
