"""The roofline plot of the bench report: plain SVG whose colours come from the page, so that light and dark both work.

x: operations a byte of the least possible traffic; y: GFLOP/s. The roof is what stock torch reaches at best on this machine:
a large matrix product, and a copy of 256 MiB. A point on the slope is as fast as memory allows, one on the flat as fast as the
arithmetic; Winograd and Strassen count the direct algorithm's operations and may lie above the roof.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 460, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 30, 14, 52
_MARKS = 6  # marker shapes m0 … m5


def _decades(low: float, high: float) -> tuple[int, int]:
    """Whole decades around positive values."""
    return math.floor(math.log10(low)), max(math.floor(math.log10(low)) + 1, math.ceil(math.log10(high)))


def _number(exponent: int) -> str:
    return f"{10**exponent:,}" if exponent >= 0 else f"{10**exponent:g}"


def mark(index: int, x: float, y: float, ours: bool) -> str:
    """An SVG marker of about 9 units around (x, y); our own is a filled disc."""
    if ours:
        return f'<circle class="ours" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>'
    shape = index % _MARKS
    if shape == 0:
        return f'<rect class="peer" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    if shape == 1:
        return f'<path class="peer" d="M{x:.1f} {y - 5:.1f}l5 9h-10z"/>'
    if shape == 2:
        return f'<path class="peer" d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>'
    if shape == 3:
        return f'<path class="line" d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"/>'
    if shape == 4:
        return f'<path class="line" d="M{x:.1f} {y - 5:.1f}v10m-5 -5h10"/>'
    return f'<circle class="hollow" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'


def points(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with arithmetic and a time, with their intensity in operations a byte."""
    return [
        {**row, "intensity": row["gflop_per_s"] / row["gbytes_per_s"]}
        for row in rows
        if row["median_ms"] and row["gflop_per_s"] and row["gbytes_per_s"]
    ]


def roofline(
    rows: Sequence[Mapping[str, Any]], gbytes: float, gflops: Mapping[str, float], order: Sequence[str]
) -> Markup | None:
    """The SVG, or None where no row has arithmetic.

    Args:
        rows: of the report's document. gbytes: the memory roof in GB/s. gflops: the arithmetic roof by dtype.
        order: providers in the order of the legend, which gives each its marker.
    """
    found = points(rows)
    if not found:
        return None
    peak = max(gflops.values())
    xs = [p["intensity"] for p in found] + [peak / gbytes]
    ys = [p["gflop_per_s"] for p in found] + [peak]
    (x0, x1), (y0, y1) = _decades(min(xs) / 1.5, max(xs) * 1.5), _decades(min(ys) / 1.5, max(ys) * 1.2)

    def px(value: float) -> float:
        return _LEFT + (math.log10(value) - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def py(value: float) -> float:
        return _HEIGHT - _BOTTOM - (math.log10(value) - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    parts: list[str] = []
    for k in range(x0, x1 + 1):
        x = px(10.0**k)
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{_number(k)}</text>')
    for k in range(y0, y1 + 1):
        y = py(10.0**k)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(k)}</text>')
    labels = []  # after every roof: a line does not cross another's label
    for dtype, top in gflops.items():
        ridge = top / gbytes
        start = max(10.0**x0, 10.0**y0 / gbytes)
        if start < ridge:
            path = f"M{px(start):.1f} {py(start * gbytes):.1f}L{px(ridge):.1f} {py(top):.1f}H{px(10.0**x1):.1f}"
        else:
            path = f"M{px(10.0**x0):.1f} {py(top):.1f}H{px(10.0**x1):.1f}"
        parts.append(f'<path class="roof" d="{path}"/>')
        label = f"{escape(dtype)}: {top:,.0f} GFLOP/s"
        labels.append(
            f'<text class="rooftext" x="{_WIDTH - _RIGHT - 4}" y="{py(top) - 6:.1f}" text-anchor="end">{label}</text>'
        )
    parts += labels
    for p in sorted(found, key=lambda p: bool(p["ours"])):  # ours are drawn last, on top
        text = (
            f"{p['provider']}, {p['case']} {p['shape']} {p['dtype']}: {p['gflop_per_s']:.0f} GFLOP/s, {p['median_ms']:.3f} ms"
        )
        drawn = mark(order.index(p["provider"]), px(p["intensity"]), py(p["gflop_per_s"]), bool(p["ours"]))
        parts.append(f"<g><title>{escape(text)}</title>{drawn}</g>")
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">operations a byte of least traffic</text>')
    axis = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(f'<text transform="translate(14 {axis:.0f}) rotate(-90)" text-anchor="middle">GFLOP/s</text>')
    label = "roofline plot: rate against arithmetic intensity of every case and provider"
    return Markup(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>')
