"""``python -m dl4ds_kernels pose``: a small trained hourglass on synthetic stick figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ._console import out, require, to_json, write_bytes


def pose(
    count: Annotated[int, typer.Option(min=1, max=16, help="figures")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="of the figures; the net was trained on seed 1")] = 2026,
    panels: Annotated[Path, typer.Option(help="where the panels go (PNG)")] = Path("poses.png"),
    json_output: Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")] = False,
) -> None:
    """Find the joints of stick figures with the package's small hourglass: skeletons, heatmaps, PCK."""
    require("PIL", "torchvision", "matplotlib", "safetensors", extra="demo")
    from ..datasets.figures import JOINTS
    from . import _demo_nets, _task_panels

    found = _demo_nets.poses(count, seed)
    heading = f"small hourglass on {count} stick figures: PCK {found['pck']:.3f} (a tenth of the picture)"
    write_bytes(panels, _task_panels.poses(found, heading))
    figures = [
        [{"joint": name, "x": x, "y": y, "score": s} for name, (x, y), s in zip(JOINTS, points, scores, strict=True)]
        for points, scores in zip(found["found"].tolist(), found["scores"].tolist(), strict=True)
    ]
    document = {"schema": 1, "pck": found["pck"], "panels": str(panels), "figures": figures}
    if json_output:
        print(to_json(document), end="")
        return
    out().print(f"{heading}; panels: {escape(str(panels))}", soft_wrap=True)
