"""CIFAR DenseNets without bottlenecks and compression in plain torch, from the paper: three blocks, k new channels a layer.

pytorchcv compresses its transitions in these nets too, which the paper does not, so they have no oracle among the libraries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dense(nn.Module):
    """BN - ReLU - conv; with ``halve`` a mean over 2x2 pixels behind it (a transition)."""

    def __init__(self, i: int, o: int, k: int, halve: bool = False) -> None:
        super().__init__()
        self.norm, self.conv, self.halve = nn.BatchNorm2d(i), nn.Conv2d(i, o, k, padding=k // 2, bias=False), halve

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(torch.relu(self.norm(x)))
        return F.avg_pool2d(y, 2) if self.halve else y


class PlainDenseNet(nn.Module):
    """``depth`` 3n + 4; 16 channels in the stem."""

    def __init__(self, depth: int, k: int, classes: int = 10) -> None:
        super().__init__()
        self.stem, self.parts = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.ModuleList()
        channels = 16
        for block in range(3):
            for _ in range((depth - 4) // 3):
                self.parts.append(Dense(channels, k, 3))
                channels += k
            if block < 2:
                self.parts.append(Dense(channels, channels, 1, halve=True))
        self.norm, self.last = nn.BatchNorm2d(channels), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for part in self.parts:
            x = part(x) if part.halve else torch.cat([x, part(x)], 1)
        return self.last(torch.relu(self.norm(x)).mean((2, 3)))
