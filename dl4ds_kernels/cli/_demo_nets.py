"""The package's small trained nets and the synthetic pictures that ``detect --demo``, ``segment`` and ``pose`` draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .. import recipes
from ..datasets.voc import SHAPES
from . import _photo

SEED = 2026  # of pictures that no training has seen: the recipes draw theirs from seeds 1 and 2
_SHOWN = 448  # pixels, enlarged without smoothing


def net_of(name: str) -> nn.Module:
    """:func:`dl4ds_kernels.recipes.trained` in the layout in which it runs fastest."""
    return recipes.trained(name).to(memory_format=torch.channels_last)


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1], enlarged."""
    array = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array).resize((_SHOWN, _SHOWN), Image.Resampling.NEAREST)


class _Detector(nn.Module):
    """The small YOLO with the attributes that ``detect`` asks a darknet net for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.layout, self.input_size = net, net.layout, net.layers.input_size

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def detector(image: Path | None) -> tuple[Image.Image, nn.Module, list[str]]:
    """(the picture, the small YOLO, its classes); without ``image`` the synthetic picture with most classes apart."""
    from ..recipes import yolo

    if image is None:
        pictures, truth = yolo.held_out(SEED, 40)
        best = max(range(len(truth)), key=lambda i: len(truth[i].labels.unique()) if _apart(truth[i].boxes) else 0)
        picture = to_image(pictures[best])
    else:
        picture = _photo.load_photo(image)
    return picture, _Detector(net_of("yolo")).eval(), list(SHAPES)


def _apart(boxes: Tensor) -> bool:
    """Whether no two of (M, 4) boxes overlap."""
    low, high = boxes[:, None, :2].maximum(boxes[None, :, :2]), boxes[:, None, 2:].minimum(boxes[None, :, 2:])
    return int(((high - low) > 0).all(2).sum()) == len(boxes)  # each overlaps itself


def cells_mosaic(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(gray picture, probability, truth), each (H, W): synthetic pictures, each alone through the net, lines between them."""
    from ..recipes import unet

    pictures, masks = unet.held_out(SEED, rows * columns)
    with torch.no_grad():
        found = net_of("unet")(pictures).softmax(1)[:, 1]

    def joined(tiles: Tensor, line: float) -> Tensor:
        tiles = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=line)
        side = tiles.shape[-1]
        return tiles.view(rows, columns, side, side).permute(0, 2, 1, 3).reshape(rows * side, columns * side)

    return joined(pictures[:, 0].clamp(0, 1), 1.0), joined(found, 0.0), joined((masks > 0).float(), 0.0) > 0


def gray(picture: Image.Image) -> Tensor:
    """(H, W) of a photograph, its darkest and lightest percent at 0.2 and 0.8, as bright as the cells of the training."""
    x = _photo.TF.convert_image_dtype(_photo.TF.pil_to_tensor(picture.convert("L")), torch.float32)[0]
    ordered = x.flatten().sort().values
    low, high = (float(ordered[int(share * (len(ordered) - 1))]) for share in (0.01, 0.99))
    return 0.2 + 0.6 * ((x - low) / max(high - low, 1e-6)).clamp(0, 1)


def probability(net: nn.Module, x: Tensor) -> Tensor:
    """Of a cell at each pixel of (H, W)."""
    with torch.no_grad():
        return net(x[None, None]).softmax(1)[0, 1]


def poses(count: int, seed: int) -> dict[str, Any]:
    """Pictures, true joints and found joints in pixels of the picture, their heatmaps (largest over joints), and PCK."""
    from ..pose import decode_heatmaps
    from ..recipes import hourglass

    pictures, joints = hourglass.held_out(seed, count)
    net = net_of("hourglass")
    with torch.no_grad():
        maps = net(pictures)[-1]
        pck = hourglass.score(net, pictures, joints)["pck"]
    found, scores = decode_heatmaps(maps)
    return {
        "pictures": pictures, "joints": joints, "found": (found + 0.5) * 4 - 0.5, "scores": scores,
        "heat": maps.amax(1), "pck": pck,
    }  # fmt: skip
