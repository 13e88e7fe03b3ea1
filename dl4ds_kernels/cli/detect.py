"""``python -m dl4ds_kernels detect``: YOLOv1 on a picture, with darknet's files, drawn in four panels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from ._console import fail, out, require, to_json, write_bytes

DEMO_NOTE = "The package's small net, trained on synthetic squares, discs and triangles (recipes.TRAINED)."
RANDOM_NOTE = "Random weights (seed 2015): the pipeline is real, the boxes mean nothing. Give --weights."


def detect(
    image: Annotated[Path | None, typer.Argument(help="a picture; default: the cat that ships with scikit-image")] = None,
    cfg: Annotated[Path | None, typer.Option(help="a darknet .cfg with a [detection] section; default: --model")] = None,
    model: Annotated[str, typer.Option(help="yolov1, yolov1_darknet or yolov1_tiny")] = "yolov1_tiny",
    weights: Annotated[Path | None, typer.Option(help="a darknet .weights file; default: seeded random weights")] = None,
    names: Annotated[Path | None, typer.Option(help="class names, one a line; default: VOC's 20")] = None,
    threshold: Annotated[float, typer.Option(help="scores that are not above it are dropped")] = 0.2,
    iou: Annotated[float, typer.Option(help="overlap above which the weaker box of a class is dropped")] = 0.4,
    bn: Annotated[str, typer.Option(help="whose BatchNorm: cpu, gpu (darknet's two) or opencv")] = "cpu",
    demo: Annotated[bool, typer.Option("--demo", help="the small trained net of this package, on a synthetic picture")] = False,
    panels: Annotated[Path, typer.Option(help="where the four panels go (PNG)")] = Path("detections.png"),
    json_output: Annotated[bool, typer.Option("--json", help="machine-readable output on stdout")] = False,
) -> None:
    """Detect objects with YOLOv1: grid, class map, all boxes by confidence, boxes after class-wise suppression."""
    require("PIL", "torchvision", "matplotlib", extra="demo")
    from .. import detection
    from ..models import darknet_input
    from . import _photo
    from ._panels import panels as draw

    if demo and (cfg or weights or names):
        fail("--demo: expected no --cfg, --weights or --names beside it", 2)
    header = None
    try:
        if demo:
            from ._demo_nets import detector

            picture, net, labels = detector(image)
        else:
            picture = _photo.load_photo(image or _photo.default_photo())
            net = _network(cfg, model, bn)
            header = net.load_weights(weights) if weights is not None else None
            labels = _names(names, net.layout.classes)
    except _photo.PhotoError as error:
        fail(str(error).replace("--image: ", ""), 2)
    except (detection.CfgError, detection.WeightsError) as error:
        fail(str(error), 2)
    x = _photo.TF.convert_image_dtype(_photo.TF.pil_to_tensor(picture), torch.float32)
    size = (picture.height, picture.width)
    with torch.no_grad():
        output = net.eval()(darknet_input(x, net.input_size[1:]))
        (found,) = detection.detect(output, net.layout, size, score_threshold=threshold, iou_threshold=iou)
    write_bytes(panels, draw(picture, output, net.layout, found, labels))
    name = "synthetic shapes" if demo and image is None else (image or _photo.default_photo()).name
    document = {
        "schema": 1,
        "image": {"file": name, "width": picture.width, "height": picture.height},
        "model": "small YOLO" if demo else cfg.name if cfg is not None else model,
        "weights": {
            "file": weights.name if weights else None,
            "note": DEMO_NOTE if demo else "" if weights else RANDOM_NOTE,
            "version": None if header is None else f"{header.major}.{header.minor}.{header.revision}",
            "images_seen": None if header is None else header.seen,
        },
        "panels": str(panels),
        "detections": [
            {"class": labels[label], "score": score, "box": box_}
            for box_, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
        ],
    }
    if json_output:
        print(to_json(document), end="")
    else:
        _print(document)


def _network(cfg: Path | None, model: str, bn: str) -> Any:
    """The network, with seeded random weights; its layout is known."""
    from .. import models
    from ..models.darknet import BN_CONVENTIONS

    if bn not in BN_CONVENTIONS:
        fail(f"--bn: expected one of {', '.join(BN_CONVENTIONS)}, got {bn!r}", 2)
    torch.manual_seed(2015)
    if cfg is None:
        known = models.list_models("yolov1")
        if model not in known:
            fail(f"--model: expected one of {', '.join(known)}, got {model!r}", 2)
        return models.create(model, **({} if model == "yolov1" else {"bn": bn}))
    net = models.DarknetNet.from_file(cfg, bn=bn)
    if net.layout is None:
        fail(f"--cfg: expected a [detection] section at the end of {cfg}, got none", 2)
    return net


def _names(path: Path | None, count: int) -> list[str]:
    from ..detection import VOC_CLASSES

    if path is None:
        return list(VOC_CLASSES) if count == len(VOC_CLASSES) else [f"class {i}" for i in range(count)]
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--names: cannot read {path}: {error}", 2)
    if len(lines) != count:
        fail(f"--names: expected {count} names for this network, got {len(lines)} in {path}", 2)
    return lines


def _print(document: dict[str, Any]) -> None:
    console, image = out(), document["image"]
    console.print(
        f"[bold]{escape(document['model'])}[/] on {escape(image['file'])} ({image['width']} x {image['height']})",
        soft_wrap=True,
    )
    if document["weights"]["note"]:
        console.print(f"[yellow]{escape(document['weights']['note'])}[/]")
    table = Table("class", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("score", justify="right")
    table.add_column("box (x1, y1, x2, y2)")
    for row in document["detections"]:
        table.add_row(escape(row["class"]), f"{row['score']:.3f}", ", ".join(f"{v:.0f}" for v in row["box"]))
    console.print(table if document["detections"] else "nothing above the threshold")
    console.print(f"panels: {escape(document['panels'])}", soft_wrap=True)
