"""AlexNet of 2012 in plain torch, written from the paper: two towers as two convolutions each, LRN by its formula."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def local_response(x: Tensor) -> Tensor:
    """``x / (2 + 1e-4 * sum of squares over five neighbouring channels) ** 0.75``."""
    out = torch.zeros_like(x)
    channels = x.shape[1]
    for c in range(channels):
        around = x[:, max(0, c - 2) : min(channels, c + 3)]
        out[:, c] = x[:, c] / (2 + 1e-4 * (around**2).sum(1)) ** 0.75
    return out


class PaperAlexNet(nn.Module):
    """The layers of the paper's figure 2 with its five convolutions and three dense layers."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 96, 11, 4)
        self.c2 = nn.Conv2d(48, 256, 5, 1, 2)  # split by hand in forward
        self.c3 = nn.Conv2d(256, 384, 3, 1, 1)
        self.c4 = nn.Conv2d(192, 384, 3, 1, 1)
        self.c5 = nn.Conv2d(192, 256, 3, 1, 1)
        self.d6, self.d7, self.d8 = nn.Linear(9216, 4096), nn.Linear(4096, 4096), nn.Linear(4096, classes)

    def towers(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """Each half of the kernels sees its half of the channels."""
        low, high = x.chunk(2, 1)
        (w1, w2), (b1, b2) = conv.weight.chunk(2), conv.bias.chunk(2)
        return torch.cat((F.conv2d(low, w1, b1, padding=conv.padding), F.conv2d(high, w2, b2, padding=conv.padding)), 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(local_response(F.relu(self.c1(x))), 3, 2)
        x = F.max_pool2d(local_response(F.relu(self.towers(x, self.c2))), 3, 2)
        x = F.relu(self.c3(x))
        x = F.relu(self.towers(x, self.c4))
        x = F.max_pool2d(F.relu(self.towers(x, self.c5)), 3, 2).flatten(1)
        x = F.dropout(F.relu(self.d6(x)), 0.5, self.training)
        return self.d8(F.dropout(F.relu(self.d7(x)), 0.5, self.training))
