"""The roofline of both GPUs as a picture: a white card, so that it reads on a light and on a dark page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .model import CHIPS

# Operations for each element of x, of the kernels that move whole tensors (a multiply-add is two).
OPERATIONS = {
    "bn_act_stats": 4, "bn_act_fwd": 3, "bn_act_bwd_reduce": 7, "bn_act_bwd": 9, "add_act_fwd": 3, "add_act_bwd": 2,
    "bn_act_pair_fwd": 6, "bn_act_pair_reduce": 8, "bn_act_pair_bwd": 9,
}  # fmt: skip
COLOURS = {"bn_act": "#0a7a70", "add_act": "#b3541e", "conv": "#3b4cc0"}


def _points(document: dict[str, Any], chip: str) -> list[tuple[str, float, float]]:
    """(family, operations a byte, TFLOP/s predicted) in fp16, channels last."""
    found = []
    for r in document["kernels"]:
        if (r["chip"], r["dtype"], r["layout"]) != (chip, "float16", "nhwc"):
            continue
        stem = max((s for s in OPERATIONS if r["kernel"].startswith(s)), key=len)
        bandwidth = next(c.bytes_per_us for c in CHIPS if c.name == chip)
        intensity = OPERATIONS[stem] / (r["bytes_per_element"])
        reached = r["floor_us"] * bandwidth * intensity / r["predicted_us"] / 1e6
        found.append(("add_act" if stem.startswith("add") else "bn_act", intensity, reached))
    found += [("conv", r["intensity"], r["tflops"]) for r in document["convolutions"] if r["chip"] == chip]
    return found


def draw(document: dict[str, Any], path: Path) -> None:
    """One panel a GPU, one above the other: side by side their letters would be too small on a phone."""
    figure, panels = plt.subplots(len(CHIPS), 1, figsize=(5.4, 7.6), sharex=True, facecolor="white")
    for chip, axes in zip(CHIPS, panels, strict=True):
        x = np.logspace(-0.7, 3.6, 200)
        roof = np.minimum(chip.bandwidth_tbs * x, chip.tflops)
        axes.loglog(x, roof, color="black", linewidth=1.6)
        axes.loglog(x, np.minimum(chip.bandwidth_tbs * x, chip.tflops * chip.share), color="black", linewidth=1, linestyle=":")
        for family, colour in COLOURS.items():
            points = [(a, b) for name, a, b in _points(document, chip.name) if name == family]
            if points:
                marker = {"bn_act": "o", "add_act": "D", "conv": "^"}[family]
                label = {"bn_act": "BatchNorm family", "add_act": "add_act", "conv": "fused convolution"}[family]
                axes.scatter(
                    *zip(*points, strict=True),
                    s=34,
                    color=colour,
                    edgecolor="white",
                    linewidth=0.6,
                    marker=marker,
                    label=label,
                    zorder=3,
                )
        axes.set_title(f"{chip.name}: {chip.bandwidth_tbs} TB/s, {chip.tflops:.0f} TFLOP/s", fontsize=11)
        axes.set_ylabel("TFLOP/s, predicted")
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    panels[-1].set_xlabel("operations per byte of the least traffic\n(fp16, ResNet-50, 256 images)")
    panels[0].legend(loc="lower right", fontsize=10, framealpha=1)
    panels[-1].annotate("dotted: mma.sync (estimate)", (0.98, 0.04), xycoords="axes fraction", ha="right", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
    plt.close(figure)
