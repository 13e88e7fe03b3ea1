"""3-D U-Net.

Reference: Çiçek et al., 3D U-Net: Learning Dense Volumetric Segmentation from Sparse Annotation, 2016.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modules import FusedSequential
from ..modules._replay import replayed
from ._init import he_fan_in
from ._registry import register
from .unet import center_crop

_LEVELS = 4


class UNet3d(nn.Module):
    """Three 2^3 poolings down, three up-convolutions back; 3^3 convolution - BatchNorm - ReLU pairs.

    The paper's 19,069,955 parameters are those of this net without the BatchNorms' 4,672 and without biases of the
    up-convolutions.

    Args:
        in_channels, num_classes: of input and output.
        padding: "valid" (the paper; skips are cropped) or "same".
        up_bias: biases of the up-convolutions (896 parameters).
        width: channels of the first convolution; a level's second has twice those of its first, and so on downwards.

    Shape: x (N, in_channels, D, H, W) -> (N, num_classes, D', H', W'); "valid": 88 less on each side, for sides of 92 + 8n
    (132 x 132 x 116 -> 44 x 44 x 28); "same": multiples of 8, unchanged. Raises: RuntimeError for another size.
    """

    def __init__(
        self, in_channels: int = 3, num_classes: int = 3, *, padding: str = "valid", up_bias: bool = False, width: int = 32
    ) -> None:
        super().__init__()
        if padding not in ("valid", "same"):
            raise ValueError(f"UNet3d: padding: expected 'valid' or 'same', got {padding!r}")
        self.padding = padding
        pad = int(padding == "same")
        self.down, self.up, self.decode = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = in_channels
        encoder = [(width << level, width << (level + 1)) for level in range(_LEVELS)]
        for middle, out in encoder:
            self.down.append(_double(channels, middle, out, pad))
            channels = out
        self.pool = nn.MaxPool3d(2, 2)
        for _, skip in reversed(encoder[:-1]):
            self.up.append(nn.ConvTranspose3d(channels, channels, 2, stride=2, bias=up_bias))
            self.decode.append(_double(channels + skip, skip, skip, pad))
            channels = skip
        self.head = nn.Conv3d(channels, num_classes, 1)
        he_fan_in(self)

    @replayed
    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        skips = []
        for i, level in enumerate(self.down):
            x = level(x if i == 0 else self.pool(x))
            skips.append(x)
        x = skips.pop()
        for up, decode in zip(self.up, self.decode, strict=True):
            x = up(x)
            x = decode(torch.cat((center_crop(skips.pop(), x.shape[2:]), x), 1))
        return self.head(x)

    def _check(self, x: Tensor) -> None:
        first = 92 if self.padding == "valid" else 8
        if any(s < first or (s - first) % 8 for s in x.shape[2:]):
            raise RuntimeError(f"UNet3d: x: expected sides of {first} + 8n ({self.padding}), got {tuple(x.shape[2:])}")


def _double(channels: int, middle: int, out: int, padding: int) -> FusedSequential:
    return FusedSequential(
        nn.Conv3d(channels, middle, 3, padding=padding), nn.BatchNorm3d(middle), nn.ReLU(inplace=True),
        nn.Conv3d(middle, out, 3, padding=padding), nn.BatchNorm3d(out), nn.ReLU(inplace=True),
    )  # fmt: skip


@register("unet3d", "unet3d", 19_074_627, (3, 132, 132, 116), "paper (19,069,955) + 4,672 of BatchNorm")
def unet3d(
    in_channels: int = 3, num_classes: int = 3, *, padding: str = "valid", up_bias: bool = False, width: int = 32
) -> UNet3d:
    """3-D U-Net of 2016."""
    return UNet3d(in_channels, num_classes, padding=padding, up_bias=up_bias, width=width)
