"""Pictures of a segmentation and of poses: what went in, what the network says, what is made of it."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ..datasets.figures import LIMBS


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def _plain(ax: Axes, title: str) -> None:
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=11)


def coloured(labels: Tensor) -> np.ndarray:
    """(H, W, 3): background black, each component in a colour of its own."""
    colours = matplotlib.colormaps["tab20"](np.arange(20))[:, :3]
    shuffled = colours[(labels.numpy() * 7) % 20]
    shuffled[labels.numpy() == 0] = 0
    return shuffled


def segmentation(picture: Tensor, probability: Tensor, labels: Tensor, truth: Tensor | None, heading: str) -> bytes:
    """A PNG of (H, W) maps: input, probability of a cell, components, and where it errs if the truth is known."""
    parts = 3 if truth is None else 4
    height, width = picture.shape
    figure = Figure(figsize=(12, 12 / parts * height / width + 1.0), layout="constrained")
    axes = figure.subplots(1, parts)
    axes[0].imshow(picture.numpy(), cmap="gray")
    _plain(axes[0], "picture")
    axes[1].imshow(probability.numpy(), cmap="magma", vmin=0, vmax=1)
    _plain(axes[1], "probability")
    axes[2].imshow(coloured(labels), interpolation="nearest")
    _plain(axes[2], f"{int(labels.max())} components")
    if truth is not None:
        found = labels.numpy() > 0
        want = truth.numpy()
        errors = np.zeros((*want.shape, 3))
        errors[found & want], errors[found & ~want], errors[want & ~found] = (0.85,) * 3, (0.9, 0.3, 0.1), (0.1, 0.5, 1)
        axes[3].imshow(errors, interpolation="nearest")
        _plain(axes[3], "red: too much, blue: missed")
    figure.suptitle(heading, fontsize=12)
    return _png(figure)


def poses(found: dict[str, Any], heading: str) -> bytes:
    """A PNG: figures with what was found (true joints as rings), their heatmaps below."""
    count = len(found["pictures"])
    figure = Figure(figsize=(2.4 * count, 5.6), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    colours = matplotlib.colormaps["tab10"](np.arange(10))
    for i in range(count):
        above, below = axes[:, i]
        above.imshow(found["pictures"][i].permute(1, 2, 0).numpy())
        points, truth = found["found"][i].numpy(), found["joints"][i].numpy()
        for k, (a, b) in enumerate(LIMBS):
            above.plot(points[[a, b], 0], points[[a, b], 1], color=colours[k], linewidth=2.5)
        above.scatter(truth[:, 0], truth[:, 1], s=45, facecolors="none", edgecolors="white", linewidths=1.2)
        below.imshow(found["heat"][i].numpy(), cmap="magma", vmin=0, vmax=1)
        _plain(above, "")
        _plain(below, "")
    axes[0, 0].set_ylabel("found (rings: truth)")
    axes[1, 0].set_ylabel("heatmaps of all joints")
    figure.suptitle(heading, fontsize=12)
    return _png(figure)
