"""U-Net: the net of 2015 with valid convolutions, and the same-padded variant with BatchNorm that most people train.

Reference: Ronneberger, Fischer and Brox, U-Net: Convolutional Networks for Biomedical Image Segmentation, 2015.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import FusedSequential
from ..modules._pool import run_pool
from ..modules._replay import replayed
from ..modules._run import run_conv_act
from ..modules._transposed import run_conv_transpose_bn_act
from ..modules.sequential import run_concat
from ._init import he_fan_in
from ._registry import register

_LEVELS = 5


def center_crop(x: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """The central ``size`` of the spatial dimensions of x (N, C, …), as a view."""
    for dim, target in enumerate(size, 2):
        x = x.narrow(dim, (x.shape[dim] - target) // 2, target)
    return x


class UNet(nn.Module):
    """Four 2x2 poolings down, four up-convolutions back, skip connections by concatenation (skip first).

    Args:
        in_channels, num_classes: of input and output.
        padding: "valid" is the paper (a 3x3 convolution takes a pixel off each side, skips are cropped); "same" keeps sizes.
        batch_norm: BatchNorm behind each 3x3 convolution, which then has no bias.
        bilinear: bilinear upsampling (align_corners) instead of the up-convolution; the deepest level then has 512 channels.
        dropout: at the end of the encoder (the paper uses it, rate not given).
        width: channels of the first level; each level below has twice as many.

    Shape: x (N, in_channels, H, W) -> (N, num_classes, H', W'); "valid": H' = H - 184 for the sizes that :meth:`valid_size`
    gives (572 -> 388); "same": H' = H, any size from 16 on (odd sizes are padded on the way up).
    Raises: RuntimeError for a size that does not fit.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        *,
        padding: str = "valid",
        batch_norm: bool = False,
        bilinear: bool = False,
        dropout: float = 0.0,
        width: int = 64,
    ) -> None:
        super().__init__()
        if padding not in ("valid", "same"):
            raise ValueError(f"UNet: padding: expected 'valid' or 'same', got {padding!r}")
        self.padding, self.bilinear = padding, bilinear
        widths = [width << level for level in range(_LEVELS)]
        if bilinear:
            widths[-1] //= 2
        options: dict[str, Any] = {"padding": int(padding == "same"), "batch_norm": batch_norm}
        self.down = nn.ModuleList()
        channels = in_channels
        for level in widths:
            self.down.append(_double(channels, level, level, **options))
            channels = level
        self.pool = nn.MaxPool2d(2, 2)
        self.dropout = nn.Dropout(dropout)
        self.up, self.decode = nn.ModuleList(), nn.ModuleList()
        for skip in reversed(widths[:-1]):
            if bilinear:
                self.up.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True))
                self.decode.append(_double(2 * skip, skip, max(skip // 2, width), **options))
            else:
                self.up.append(nn.ConvTranspose2d(2 * skip, skip, 2, stride=2))
                self.decode.append(_double(2 * skip, skip, skip, **options))
        self.head = nn.Conv2d(width, num_classes, 1)
        he_fan_in(self)

    @staticmethod
    def valid_size(at_least: int) -> int:
        """The smallest input side of the "valid" net from ``at_least`` on: every pooled map is even (572, 588, …)."""
        size = max(at_least, 188)
        return size + (-(size - 188)) % 16

    @replayed
    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        skips = []
        for i, level in enumerate(self.down):
            x = level(x if i == 0 else run_pool(x, self.pool))
            skips.append(x)
        x = self.dropout(skips.pop())
        for up, decode in zip(self.up, self.decode, strict=True):
            skip, size = skips.pop(), torch.Size(2 * s for s in x.shape[2:])
            if self.padding == "valid":
                skip = center_crop(skip, size)
            if size == skip.shape[2:]:
                x = run_concat((skip, run_conv_transpose_bn_act(x, up, None)), decode)
            else:
                x = decode(torch.cat((skip, _pad_to(up(x), skip.shape[2:])), 1))
        return run_conv_act(x, self.head)

    def _check(self, x: Tensor) -> None:
        sizes = x.shape[2:]
        if self.padding == "valid" and any(s < 188 or (s - 188) % 16 for s in sizes):
            near = tuple(self.valid_size(s) for s in sizes)
            raise RuntimeError(
                f"UNet: x: expected sides of 188 + 16n with valid convolutions (next: {near}), got {tuple(sizes)}"
            )
        if self.padding == "same" and min(sizes) < 16:
            raise RuntimeError(f"UNet: x: expected sides from 16 on, got {tuple(sizes)}")


def _double(channels: int, middle: int, out: int, *, padding: int, batch_norm: bool) -> FusedSequential:
    layers: list[nn.Module] = []
    for a, b in ((channels, middle), (middle, out)):
        layers.append(nn.Conv2d(a, b, 3, padding=padding, bias=not batch_norm))
        layers += [nn.BatchNorm2d(b)] if batch_norm else []
        layers.append(nn.ReLU(inplace=True))
    return FusedSequential(*layers)


def _pad_to(x: Tensor, size: torch.Size) -> Tensor:
    """Zeros around x so that it has ``size``; the odd one goes to the right and below."""
    dy, dx = size[0] - x.shape[2], size[1] - x.shape[3]
    return F.pad(x, (dx // 2, dx - dx // 2, dy // 2, dy - dy // 2))


@register("unet", "unet", 31_030_658, (1, 572, 572), "paper")
def unet(in_channels: int = 1, num_classes: int = 2, **options: Any) -> UNet:
    """U-Net 2015: valid convolutions with bias, no BatchNorm."""
    return UNet(in_channels, num_classes, **options)


@register("unet_bn", "unet", 31_037_698, (3, 512, 512), "milesial layout")
def unet_bn(in_channels: int = 3, num_classes: int = 2, **options: Any) -> UNet:
    """Same-padded U-Net with BatchNorm and up-convolutions."""
    return UNet(in_channels, num_classes, **{"padding": "same", "batch_norm": True, **options})


@register("unet_bn_bilinear", "unet", 17_263_042, (3, 512, 512), "milesial layout, bilinear")
def unet_bn_bilinear(in_channels: int = 3, num_classes: int = 2, **options: Any) -> UNet:
    """Same-padded U-Net with BatchNorm and bilinear upsampling."""
    return UNet(in_channels, num_classes, **{"padding": "same", "batch_norm": True, "bilinear": True, **options})
