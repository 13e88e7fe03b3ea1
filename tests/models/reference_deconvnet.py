"""DeconvNet in plain torch from the paper's table: pooling and unpooling by explicit switches, no library unpooling."""

from __future__ import annotations

import copy
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

ROUNDING = 1e-5  # of the largest value: how far below the maximum of its window a switch may be


def pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """2x2 maxima and which of the four pixels (row by row) each is; of equal ones the first."""
    n, c, h, w = x.shape
    four = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(n, c, h // 2, w // 2, 4)
    best = four.argmax(-1, keepdim=True)
    return four.gather(-1, best).squeeze(-1), best


def unpool(x: Tensor, best: Tensor) -> Tensor:
    """Each value back at the pixel it came from, zeros elsewhere."""
    n, c, h, w = x.shape
    four = torch.zeros(n, c, h, w, 4, dtype=x.dtype).scatter(-1, best, x.unsqueeze(-1))
    return four.view(n, c, h, w, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(n, c, 2 * h, 2 * w)


def share_switches(patch: pytest.MonkeyPatch, net: nn.Module, x: Tensor, ours: ModuleType) -> None:
    """Let every forward of ``x``, of this file's nets and of those of the module ``ours``, take ``net``'s switches in fp64.

    Each must find maxima at those places itself, up to rounding.
    """
    here, choose, choose_ours = sys.modules[__name__], pool, ours.max_pool_indices
    switches: dict[torch.Size, Tensor] = {}

    def known(x: Tensor, out: Tensor) -> Tensor:
        best = switches[out.shape]
        n, c, h, w = out.shape
        four = x.detach().contiguous().view(n, c, h, 2, w, 2).permute(0, 1, 2, 4, 3, 5).reshape(n, c, h, w, 4)
        below = out.detach() - four.gather(-1, best).squeeze(-1)
        assert below.min() >= 0 and below.max() <= ROUNDING * out.abs().max(), f"a switch is {float(below.max()):.2e} off"
        return best

    def record(x: Tensor) -> tuple[Tensor, Tensor]:
        out, best = choose(x)
        assert out.shape not in switches, "switches are told apart by the sizes of their maps"
        switches[out.shape] = best
        return out, best

    def shared(x: Tensor) -> tuple[Tensor, Tensor]:
        out, _ = choose(x)
        return out, known(x, out)

    def shared_ours(x: Tensor) -> tuple[Tensor, Tensor]:
        out, where = choose_ours(x)
        assert where.max() < 4
        return out, torch.empty_like(where).copy_(known(x, out).squeeze(-1))

    patch.setattr(here, "pool", record)
    with torch.no_grad():
        copy.deepcopy(net).eval().double()(x.double())
    patch.setattr(here, "pool", shared)
    patch.setattr(ours, "max_pool_indices", shared_ours)


class Step(nn.Module):
    def __init__(self, layer: nn.Module, channels: int, norm: bool) -> None:
        super().__init__()
        self.layer, self.norm = layer, nn.BatchNorm2d(channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.layer(x)))


class PaperDeconvNet(nn.Module):
    """``fc``: channels of the two layers in the middle (4096 in the paper); ``norm``: BatchNorm behind every layer."""

    def __init__(self, classes: int, fc: int, norm: bool = True) -> None:
        super().__init__()
        down = ["64 64", "128 128", "256 256 256", "512 512 512", "512 512 512"]
        up = ["512 512 512", "512 512 256", "256 256 128", "128 64", "64 64"]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        last = 3
        for stage in down:
            self.down.append(nn.ModuleList())
            for width in map(int, stage.split()):
                self.down[-1].append(Step(nn.Conv2d(last, width, 3, padding=1), width, norm))
                last = width
        first = 512
        for stage in up:
            self.up.append(nn.ModuleList())
            for width in map(int, stage.split()):
                self.up[-1].append(Step(nn.ConvTranspose2d(first, width, 3, padding=1), width, norm))
                first = width
        self.fc6, self.fc7 = Step(nn.Conv2d(512, fc, 7), fc, norm), Step(nn.Conv2d(fc, fc, 1), fc, norm)
        self.back = Step(nn.ConvTranspose2d(fc, 512, 7), 512, norm)
        self.scores = nn.Conv2d(64, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        switches = []
        for stage in self.down:
            for step in stage:
                x = step(x)
            x, best = pool(x)
            switches.append(best)
        x = self.back(self.fc7(self.fc6(x)))
        for stage, best in zip(self.up, reversed(switches), strict=True):
            x = unpool(x, best)
            for step in stage:
                x = step(x)
        return self.scores(x)
