"""``python -m dl4ds_kernels segment``: a small trained U-Net on synthetic cells or on a picture, drawn in panels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ._console import fail, out, require, to_json, write_bytes


def segment(
    image: Annotated[Path | None, typer.Argument(help="a picture with bright round things; default: synthetic cells")] = None,
    width: Annotated[int, typer.Option(min=16, help="pixels to which IMAGE is scaled: cells should be 10 to 20 wide")] = 256,
    smallest: Annotated[int, typer.Option(min=1, help="components of fewer pixels are dropped")] = 12,
    panels: Annotated[Path, typer.Option(help="where the panels go (PNG)")] = Path("segmentation.png"),
    json_output: Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")] = False,
) -> None:
    """Segment cells with the package's small U-Net (trained on synthetic cells): probability, components, errors."""
    require("PIL", "torchvision", "matplotlib", "safetensors", extra="demo")
    from ..segmentation import connected_components
    from . import _demo_nets, _photo, _task_panels

    truth = None
    if image is None:
        x, found, truth = _demo_nets.cells_mosaic(2, 3)
    else:
        try:
            picture = _photo.load_photo(image)
        except _photo.PhotoError as error:
            fail(str(error).replace("--image: ", ""), 2)
        height = max(16, round(width * picture.height / picture.width))
        x = _demo_nets.gray(picture.resize((width, height), _photo.Image.Resampling.BILINEAR))
        found = _demo_nets.probability(_demo_nets.net_of("unet"), x)
    labels, count = connected_components(found > 0.5, min_size=smallest)
    iou = None
    if truth is not None:
        iou = float(((labels > 0) & truth).sum() / ((labels > 0) | truth).sum())
    name = "synthetic cells" if image is None else image.name
    heading = f"small U-Net on {name}" + ("" if iou is None else f": IoU {iou:.3f}")
    write_bytes(panels, _task_panels.segmentation(x, found, labels, truth, heading.replace("$", r"\$")))
    document = {
        "schema": 1, "image": {"file": name, "width": x.shape[1], "height": x.shape[0]}, "components": count, "iou": iou,
        "foreground": float((labels > 0).float().mean()), "panels": str(panels),
    }  # fmt: skip
    if json_output:
        print(to_json(document), end="")
        return
    out().print(f"{escape(heading)}; {count} components; panels: {escape(str(panels))}", soft_wrap=True)
