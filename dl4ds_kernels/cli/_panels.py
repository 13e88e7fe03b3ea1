"""The lecture's four pictures of a YOLO detection: grid, class map, all boxes by confidence, boxes after suppression."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

from ..detection import Detections, YoloLayout, clip_boxes, decode

_MAP_CLASSES = 8


def colour(label: int) -> tuple[float, ...]:
    """The colour of a class: ten strong ones, then ten pale ones."""
    return matplotlib.colormaps["tab20"](2 * (label % 10) + label // 10 % 2)


def panels(image: Image.Image, output: Tensor, layout: YoloLayout, found: Detections, names: Sequence[str]) -> bytes:
    """A PNG. output (1, layout.outputs) of the network; found: what is left after thresholds and suppression."""
    figure = Figure(figsize=(12, 12 * image.height / image.width + 0.8), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    for ax, title in zip(
        axes, ("grid", "class of each cell", "all boxes, line width by confidence", "after suppression"), strict=True
    ):
        ax.imshow(image, extent=(0, image.width, image.height, 0))
        ax.set(xlim=(0, image.width), ylim=(image.height, 0), xticks=[], yticks=[])
        ax.set_title(title, fontsize=11)
    _grid(axes[0], image, layout)
    classes, confidences, _ = layout.split(output)
    _class_map(axes[1], image, layout, classes[0].argmax(1).tolist(), names)
    size = (image.height, image.width)
    boxes = clip_boxes(decode(output, layout, size)[0][0], size).tolist()
    labels = classes[0].argmax(1).repeat_interleave(layout.boxes).tolist()
    for box, confidence, label in zip(boxes, confidences[0].flatten().tolist(), labels, strict=True):
        if confidence > 0:
            _box(axes[2], box, colour(label), 0.2 + 4 * min(confidence, 1.0))
    left = zip(found.scores.tolist(), found.boxes.tolist(), found.labels.tolist(), strict=True)
    for score, box, label in sorted(left):  # the surest on top: boxes of several classes often share a place
        _box(axes[3], box, colour(label), 2.5)
        text = f"{_escape(names[label])} {score:.2f}"
        inside = "top" if box[1] < 0.08 * image.height else "bottom"  # a label above the picture would cover the title
        axes[3].text(box[0], box[1], text, fontsize=9, color="white", va=inside, backgroundcolor=colour(label))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def _grid(ax: Axes, image: Image.Image, layout: YoloLayout) -> None:
    for i in range(1, layout.side):
        ax.axvline(i * image.width / layout.side, color="white", linewidth=1.5)
        ax.axhline(i * image.height / layout.side, color="white", linewidth=1.5)


def _class_map(ax: Axes, image: Image.Image, layout: YoloLayout, labels: list[int], names: Sequence[str]) -> None:
    width, height = image.width / layout.side, image.height / layout.side
    for cell, label in enumerate(labels):
        x, y = cell % layout.side * width, cell // layout.side * height
        ax.add_patch(Rectangle((x, y), width, height, facecolor=colour(label), alpha=0.55, edgecolor="white", linewidth=0.5))
    frequent = sorted(set(labels), key=lambda label: -labels.count(label))[:_MAP_CLASSES]
    handles = [Patch(color=colour(label), label=_escape(names[label])) for label in frequent]
    ax.legend(handles=handles, fontsize=8, loc="lower right", framealpha=0.8)


def _box(ax: Axes, box: list[float], edge: tuple[float, ...], width: float) -> None:
    x1, y1, x2, y2 = box
    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=edge, linewidth=width))


def _escape(text: str) -> str:
    return text.replace("$", r"\$")  # matplotlib would read mathematics between two dollar signs
