"""Residual networks that no library on PyPI has, in plain torch from the papers: CIFAR nets with padding shortcuts, plain nets,
pre-activation ImageNet nets with the paper's stem, bottlenecks with the stride on the 1x1 convolution, scaled sums."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv(i: int, o: int, k: int, s: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, s, (k - 1) // 2, bias=False)


class CifarBlock(nn.Module):
    def __init__(self, i: int, o: int, s: int, skip: bool, scale: float) -> None:
        super().__init__()
        self.a, self.na, self.b, self.nb = conv(i, o, 3, s), nn.BatchNorm2d(o), conv(o, o, 3), nn.BatchNorm2d(o)
        self.extra, self.s, self.skip, self.scale = o - i, s, skip, scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.nb(self.b(torch.relu(self.na(self.a(x)))))
        if self.skip:
            old = x[:, :, :: self.s, :: self.s]
            zeros = old.new_zeros(old.shape[0], self.extra, *old.shape[2:])
            y = (y + torch.cat((old, zeros), 1)) * self.scale
        return torch.relu(y)


class CifarNet(nn.Module):
    """6n + 2 layers; ``skip=False`` is the plain net."""

    def __init__(self, n: int, skip: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.norm = conv(3, 16, 3), nn.BatchNorm2d(16)
        plan = [(16, 16, 1)] * n + [(16, 32, 2)] + [(32, 32, 1)] * (n - 1) + [(32, 64, 2)] + [(64, 64, 1)] * (n - 1)
        self.blocks = nn.ModuleList(CifarBlock(i, o, s, skip, scale) for i, o, s in plan)
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        for block in self.blocks:
            x = block(x)
        return self.last(x.mean((2, 3)))


class PreBottleneck(nn.Module):
    def __init__(self, i: int, m: int, s: int, lead: bool, stride_first: bool, scale: float) -> None:
        super().__init__()
        o = 4 * m
        self.n1 = nn.BatchNorm2d(i) if lead else nn.Identity()
        self.c1, self.n2 = conv(i, m, 1, s if stride_first else 1), nn.BatchNorm2d(m)
        self.c2, self.n3 = conv(m, m, 3, 1 if stride_first else s), nn.BatchNorm2d(m)
        self.c3 = conv(m, o, 1)
        self.short = conv(i, o, 1, s) if i != o or s != 1 else None
        self.lead, self.scale = lead, scale

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.n1(x)) if self.lead else x
        y = self.c3(torch.relu(self.n3(self.c2(torch.relu(self.n2(self.c1(z)))))))
        return (y + (x if self.short is None else self.short(z))) * self.scale


class PreNet(nn.Module):
    """Pre-activation bottleneck net for ImageNet; the stem has the first BN + ReLU, so the first block has none."""

    def __init__(self, counts: tuple[int, ...], stride_first: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.blocks = nn.ModuleList()
        width = 64
        for stage, count in enumerate(counts):
            for k in range(count):
                m, s = 64 * 2**stage, 2 if k == 0 and stage else 1
                self.blocks.append(PreBottleneck(width, m, s, bool(stage or k), stride_first, scale))
                width = 4 * m
        self.end = nn.BatchNorm2d(width)
        self.last = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.first(x))), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.last(torch.relu(self.end(x)).mean((2, 3)))
