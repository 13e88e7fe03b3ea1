"""The demo's HTML report: one file, nothing loaded from elsewhere, everything escaped."""

from __future__ import annotations

from collections import Counter
from typing import Any

from PIL import Image

from . import _photo, _plots
from ._page import environment


def render(document: dict[str, Any], picture: Image.Image) -> str:
    """The report of a demo ``document`` on ``picture``."""
    speed = document["speed"]
    counts = Counter((row["pattern"], row["status"], row["reason"]) for row in document["report"]["rows"])
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            **document,
            counts=[(*key, count) for key, count in counts.most_common()],
            photo=_photo.data_uri(picture, 520),
            crop=_photo.data_uri(_photo.cropped(picture), _photo.CROP),
            speed_plot=_plots.speed_plot(speed) if speed else None,
            error_plot=_plots.error_plot(document["parity"]),
            top5_plot=_plots.top5_plot(document["top5"]),
            by_name={row["name"]: row for row in speed},
        )
    )
