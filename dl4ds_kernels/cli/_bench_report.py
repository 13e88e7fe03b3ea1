"""The HTML report of ``bench``: one file, nothing loaded from elsewhere, everything escaped, light and dark."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from . import _roofline
from ._page import environment


def render(document: Mapping[str, Any]) -> str:
    """The report of a ``bench`` document, which must have a ``roof``."""
    rows, roof = document["rows"], document["roof"]
    order = list(dict.fromkeys(row["provider"] for row in sorted(rows, key=lambda row: row["ours"])))
    ours = {row["provider"]: row["ours"] for row in rows}
    return environment().get_template("bench.html.j2").render(
        **document,
        title=document["model"] or document["op"],
        cases=[_case(list(group)) for _, group in itertools.groupby(rows, _key)],
        plot=_roofline.roofline(rows, roof["gbytes"], roof["gflops"], order),
        legend=[(name, ours[name], _swatch(index, ours[name])) for index, name in enumerate(order)],
        best=_best(rows),
    )  # fmt: skip


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("case", "shape", "dtype", "layout", "direction"))


def _case(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """One case with bar lengths in percent of its slowest p80."""
    top = max((row["p80_ms"] for row in rows if row["p80_ms"]), default=1.0)
    bars = [
        {
            **row,
            "bar": 100 * (row["median_ms"] or 0.0) / top,
            "low": 100 * (row["p20_ms"] or 0.0) / top,
            "span": 100 * ((row["p80_ms"] or 0.0) - (row["p20_ms"] or 0.0)) / top,
        }
        for row in rows
    ]
    first = rows[0]
    return {"name": first["case"], "about": " ".join(_key(first)[1:]), "rows": bars}


def _best(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per backend of ours: the median over cases of its ratio to the fastest stock provider, and to the first."""
    found = []
    for name in dict.fromkeys(row["provider"] for row in rows if row["ours"] and row["speedup_best_stock"]):
        mine = [row for row in rows if row["provider"] == name and row["speedup_best_stock"]]
        middle = {key: sorted(row[key] for row in mine)[len(mine) // 2] for key in ("speedup", "speedup_best_stock")}
        found.append({"provider": name, "cases": len(mine), "lowest": min(row["speedup_best_stock"] for row in mine), **middle})
    return found


def _swatch(index: int, ours: bool) -> Markup:
    return Markup(f'<svg class="swatch" viewBox="0 0 14 14" aria-hidden="true">{_roofline.mark(index, 7, 7, ours)}</svg>')
