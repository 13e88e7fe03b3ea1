"""Named convolution layers of ResNet-50, YOLOv1 and U-Net; the element-wise ops are measured on these layers' outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One convolution on a (C, H, W) image; its output is (C_out, H_out, W_out). ``residual``: a skip is added to it."""

    name: str
    C: int
    H: int
    W: int
    C_out: int
    kernel: int = 3
    stride: int = 1
    activation: str = "relu"
    residual: bool = False

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def H_out(self) -> int:
        return (self.H + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def W_out(self) -> int:
        return (self.W + 2 * self.padding - self.kernel) // self.stride + 1

    def describe(self, batch: int) -> str:
        """Shape of the output as test ids write it."""
        return f"N{batch}-C{self.C_out}-H{self.H_out}-W{self.W_out}"


def _resnet50() -> list[Layer]:
    """He et al. 2015, torchvision's stride placement (v1.5), 224 x 224: one block of each stage."""
    layers = [Layer("resnet50.stem", 3, 224, 224, 64, kernel=7, stride=2)]
    for stage, (width, size) in enumerate(((64, 56), (128, 28), (256, 14), (512, 7)), start=1):
        out = 4 * width
        layers += [
            Layer(f"resnet50.layer{stage}.conv1", out, size, size, width, kernel=1),
            Layer(f"resnet50.layer{stage}.conv2", width, size, size, width),
            Layer(f"resnet50.layer{stage}.conv3", width, size, size, out, kernel=1, residual=True),
        ]
    return layers


def _yolo() -> list[Layer]:
    """YOLOv1 (Redmon et al. 2016), 448 x 448, with the BatchNorm and leaky ReLU of its darknet configuration."""
    table = [
        ("conv1", 3, 448, 64, 7, 2), ("conv2", 64, 112, 192, 3, 1), ("conv3", 192, 56, 128, 1, 1),
        ("conv4", 128, 56, 256, 3, 1), ("conv6", 256, 56, 512, 3, 1), ("conv7", 512, 28, 256, 1, 1),
        ("conv8", 256, 28, 512, 3, 1), ("conv16", 512, 28, 1024, 3, 1), ("conv17", 1024, 14, 512, 1, 1),
        ("conv18", 512, 14, 1024, 3, 1), ("conv22", 1024, 14, 1024, 3, 2), ("conv24", 1024, 7, 1024, 3, 1),
    ]  # fmt: skip
    return [Layer(f"yolo.{name}", c, size, size, out, k, stride, "leaky_relu") for name, c, size, out, k, stride in table]


def _unet() -> list[Layer]:
    """U-Net (Ronneberger et al. 2015) with same padding, 256 x 256: both convolutions of each level, down and up."""
    layers, channels = [], 3
    for level in range(5):
        width, size = 64 << level, 256 >> level
        layers.append(Layer(f"unet.down{level}.conv1", channels, size, size, width))
        layers.append(Layer(f"unet.down{level}.conv2", width, size, size, width))
        channels = width
    layers += [Layer(f"unet.up{k}.conv1", 128 << k, 256 >> k, 256 >> k, 64 << k) for k in (3, 2, 1, 0)]
    return layers


NETWORKS: dict[str, Callable[[], list[Layer]]] = {"resnet50": _resnet50, "yolo": _yolo, "unet": _unet}


def layers(selection: str) -> list[Layer]:
    """Layers of a comma-separated selection.

    Each item is a network (``resnet50``, ``yolo``, ``unet``), ``all``, a layer name (``resnet50.layer1.conv2``; a prefix up to
    a dot works too) or a size ``CxHxW`` (a 3x3 convolution that keeps it). ValueError for anything else says what is known.
    """
    known = {layer.name: layer for make in NETWORKS.values() for layer in make()}
    chosen: dict[str, Layer] = {}
    for item in filter(None, (part.strip() for part in selection.split(","))):
        size = re.fullmatch(r"(\d+)x(\d+)x(\d+)", item)
        if size and all(part.strip("0") for part in size.groups()):
            channels, height, width = map(int, size.groups())
            found = [Layer(item, channels, height, width, channels)]
        else:
            found = [layer for name, layer in known.items() if item in ("all", name) or name.startswith(item + ".")]
        if not found:
            raise ValueError(f"shapes: expected all, {', '.join(NETWORKS)}, a layer name or CxHxW, got {item!r}")
        chosen.update((layer.name, layer) for layer in found)
    if not chosen:
        raise ValueError("shapes: expected at least one shape, got none")
    return list(chosen.values())


def distinct(found: Iterable[Layer], key: Callable[[Layer], object]) -> list[Layer]:
    """The first layer of each ``key``."""
    seen: dict[object, Layer] = {}
    for layer in found:
        seen.setdefault(key(layer), layer)
    return list(seen.values())
