"""U-Nets in plain torch from the papers' figures: 2-D valid, 2-D same with BatchNorm (two ways up), 3-D."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def crop2(x: Tensor, h: int, w: int) -> Tensor:
    y0, x0 = (x.size(2) - h) // 2, (x.size(3) - w) // 2
    return x[:, :, y0 : y0 + h, x0 : x0 + w]


class ValidUNet(nn.Module):
    """The figure of 2015: 3x3 without padding, crop and concatenate. ``c``: channels of the first level."""

    def __init__(self, i: int, k: int, c: int) -> None:
        super().__init__()
        ch = [i, c, 2 * c, 4 * c, 8 * c, 16 * c]
        self.enc = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(ch[n], ch[n + 1], 3), nn.Conv2d(ch[n + 1], ch[n + 1], 3)]) for n in range(5)
        )
        self.ups = nn.ModuleList(nn.ConvTranspose2d(ch[n + 1], ch[n], 2, 2) for n in (4, 3, 2, 1))
        self.dec = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(ch[n + 1], ch[n], 3), nn.Conv2d(ch[n], ch[n], 3)]) for n in (4, 3, 2, 1)
        )
        self.out = nn.Conv2d(c, k, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for n, (a, b) in enumerate(self.enc):
            if n:
                x = F.max_pool2d(x, 2)
            x = F.relu(b(F.relu(a(x))))
            kept.append(x)
        for n, (a, b) in enumerate(self.dec):
            x = self.ups[n](x)
            x = torch.cat([crop2(kept[3 - n], x.size(2), x.size(3)), x], 1)
            x = F.relu(b(F.relu(a(x))))
        return self.out(x)


class SameUNet(nn.Module):
    """Padded convolutions with BatchNorm; ``bilinear``: interpolation instead of transposed convolutions."""

    def __init__(self, i: int, k: int, c: int, bilinear: bool) -> None:
        super().__init__()
        ch = [i, c, 2 * c, 4 * c, 8 * c, 16 * c // (2 if bilinear else 1)]
        self.enc = nn.ModuleList(self.pair(ch[n], ch[n + 1], ch[n + 1]) for n in range(5))
        if bilinear:
            self.dec = nn.ModuleList(self.pair(2 * s, s, e) for s, e in ((8 * c, 4 * c), (4 * c, 2 * c), (2 * c, c), (c, c)))
        else:
            self.ups = nn.ModuleList(nn.ConvTranspose2d(2 * s, s, 2, 2) for s in (8 * c, 4 * c, 2 * c, c))
            self.dec = nn.ModuleList(self.pair(2 * s, s, s) for s in (8 * c, 4 * c, 2 * c, c))
        self.bilinear, self.out = bilinear, nn.Conv2d(c, k, 1)

    @staticmethod
    def pair(i: int, m: int, o: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(i, m, 3, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU(),
            nn.Conv2d(m, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for n, level in enumerate(self.enc):
            x = level(F.max_pool2d(x, 2) if n else x)
            kept.append(x)
        for n, level in enumerate(self.dec):
            skip = kept[3 - n]
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True) if self.bilinear else self.ups[n](x)
            dh, dw = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
            x = F.pad(x, [dw // 2, dw - dw // 2, dh // 2, dh - dh // 2])
            x = level(torch.cat([skip, x], 1))
        return self.out(x)


class UNet3(nn.Module):
    """The figure of 2016; the number of channels doubles before each pooling. ``c``: channels of the first convolution."""

    def __init__(self, i: int, k: int, c: int) -> None:
        super().__init__()
        self.enc = nn.ModuleList([self.pair(i, c, 2 * c), self.pair(2 * c, 2 * c, 4 * c), self.pair(4 * c, 4 * c, 8 * c),
                                  self.pair(8 * c, 8 * c, 16 * c)])  # fmt: skip
        self.ups = nn.ModuleList(nn.ConvTranspose3d(w, w, 2, 2, bias=False) for w in (16 * c, 8 * c, 4 * c))
        self.dec = nn.ModuleList(
            [self.pair(24 * c, 8 * c, 8 * c), self.pair(12 * c, 4 * c, 4 * c), self.pair(6 * c, 2 * c, 2 * c)]
        )
        self.out = nn.Conv3d(2 * c, k, 1)

    @staticmethod
    def pair(i: int, m: int, o: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv3d(i, m, 3), nn.BatchNorm3d(m), nn.ReLU(), nn.Conv3d(m, o, 3), nn.BatchNorm3d(o), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for n, level in enumerate(self.enc):
            x = level(F.max_pool3d(x, 2) if n else x)
            kept.append(x)
        for n, level in enumerate(self.dec):
            x, skip = self.ups[n](x), kept[2 - n]
            d, h, w = ((a - b) // 2 for a, b in zip(skip.shape[2:], x.shape[2:], strict=True))
            skip = skip[:, :, d : d + x.size(2), h : h + x.size(3), w : w + x.size(4)]
            x = level(torch.cat([skip, x], 1))
        return self.out(x)
