"""The networks of the ecosystem tests: stock layers, the same optimized, and our own layers with the same weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dl4ds_kernels as dk
from dl4ds_kernels.modules import BasicBlock, BNAct2d, Bottleneck, ConvBNAct2d, PreActBasicBlock

SIZE = (4, 3, 16, 16)


class StockNet(nn.Module):
    """conv-BN-ReLU, a residual block with a projection, BN-ReLU-conv, a head: every pattern that is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.down, self.bn3 = nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32)
        self.bn4, self.conv4 = nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + self.bn3(self.down(x)))
        x = self.conv4(self.relu(self.bn4(x)))
        return self.fc(x.mean((2, 3)))


def own_net() -> nn.Module:
    """The package's layers and blocks."""
    return nn.Sequential(
        ConvBNAct2d(3, 16, 3, padding=1),
        BasicBlock(16, 16),
        BNAct2d(16, activation="leaky_relu"),
        Bottleneck(16, 8, 2, nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))),
        PreActBasicBlock(32, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def seeded(build: type[nn.Module] | object, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def make(kind: str) -> nn.Module:
    """ "own": our layers; "optimized": ``dk.optimize`` of the stock network; "stock"."""
    if kind == "own":
        return seeded(own_net)
    stock = seeded(StockNet)
    if kind == "stock":
        return stock
    model = dk.optimize(stock)
    assert len(model.dl4ds_report.replaced) >= 4
    return model


def image(seed: int = 1) -> Tensor:
    return torch.randn(*SIZE, generator=torch.Generator().manual_seed(seed))
