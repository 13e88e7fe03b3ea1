"""A real detector on a real photograph: MTCNN's trained cascade with our NMS and with torchvision's must find the same faces.

    python bench/mtcnn.py [--image photo.png] [--json bench/results/mtcnn.json] [--png bench/results/mtcnn.png]

The weights are those inside the facenet-pytorch wheel (``pip install --no-deps facenet-pytorch``), read with weights_only;
its code is not imported. Without --image the photograph is scikit-image's astronaut. The cascade (Zhang et al., Joint Face
Detection and Alignment, 2016): P-Net proposes windows on an image pyramid, R-Net and O-Net refine them, with NMS after every
stage.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dl4ds_kernels import functional as F

BatchedNms = Callable[[Tensor, Tensor, Tensor, float], Tensor]
MIN_FACE, SHRINK, SCORES = 20, 0.709, (0.6, 0.7, 0.7)
CELL, STRIDE = 12, 2  # window and step of P-Net


class _Net(nn.Module):
    """Convolutions with PReLU, pooling after some, then dense layers, and heads by name."""

    def __init__(
        self, convs: list[tuple[int, int, int]], pools: list[int], dense: list[tuple[int, int]], heads: dict[str, int]
    ):
        super().__init__()
        self.pools = pools  # size of the max-pooling after each convolution, 0: none
        for i, (c_in, c_out, size) in enumerate(convs, 1):
            self.add_module(f"conv{i}", nn.Conv2d(c_in, c_out, size))
            self.add_module(f"prelu{i}", nn.PReLU(c_out))
        at = len(convs) + 1
        for c_in, c_out in dense:
            self.add_module(f"dense{at}", nn.Linear(c_in, c_out))
            self.add_module(f"prelu{at}", nn.PReLU(c_out))
            at += 1
        self.has_dense, self.heads = bool(dense), [f"{'dense' if dense else 'conv'}{at}_{i}" for i in range(1, len(heads) + 1)]
        width = dense[-1][1] if dense else convs[-1][1]
        for name, outputs in zip(self.heads, heads.values(), strict=True):
            self.add_module(name, nn.Linear(width, outputs) if dense else nn.Conv2d(width, outputs, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(face probability, corrections of the box)."""
        for i, pool in enumerate(self.pools, 1):
            x = getattr(self, f"prelu{i}")(getattr(self, f"conv{i}")(x))
            x = nn.functional.max_pool2d(x, pool, 2, ceil_mode=True) if pool else x
        if self.has_dense:
            at = len(self.pools) + 1
            x = x.permute(0, 3, 2, 1).flatten(1)  # the weights come from Caffe's order of a transposed image
            x = getattr(self, f"prelu{at}")(getattr(self, f"dense{at}")(x))
        return getattr(self, self.heads[0])(x).softmax(1)[:, 1], getattr(self, self.heads[1])(x)


def networks() -> tuple[_Net, _Net, _Net]:
    """P-Net, R-Net and O-Net with the weights of the installed wheel; ImportError where it is not installed."""
    spec = importlib.util.find_spec("facenet_pytorch")
    if spec is None or not spec.origin:
        raise ImportError("the weights are in the facenet-pytorch wheel: pip install --no-deps facenet-pytorch")
    heads = {"face": 2, "box": 4}
    nets = (
        _Net([(3, 10, 3), (10, 16, 3), (16, 32, 3)], [2, 0, 0], [], heads),
        _Net([(3, 28, 3), (28, 48, 3), (48, 64, 2)], [3, 3, 0], [(576, 128)], heads),
        _Net([(3, 32, 3), (32, 64, 3), (64, 64, 3), (64, 128, 2)], [3, 3, 2, 0], [(1152, 256)], heads),
    )
    for net, name in zip(nets, "pro", strict=True):
        state = torch.load(Path(spec.origin).parent / f"data/{name}net.pt", weights_only=True)
        missing, unexpected = net.load_state_dict(state, strict=False)
        assert not missing and all(key.startswith("dense6_3") for key in unexpected), (missing, unexpected)  # facial landmarks
        net.eval()
    return nets


def _normalise(x: Tensor) -> Tensor:
    return (x - 127.5) / 128


def _square(boxes: Tensor) -> Tensor:
    """Boxes grown to squares of their longer side about their centres."""
    sides = boxes[:, 2:] - boxes[:, :2]
    corner = boxes[:, :2] + sides / 2 - sides.amax(1, keepdim=True) / 2
    return torch.cat([corner, corner + sides.amax(1, keepdim=True)], 1)


def _correct(boxes: Tensor, corrections: Tensor, extra: int) -> Tensor:
    sides = (boxes[:, 2:] - boxes[:, :2] + extra).repeat(1, 2)
    return boxes + corrections * sides


def _crops(image: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(crops of the boxes at ``size``, which boxes meet the image)."""
    height, width = image.shape[-2:]
    x1, y1, x2, y2 = boxes.trunc().int().unbind(1)
    x1, y1, x2, y2 = x1.clamp(min=1) - 1, y1.clamp(min=1) - 1, x2.clamp(max=width), y2.clamp(max=height)
    inside = (x2 > x1) & (y2 > y1)
    rows = torch.stack([x1, y1, x2, y2], 1)[inside].tolist()
    crops = [nn.functional.interpolate(image[..., b:d, a:c], (size, size), mode="area") for a, b, c, d in rows]
    return torch.cat(crops) if crops else image.new_empty(0, 3, size, size), inside


def _proposals(image: Tensor, net: _Net) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(boxes, scores, corrections, pyramid level) of all windows that P-Net takes for faces."""
    height, width = image.shape[-2:]
    found, scale, level = [], CELL / MIN_FACE, 0
    while min(height, width) * scale >= CELL:
        small = nn.functional.interpolate(image, (int(height * scale + 1), int(width * scale + 1)), mode="area")
        probability, corrections = net(_normalise(small))
        _, y, x = torch.where(probability >= SCORES[0])
        corner = torch.stack([x, y], 1).float() * STRIDE
        boxes = torch.cat([((corner + 1) / scale).floor(), ((corner + CELL) / scale).floor()], 1)
        found.append((boxes, probability[0, y, x], corrections[0, :, y, x].t(), torch.full_like(y, level)))
        scale, level = scale * SHRINK, level + 1
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


@torch.no_grad()
def detect(image: np.ndarray, nets: tuple[_Net, _Net, _Net], batched_nms: BatchedNms) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Faces in an (H, W, 3) uint8 image: (K, 4) boxes, (K,) scores, and how many boxes went into each NMS and were kept."""
    pixels = torch.tensor(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    counts: dict[str, int] = {}

    def suppress(name: str, threshold: float, boxes: Tensor, scores: Tensor, groups: Tensor | None = None) -> Tensor:
        groups = torch.zeros(len(boxes), dtype=torch.int64) if groups is None else groups
        keep = batched_nms(boxes, scores, groups, threshold)
        counts[f"{name}: boxes"], counts[f"{name}: kept"] = len(boxes), len(keep)
        return keep

    boxes, scores, corrections, levels = _proposals(pixels, nets[0])
    keep = suppress("P-Net, within a level", 0.5, boxes, scores, levels)
    boxes, scores, corrections = boxes[keep], scores[keep], corrections[keep]
    keep = suppress("P-Net, over all levels", 0.7, boxes, scores)
    boxes = _square(_correct(boxes[keep], corrections[keep], 0))
    for net, size, least, name in ((nets[1], 24, SCORES[1], "R-Net"), (nets[2], 48, SCORES[2], "O-Net")):
        crops, inside = _crops(pixels, boxes, size)
        scores, corrections = net(_normalise(crops))
        sure = scores > least
        boxes, scores, corrections = boxes[inside][sure], scores[sure], corrections[sure]
        if name == "O-Net":
            boxes = _correct(boxes, corrections, 1)
        keep = suppress(name, 0.7, boxes, scores)
        boxes, scores = boxes[keep], scores[keep]
        if name == "R-Net":
            boxes = _square(_correct(boxes, corrections[keep], 1))
    return boxes, scores, counts


def photograph(path: Path | None) -> np.ndarray:
    """(H, W, 3) uint8: the file, or scikit-image's astronaut."""
    if path is None:
        from skimage import data

        return data.astronaut()
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def draw(image: np.ndarray, results: dict[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """The image with the boxes of both: torchvision's thick, ours thin inside it."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    for name, color, width in (("torchvision", (255, 210, 0), 5), ("ours", (220, 0, 60), 2)):
        for box, score in zip(*results[name], strict=True):
            pen.rectangle([round(v) for v in box.tolist()], outline=color, width=width)
            at = (float(box[0]), float(box[1]) - (16 if name == "ours" else 30))
            pen.text(at, f"{name} {float(score):.3f}", fill=color, stroke_width=2, stroke_fill="black")
    picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(path, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    import torchvision

    try:
        nets = networks()
    except ImportError as error:
        print(error, file=sys.stderr)
        return 2
    image, results, report = photograph(options.image), {}, {}
    for name, function in (("torchvision", torchvision.ops.batched_nms), ("ours", F.batched_nms)):
        start = time.perf_counter()
        boxes, scores, counts = detect(image, nets, function)
        results[name] = boxes, scores
        report[name] = {"seconds": round(time.perf_counter() - start, 3), "boxes": boxes.tolist(), "scores": scores.tolist()}
    same = all(torch.equal(a, b) for a, b in zip(*results.values(), strict=True))
    document: dict[str, Any] = {"same": same, "nms": counts, **report}
    print(f"{len(results['ours'][0])} faces with ours, {len(results['torchvision'][0])} with torchvision, the same: {same}")
    for stage, count in counts.items():
        print(f"  {stage} {count}")
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.png:
        draw(image, results, options.png)
    return int(not same or not len(results["ours"][0]))


if __name__ == "__main__":
    sys.exit(main())
