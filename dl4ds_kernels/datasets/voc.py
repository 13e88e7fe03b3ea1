"""Object detection in Pascal VOC's format: a reader for the user's files, and synthetic shapes written in the same format."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = ("square", "disc", "triangle")


class Annotation(NamedTuple):
    """Of one picture: name (without suffix), size (H, W), boxes (M, 4) as (x1, y1, x2, y2) in pixels from 0, labels (M,)."""

    name: str
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor


def read_annotation(path: str | Path, classes: tuple[str, ...], *, difficult: bool = False) -> Annotation:
    """One XML file of ``Annotations/``; VOC counts pixels from 1 and includes the last, here boxes run from 0 to the far edge.

    Args: classes: names by label; difficult: whether objects marked difficult are kept.
    Raises: ValueError for a class that is not in ``classes`` and for a file that is no annotation.
    """
    path = Path(path)
    text = path.read_bytes()
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:  # entities could expand without end; VOC has none
        raise ValueError(f"voc: {path}: expected an annotation without a DTD")
    try:
        root = ET.fromstring(text)
        size = tuple(int(root.findtext(f"size/{k}", "")) for k in ("height", "width"))
        boxes, labels = [], []
        for item in root.iter("object"):
            name = item.findtext("name", "").strip()
            if name not in classes:
                raise ValueError(f"class {name!r}, expected one of {', '.join(classes)}")
            if item.findtext("difficult", "0").strip() == "1" and not difficult:
                continue
            x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax"))
            boxes.append([x1 - 1, y1 - 1, x2, y2])
            labels.append(classes.index(name))
    except (ET.ParseError, ValueError) as error:
        raise ValueError(f"voc: {path}: {error}") from error
    return Annotation(path.stem, size, torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels, dtype=torch.int64))


def write_annotation(path: str | Path, annotation: Annotation, classes: tuple[str, ...]) -> None:
    """The inverse of :func:`read_annotation`."""
    root = ET.Element("annotation")
    ET.SubElement(root, "filename").text = f"{annotation.name}.png"
    size = ET.SubElement(root, "size")
    for key, value in zip(("height", "width", "depth"), (*annotation.size, 3), strict=True):
        ET.SubElement(size, key).text = str(value)
    for (x1, y1, x2, y2), label in zip(annotation.boxes.tolist(), annotation.labels.tolist(), strict=True):
        item = ET.SubElement(root, "object")
        ET.SubElement(item, "name").text = classes[label]
        ET.SubElement(item, "difficult").text = "0"
        box = ET.SubElement(item, "bndbox")
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2), strict=True):
            ET.SubElement(box, key).text = f"{value:g}"
    ET.ElementTree(root).write(path, encoding="unicode")


def read_voc(folder: str | Path, split: str, classes: tuple[str, ...]) -> list[tuple[Path, Annotation]]:
    """(picture, annotation) of every name in ``ImageSets/Main/SPLIT.txt`` of a VOC folder.

    Raises: FileNotFoundError with the file that is missing.
    """
    folder = Path(folder)
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        raise FileNotFoundError(f"voc: expected {listing}")
    found = []
    for line in listing.read_text(encoding="utf-8").split():
        pictures = [p for s in ("jpg", "png") if (p := folder / "JPEGImages" / f"{line}.{s}").is_file()]
        if not pictures:
            raise FileNotFoundError(f"voc: expected {folder / 'JPEGImages' / line}.jpg or .png")
        found.append((pictures[0], read_annotation(folder / "Annotations" / f"{line}.xml", classes)))
    return found


def shapes(count: int, *, size: int = 112, seed: int = 0) -> tuple[Tensor, list[Annotation]]:
    """Pictures of one to three coloured shapes on a noisy background, with exact boxes.

    Returns: x (count, 3, size, size) float32 in [0, 1]; an :class:`Annotation` each, classes :data:`SHAPES`.
    """
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    pictures = torch.rand(count, 3, 1, 1, generator=generator) * 0.5 + 0.15 * torch.rand(
        count, 3, size, size, generator=generator
    )
    annotations = []
    for i in range(count):
        boxes, labels = [], []
        for _ in range(1 + int(3 * torch.rand((), generator=generator))):
            side, cx, cy = torch.rand(3, generator=generator).tolist()
            label = int(3 * torch.rand((), generator=generator))
            half = size * (0.09 + 0.1 * side)
            cx, cy = half + (size - 2 * half) * cx, half + (size - 2 * half) * cy
            dx, dy = (x - cx) / half, (y - cy) / half
            inside = (dx.abs() <= 1) & (dy.abs() <= 1)
            if SHAPES[label] == "disc":
                inside = dx * dx + dy * dy <= 1
            elif SHAPES[label] == "triangle":
                inside &= dx.abs() <= (dy + 1) / 2
            colour = 0.35 + 0.65 * torch.rand(3, 1, generator=generator)
            pictures[i][:, inside] = colour
            boxes.append([cx - half, cy - half, cx + half, cy + half])
            labels.append(label)
        annotations.append(Annotation(f"shape{i:05d}", (size, size), torch.tensor(boxes), torch.tensor(labels)))
    return pictures.clamp(0, 1), annotations
