"""The stacked hourglass of the paper's own code in plain torch: recursion as in the paper's figure, stem 64-128-128-256."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Res(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.n1, self.c1 = nn.BatchNorm2d(i), nn.Conv2d(i, o // 2, 1)
        self.n2, self.c2 = nn.BatchNorm2d(o // 2), nn.Conv2d(o // 2, o // 2, 3, 1, 1)
        self.n3, self.c3 = nn.BatchNorm2d(o // 2), nn.Conv2d(o // 2, o, 1)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.c1(torch.relu(self.n1(x)))
        y = self.c2(torch.relu(self.n2(y)))
        return self.skip(x) + self.c3(torch.relu(self.n3(y)))


class Glass(nn.Module):
    """One level with the smaller hourglass inside it."""

    def __init__(self, n: int, f: int) -> None:
        super().__init__()
        self.inner = Glass(n - 1, f) if n > 1 else None
        self.up1, self.low1, self.low3 = Res(f, f), Res(f, f), Res(f, f)
        if n == 1:
            self.low2 = Res(f, f)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low1(F.max_pool2d(x, 2))
        low = self.low3(self.inner(low) if self.inner is not None else self.low2(low))
        return self.up1(x) + low.repeat_interleave(2, 2).repeat_interleave(2, 3)


class PaperHourglass(nn.Module):
    def __init__(self, stacks: int, joints: int, depth: int = 4, f: int = 256) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64)
        self.r1, self.r2, self.r3 = Res(64, 128), Res(128, 128), Res(128, f)
        self.glasses = nn.ModuleList(Glass(depth, f) for _ in range(stacks))
        self.after = nn.ModuleList(Res(f, f) for _ in range(stacks))
        self.lin = nn.ModuleList(nn.Sequential(nn.Conv2d(f, f, 1), nn.BatchNorm2d(f)) for _ in range(stacks))
        self.maps = nn.ModuleList(nn.Conv2d(f, joints, 1) for _ in range(stacks))
        self.back_features = nn.ModuleList(nn.Conv2d(f, f, 1) for _ in range(stacks - 1))
        self.back_maps = nn.ModuleList(nn.Conv2d(joints, f, 1) for _ in range(stacks - 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = torch.relu(self.norm(self.first(x)))
        x = self.r3(self.r2(F.max_pool2d(self.r1(x), 2)))
        found = []
        for k in range(len(self.glasses)):
            y = torch.relu(self.lin[k](self.after[k](self.glasses[k](x))))
            found.append(self.maps[k](y))
            if k + 1 < len(self.glasses):
                x = x + self.back_features[k](y) + self.back_maps[k](found[-1])
        return found
