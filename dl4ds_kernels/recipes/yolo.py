"""A small YOLOv1 (darknet layers, 112 x 112 input, 7 x 7 cells, two boxes) on shapes, or on the user's VOC folder.

Where the paper's nets end in a connected layer, this one has a 1x1 convolution: a thousand pictures are too few to learn every
cell apart. Output, loss and decoding are YOLOv1's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..datasets import Annotation, read_voc, shapes
from ..datasets.voc import SHAPES
from ..detection import VOC_CLASSES, YoloLayout, detect, encode_targets, yolo_loss
from ..models import DarknetNet, darknet_input
from ._train import Recipe, cosine

SIZE = 112
_FILTERS, _FEWER = (16, 32, 64, 128), (16, 32, 64, 64)


def small_cfg(classes: int, filters: tuple[int, ...] = _FILTERS) -> str:
    """The description of the net's layers: 3x3 convolutions with pooling, one more, and the 1x1 convolution."""
    conv = "\n[convolutional]\nbatch_normalize=1\nfilters={}\nsize=3\nstride=1\npad=1\nactivation=leaky\n"
    text = f"[net]\nheight={SIZE}\nwidth={SIZE}\nchannels=3\n"
    for number in filters:
        text += conv.format(number) + "\n[maxpool]\nsize=2\nstride=2\n"
    return text + conv.format(filters[-1]) + f"\n[convolutional]\nfilters={10 + classes}\nsize=1\nstride=1\nactivation=linear\n"


class SmallYolo(nn.Module):
    """x (N, 3, 112, 112) in [0, 1] -> (N, layout.outputs): :func:`small_cfg`'s maps in YOLOv1's order."""

    def __init__(self, classes: int, filters: tuple[int, ...] = _FILTERS) -> None:
        super().__init__()
        self.layout = YoloLayout(7, 2, classes)
        self.layers = DarknetNet.from_text(small_cfg(classes, filters), bn="opencv")

    def forward(self, x: Tensor) -> Tensor:
        cells = self.layers(x).flatten(2).transpose(1, 2)  # (N, 49, C + 2 * 5)
        k = self.layout.classes
        return self.layout.join(cells[..., :k], cells[..., k : k + 2], cells[..., k + 2 :])


def average_precision(found: list[tuple[float, bool]], objects: int) -> float:
    """Area under precision over recall of one class: (score, right) of every detection, and the number of true objects."""
    right = torch.tensor([hit for _, hit in sorted(found, key=lambda pair: -pair[0])], dtype=torch.float64)
    if not objects or not len(right):
        return 0.0
    hits = right.cumsum(0)
    precision = hits / torch.arange(1, len(right) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)  # precision never falls with less recall
    return float((best * right).sum() / objects)


def mean_average_precision(outputs: Tensor, truth: list[Annotation], net: SmallYolo, iou: float = 0.5) -> float:
    """mAP: a detection is right if it overlaps an object of its class that no better detection has taken."""
    classes = net.layout.classes
    found: list[list[tuple[float, bool]]] = [[] for _ in range(classes)]
    for output, one in zip(outputs, truth, strict=True):
        (result,) = detect(output.unsqueeze(0), net.layout, one.size, score_threshold=0.005, iou_threshold=0.5)
        free = torch.ones(len(one.labels), dtype=torch.bool)
        for box, score, label in zip(result.boxes, result.scores.tolist(), result.labels.tolist(), strict=True):
            overlap = _iou(box, one.boxes) * (one.labels == label) * free
            hit = bool(len(overlap)) and float(overlap.max()) >= iou
            if hit:
                free[overlap.argmax()] = False
            found[label].append((score, hit))
    counts = [sum(int((a.labels == k).sum()) for a in truth) for k in range(classes)]
    present = [k for k in range(classes) if counts[k]]
    return sum(average_precision(found[k], counts[k]) for k in present) / max(len(present), 1)


def _iou(box: Tensor, boxes: Tensor) -> Tensor:
    low, high = torch.maximum(box[:2], boxes[:, :2]), torch.minimum(box[2:], boxes[:, 2:])
    inter = (high - low).clamp(min=0).prod(1)
    return inter / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(1) - inter)


def _voc(folder: str, split: str) -> tuple[Tensor, list[Annotation]]:
    import numpy as np
    from PIL import Image

    pictures, annotations = [], []
    for path, annotation in read_voc(folder, split, VOC_CLASSES):
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255
        pictures.append(darknet_input(image, (SIZE, SIZE)))
        annotations.append(annotation)
    return torch.cat(pictures), annotations


def small() -> SmallYolo:
    """The net whose trained weights come with the package."""
    return SmallYolo(len(SHAPES), _FEWER)


def score(model: SmallYolo, pictures: Tensor, truth: list[Annotation]) -> dict[str, float]:
    """mAP at IoU 0.5 of a model in eval."""
    return {"map50": mean_average_precision(torch.cat([model(part) for part in pictures.split(50)]), truth, model)}


def held_out(seed: int, count: int = 100) -> tuple[Tensor, list[Annotation]]:
    """Pictures and truth for :func:`score`."""
    return shapes(count, size=SIZE, seed=seed)


def recipe(*, seed: int = 0, data: str | None = None, quick: bool = False, small_net: bool = False, epochs: int = 12) -> Recipe:
    """The metric is mAP at IoU 0.5 on new pictures; 0.8 is reached in a few minutes on a CPU."""
    if small_net and data is not None:
        raise ValueError(f"yolo: data: expected none for the small net (it knows three shapes), got {data!r}")
    if data is not None:
        (x, annotations), (fresh, truth), classes = _voc(data, "trainval"), _voc(data, "test"), len(VOC_CLASSES)
    else:
        x, annotations = shapes(48 if quick else 2000 if small_net else 1000, size=SIZE, seed=seed + 1)
        fresh, truth = held_out(seed + 2, 16 if quick else 100)
        classes = len(SHAPES)
    torch.manual_seed(seed)
    model = (small() if small_net else SmallYolo(classes)).to(memory_format=torch.channels_last)
    targets = torch.stack([encode_targets(a.boxes, a.labels, model.layout, a.size) for a in annotations])

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return yolo_loss(model(batch[0]), batch[1], model.layout).total / len(batch[0])

    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-4)
    return Recipe(
        "yolo", model, TensorDataset(x, targets), 16, epochs, optimizer, loss, lambda net: score(net, fresh, truth), "map50",
        0.8, seed, cosine,
    )  # fmt: skip
