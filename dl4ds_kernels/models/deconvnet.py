"""DeconvNet: a VGG-16 encoder with max-pool switches and a mirrored decoder of unpooling and transposed convolutions.

Reference: Noh, Hong and Han, Learning Deconvolution Network for Semantic Segmentation, 2015.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..functional import max_pool_indices, max_unpool
from ..modules import FusedSequential
from ..modules._replay import replayed
from ..modules._run import run_conv_act
from ._init import he_fan_in
from ._registry import register

_ENCODER = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_DECODER = ((512, 512, 512), (512, 512, 256), (256, 256, 128), (128, 64), (64, 64))


class DeconvNet(nn.Module):
    """Every convolution, transposed or not, is followed by BatchNorm and ReLU; the last is a 1x1 convolution to classes.

    Pooling remembers where each maximum was (the first in scan order among equals) and unpooling puts it back there.

    Args:
        num_classes: maps of scores (21 for VOC with background). batch_norm: False leaves every BatchNorm out.
        fc_channels: channels of the two layers in the middle.

    Shape: x (N, 3, H, W) with H, W = 224 (the middle is a 7x7 convolution on 7x7 maps), or any multiple of 32 from 224 on
    -> scores (N, num_classes, H, W). Raises: RuntimeError for another size.
    """

    def __init__(self, num_classes: int = 21, *, batch_norm: bool = True, fc_channels: int = 4096) -> None:
        super().__init__()

        def stage(channels: int, widths: tuple[int, ...], transposed: bool) -> FusedSequential:
            kind = nn.ConvTranspose2d if transposed else nn.Conv2d
            layers: list[nn.Module] = []
            for width in widths:
                layers += _step(kind(channels, width, 3, padding=1), width, batch_norm)
                channels = width
            return FusedSequential(*layers)

        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        channels = 3
        for widths in _ENCODER:
            self.encoder.append(stage(channels, widths, False))
            channels = widths[-1]
        self.middle = FusedSequential(
            *_step(nn.Conv2d(channels, fc_channels, 7), fc_channels, batch_norm),
            *_step(nn.Conv2d(fc_channels, fc_channels, 1), fc_channels, batch_norm),
            *_step(nn.ConvTranspose2d(fc_channels, channels, 7), channels, batch_norm),
        )
        for widths in _DECODER:
            self.decoder.append(stage(channels, widths, True))
            channels = widths[-1]
        self.head = nn.Conv2d(channels, num_classes, 1)
        he_fan_in(self)

    @replayed
    def forward(self, x: Tensor) -> Tensor:
        if any(s < 224 or s % 32 for s in x.shape[2:]):
            raise RuntimeError(f"DeconvNet: x: expected sides that are multiples of 32 from 224 on, got {tuple(x.shape[2:])}")
        switches = []
        for stage in self.encoder:
            x, where = max_pool_indices(stage(x))
            switches.append(where)
        x = self.middle(x)
        for stage in self.decoder:
            x = stage(max_unpool(x, switches.pop()))
        return run_conv_act(x, self.head)


def _step(conv: nn.Module, channels: int, batch_norm: bool) -> list[nn.Module]:
    return [conv, *([nn.BatchNorm2d(channels)] if batch_norm else []), nn.ReLU(inplace=True)]


@register("deconvnet", "deconvnet", 251_805_653, (3, 224, 224), "DeconvNet prototxt")
def deconvnet(num_classes: int = 21, *, batch_norm: bool = True, fc_channels: int = 4096) -> DeconvNet:
    """DeconvNet for VOC."""
    return DeconvNet(num_classes, batch_norm=batch_norm, fc_channels=fc_channels)
