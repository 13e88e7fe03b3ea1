"""Colours and defaults of the experiments' figures: one colour a meaning, in every picture."""

from __future__ import annotations

INK, FAINT = "#1e293b", "#e2e8f0"
# Without residual connections (or: stock); with them (or: ours); a third variant; theory and limits.
PLAIN, RESIDUAL, THIRD, THEORY = "#b91c1c", "#0f766e", "#b45309", "#64748b"

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.edgecolor": "#94a3b8",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
