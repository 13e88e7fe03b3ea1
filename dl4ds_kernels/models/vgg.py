"""VGG-11/13/16/19, with and without BatchNorm; state_dict keys of ``torchvision.models``.

Reference: Simonyan and Zisserman, Very Deep Convolutional Networks, 2014 (configurations A, B, D, E).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..modules import FusedSequential
from ..modules._replay import replayed
from ._registry import register

# 3x3 convolutions at each of the five resolutions; the widths are 64, 128, 256, 512, 512.
_DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_WIDTHS = (64, 128, 256, 512, 512)
_COUNTS = {  # without BatchNorm, with BatchNorm
    11: (132_863_336, 132_868_840), 13: (133_047_848, 133_053_736), 16: (138_357_544, 138_365_992),
    19: (143_667_240, 143_678_248),
}  # fmt: skip


class VGG(nn.Module):
    """3x3 convolutions with ReLU, 2x2 pooling between resolutions, three fully connected layers.

    Shape: x (N, 3, H, W) with H, W at least 32, in the paper 224 -> logits (N, num_classes).
    """

    def __init__(self, depth: int, batch_norm: bool = False, num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        if depth not in _DEPTHS:
            raise ValueError(f"VGG: depth: expected one of {sorted(_DEPTHS)}, got {depth!r}")
        layers: list[nn.Module] = []
        channels = 3
        for width, count in zip(_WIDTHS, _DEPTHS[depth], strict=True):
            for _ in range(count):
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                layers += [nn.BatchNorm2d(width)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                channels = width
            layers.append(nn.MaxPool2d(2, 2))
        self.features = FusedSequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = FusedSequential(
            nn.Linear(512 * 7 * 7, 4096), nn.ReLU(True), nn.Dropout(dropout),
            nn.Linear(4096, 4096), nn.ReLU(True), nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )  # fmt: skip
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.01)
                nn.init.zeros_(m.bias)

    @replayed
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def _builder(depth: int, batch_norm: bool) -> Callable[..., VGG]:
    name = f"vgg{depth}" + ("_bn" if batch_norm else "")

    def build(num_classes: int = 1000, dropout: float = 0.5) -> VGG:
        return VGG(depth, batch_norm, num_classes, dropout)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"VGG-{depth}" + (" with BatchNorm" if batch_norm else "") + ", torchvision's keys."
    return register(name, "vgg", _COUNTS[depth][batch_norm], (3, 224, 224), f"torchvision {name}")(build)


vgg11, vgg13, vgg16, vgg19 = (_builder(depth, False) for depth in _DEPTHS)
vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn = (_builder(depth, True) for depth in _DEPTHS)
