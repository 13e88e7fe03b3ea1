"""The report's plots: matplotlib drawings as SVG data URIs (text as paths, so that they look alike everywhere)."""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_OURS, _STOCK, _INK, _FAINT, _WARN = "#0f766e", "#94a3b8", "#1e293b", "#e2e8f0", "#b91c1c"
_STYLE = {
    "svg.fonttype": "path",
    "svg.hashsalt": "dl4ds_kernels",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def _draw(width: float, height: float, paint: Any) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_STOCK)
        axes.tick_params(left=False)
        axes.grid(axis="x", color=_FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        paint(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _short(text: str, limit: int = 30) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _escape(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib would read mathematics between two dollar signs


def speed_plot(rows: list[dict[str, Any]]) -> str:
    """Median time a picture, bars from the 20th to the 80th percentile, every sample as a dot."""
    ours = next(row for row in rows if row["name"] == "ours")

    def paint(axes: Axes) -> None:
        top = 1.25 * max(row["p80_ms"] for row in rows)
        for y, row in enumerate(rows):
            mine = row is ours
            axes.barh(y, row["median_ms"], height=0.58, color=_OURS if mine else _STOCK)
            axes.plot([row["p20_ms"], row["p80_ms"]], [y, y], color=_INK, linewidth=1.4, solid_capstyle="butt")
            inside = [s for s in row["samples_ms"] if s < top]
            axes.plot(inside, [y + 0.38] * len(inside), ".", color=_OURS if mine else _STOCK, markersize=3, alpha=0.7)
            text = f"{row['median_ms']:.1f} ms"
            text += "" if mine else f"   ours {row['ours_speedup']:.2f}x"
            axes.text(row["p80_ms"] + 0.012 * top, y, text, va="center", fontweight="bold" if mine else "normal")
        axes.set_xlim(0, top)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds a picture (bar: median, line: p20 to p80, dots: samples)")

    return _draw(9.6, 0.8 + 0.52 * len(rows), paint)


def error_plot(parity: dict[str, Any]) -> str:
    """Error against fp64 of every model, log scale, with the limit for ours."""
    rows = [(name, error) for name, error in parity["errors"].items() if error]

    def paint(axes: Axes) -> None:
        values = [error for _, error in rows] + [parity["limit"]]
        low = 10 ** (-0.7) * min(values)
        for y, (name, error) in enumerate(rows):
            color = (_OURS if parity["ok"] else _WARN) if name == "ours" else _STOCK
            axes.barh(y, error - low, left=low, height=0.58, color=color)
            axes.text(error * 1.06, y, f"{error:.1e}", va="center", fontweight="bold" if name == "ours" else "normal")
        axes.axvline(parity["limit"], color=_WARN, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(parity["limit"], -0.62, "limit for ours ", color=_WARN, ha="right", fontsize=9)
        axes.set_xscale("log")
        axes.set_xlim(low, 2.2 * max(values))
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.9)
        axes.set_xlabel("max |logits - fp64| / max |fp64|")

    return _draw(5.0, 1.0 + 0.42 * len(rows), paint)


def top5_plot(top5: dict[str, Any]) -> str:
    """Probabilities of the five most likely classes, stock and ours side by side."""
    ours = {row["class"]: row["probability"] for row in top5["ours"]}
    labels = {row["class"]: row["label"] for row in top5["stock"] + top5["ours"]}
    stock = {row["class"]: row["probability"] for row in top5["stock"]}

    def paint(axes: Axes) -> None:
        for y, index in enumerate(labels):
            for offset, values, color in ((-0.19, stock, _STOCK), (0.19, ours, _OURS)):
                value = values.get(index, 0.0)
                axes.barh(y + offset, value, height=0.34, color=color)
                axes.text(value, y + offset, f" {value:.1%}" if index in values else " not in top 5", va="center", fontsize=8.5)
        most = max([*stock.values(), *ours.values()])
        axes.set_xlim(0, 1.18 * most)
        axes.set_yticks(range(len(labels)), [_escape(_short(label)) for label in labels.values()])
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel("probability (grey: stock, green: ours)")

    return _draw(5.4, 0.7 + 0.46 * len(labels), paint)
