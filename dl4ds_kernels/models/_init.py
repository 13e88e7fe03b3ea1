"""Initialisations that several families share."""

from __future__ import annotations

from torch import nn

NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)


def he_fan_out(model: nn.Module) -> None:
    """Convolutions N(0, 2 / (k^2 C_out)), BatchNorm 1 and 0, biases 0: the residual networks' start."""
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Conv3d)):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, NORMS):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)


def he_fan_in(model: nn.Module) -> None:
    """Convolutions N(0, 2 / fan-in) and zero biases: DenseNet's and U-Net's start."""
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, NORMS):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
