"""Readers of users' files and synthetic data with exact truth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dl4ds_kernels.datasets import Annotation, cells, cifar, figures, read_annotation, read_voc, shapes, write_annotation
from dl4ds_kernels.datasets.cifar import MEAN, STD
from dl4ds_kernels.datasets.voc import SHAPES


def write_cifar(folder: Path, classes: int, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3072), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count, dtype=torch.uint8)
    head = labels.unsqueeze(1) if classes == 10 else torch.stack((labels + 50, labels), 1)
    data = torch.cat((head, pixels), 1).numpy().tobytes()
    for name in (
        ("test_batch.bin", *(f"data_batch_{i}.bin" for i in range(1, 6))) if classes == 10 else ("train.bin", "test.bin")
    ):
        (folder / name).write_bytes(data)
    return pixels, labels


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(classes: int, tmp_path: Path) -> None:
    pixels, labels = write_cifar(tmp_path, classes)
    x, y = cifar(tmp_path, train=False, classes=classes)
    assert y.tolist() == labels.tolist() and x.shape == (3, 3, 32, 32)
    back = x * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)
    torch.testing.assert_close((back * 255).round().to(torch.uint8).view(3, -1), pixels)
    assert len(cifar(tmp_path, classes=classes)[1]) == (15 if classes == 10 else 3)


def test_cifar_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected .*data_batch_1.bin \(the \*binary\* version of CIFAR-10\)"):
        cifar(tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="expected rows of 3073 bytes, got 100 bytes"):
        cifar(tmp_path, train=False)
    (tmp_path / "test_batch.bin").write_bytes(b"\xff" * 3073)
    with pytest.raises(ValueError, match="expected labels below 10, got 255"):
        cifar(tmp_path, train=False)
    with pytest.raises(ValueError, match="classes: expected 10 or 100, got 7"):
        cifar(tmp_path, classes=7)


def test_voc_round_trip(tmp_path: Path) -> None:
    pictures, annotations = shapes(4, seed=3)
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for one in annotations:
        write_annotation(tmp_path / "Annotations" / f"{one.name}.xml", one, SHAPES)
        (tmp_path / "JPEGImages" / f"{one.name}.png").write_bytes(b"")
    (tmp_path / "ImageSets/Main/trainval.txt").write_text("\n".join(a.name for a in annotations))
    found = read_voc(tmp_path, "trainval", SHAPES)
    for (path, got), want in zip(found, annotations, strict=True):
        assert path.name == f"{want.name}.png" and got.size == (112, 112) and torch.equal(got.labels, want.labels)
        torch.testing.assert_close(got.boxes, want.boxes, atol=1e-3, rtol=1e-4)
    with pytest.raises(FileNotFoundError, match="expected .*test.txt"):
        read_voc(tmp_path, "test", SHAPES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><size><height>4</height>", "voc: .*a.xml: "),
        ("<annotation></annotation>", "voc: .*a.xml: invalid literal"),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><annotation/>", "expected an annotation without a DTD"),
        (
            "<annotation><size><height>4</height><width>4</width></size><object><name>cat</name></object></annotation>",
            "class 'cat', expected one of square, disc, triangle",
        ),
    ],
)
def test_voc_errors(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_annotation(tmp_path / "a.xml", SHAPES)


def test_voc_counts_from_one(tmp_path: Path) -> None:
    """A box of the picture's whole width is 1 … width in VOC and 0 … width here."""
    one = Annotation("a", (10, 20), torch.tensor([[0.0, 0.0, 20.0, 10.0]]), torch.tensor([1]))
    write_annotation(tmp_path / "a.xml", one, SHAPES)
    text = (tmp_path / "a.xml").read_text()
    assert "<xmin>1</xmin>" in text and "<xmax>20</xmax>" in text
    assert read_annotation(tmp_path / "a.xml", SHAPES).boxes.tolist() == [[0, 0, 20, 10]]


def test_boxes_of_shapes_are_exact() -> None:
    """A single square differs from its background inside its box and nowhere else."""
    pictures, annotations = shapes(60, seed=1)
    seen = 0
    for picture, one in zip(pictures, annotations, strict=True):
        if one.labels.tolist() != [0]:
            continue
        x1, y1, x2, y2 = one.boxes[0].round().int().tolist()
        inside = picture[:, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1]
        assert float(inside.flatten(1).std(1).max()) < 1e-6
        assert float(picture[:, : max(y1 - 1, 1)].flatten(1).std(1).max()) > 1e-3
        seen += 1
    assert seen >= 3


def test_cells_and_figures() -> None:
    x, masks = cells(6, seed=2)
    assert x.shape == (6, 1, 64, 64) and masks.dtype == torch.int64
    for picture, mask in zip(x[:, 0], masks, strict=True):
        assert 3 <= len(mask.unique()) - 1 <= 8 or (mask > 0).any()
        assert float(picture[mask > 0].mean()) > float(picture[mask == 0].mean()) + 0.1
    pictures, joints = figures(5, seed=2)
    assert joints.shape == (5, 8, 2) and float(joints.min()) >= 2 and float(joints.max()) <= 61
    assert torch.equal(pictures, figures(5, seed=2)[0]) and torch.equal(x, cells(6, seed=2)[0])
