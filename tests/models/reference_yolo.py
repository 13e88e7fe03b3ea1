"""YOLOv1's nets in plain torch, written from the paper's figure and darknet's layer list, without a .cfg.

Darknet's BatchNorm divides by ``sqrt(var) + 1e-6`` on the CPU, in training by that of the unbiased variance; here as its own
layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DarknetNorm(nn.Module):
    """``(x - mean) / (sqrt(var) + 1e-6) * scale + bias``; running averages by 0.99 and 0.01, of the unbiased variance."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))
        self.register_buffer("running_mean", torch.zeros(c))
        self.register_buffer("running_var", torch.ones(c))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=1)
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean += 0.01 * (mean - self.running_mean)
                self.running_var += 0.01 * (var - self.running_var)
        mean, std, scale, bias = (v[None, :, None, None] for v in (mean, var.sqrt() + 1e-6, self.weight, self.bias))
        return (x - mean) / std * scale + bias


class Local(nn.Module):
    """An own 3x3 kernel at each place, as a loop over the places."""

    def __init__(self, i: int, o: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(side * side, o, i * 9) / (i * 9) ** 0.5)
        self.bias = nn.Parameter(torch.randn(o, side, side) / 10)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1))
        columns = []
        for place in range(self.side * self.side):
            r, c = divmod(place, self.side)
            patch = padded[:, :, r : r + 3, c : c + 3].flatten(1)
            columns.append(patch @ self.weight[place].T)
        return torch.stack(columns, -1).unflatten(-1, (self.side, self.side)) + self.bias


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.1 * x)


class Yolo(nn.Module):
    """kind "paper", "darknet" or "tiny"; every number of filters divided by ``d``."""

    def __init__(self, kind: str, d: int = 1) -> None:
        super().__init__()
        if kind == "tiny":
            plan = "16x3 M 32x3 M 64x3 M 128x3 M 256x3 M 512x3 M 1024x3 256x3"
        else:
            plan = (
                "64x7/2 M 192x3 M 128x1 256x3 256x1 512x3 M 256x1 512x3 256x1 512x3 256x1 512x3 256x1 512x3 512x1 1024x3 M "
                "512x1 1024x3 512x1 1024x3 1024x3 1024x3/2 1024x3 1024x3"
            )
        self.plan, self.kind, self.convs = plan.split(), kind, nn.ModuleList()
        i = 3
        for item in self.plan:
            if item == "M":
                continue
            size, _, stride = item.partition("/")
            o, k = (int(v) for v in size.split("x"))
            o //= d
            conv = nn.Conv2d(i, o, k, int(stride or 1), k // 2, bias=kind == "paper")
            self.convs.append(nn.ModuleList([conv] if kind == "paper" else [conv, DarknetNorm(o)]))
            i = o
        if kind == "paper":
            self.fc = nn.ModuleList([nn.Linear(49 * i, 4096 // d), nn.Linear(4096 // d, 1470)])
        elif kind == "darknet":
            self.local = Local(i, 256 // d, 7)
            self.fc = nn.ModuleList([nn.Linear(49 * 256 // d, 1715)])
        else:
            self.fc = nn.ModuleList([nn.Linear(49 * i, 1470)])

    def forward(self, x: Tensor) -> Tensor:
        convs = iter(self.convs)
        for item in self.plan:
            if item == "M":
                x = F.max_pool2d(x, 2, 2)
                continue
            for layer in next(convs):
                x = layer(x)
            x = leaky(x)
        if self.kind == "darknet":
            x = F.dropout(leaky(self.local(x)), 0.5, self.training)
        x = x.flatten(1)
        if self.kind == "paper":
            x = F.dropout(leaky(self.fc[0](x)), 0.5, self.training)
        return self.fc[-1](x)
