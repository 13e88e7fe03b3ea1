"""The layers of ResNet-50 at 256 images: BatchNorm sites and convolutions, with how often each occurs."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

BATCH = 256
Site = tuple[int, int, int, int, str]  # N, C, H, W, "plain" | "residual" | "linear"
Layer = tuple[int, int, int, int, int, int, int, bool]  # N, C, H, W, outputs, kernel, stride, residual


def resnet50() -> tuple[Counter[Site], Counter[Layer]]:
    """By hooks on torchvision's model, without memory."""
    from torchvision.models import resnet50 as build

    with torch.device("meta"):
        model = build().eval()
        x = torch.empty(BATCH, 3, 224, 224)
    sites: Counter[Site] = Counter()
    layers: Counter[Layer] = Counter()

    def seen(name: str, module: nn.Module, given: torch.Tensor) -> None:
        last = name.rpartition(".")[2]
        if isinstance(module, nn.BatchNorm2d):
            way = "residual" if last == "bn3" else "linear" if "downsample" in name else "plain"
            sites[(*given.shape, way)] += 1
        else:
            layers[(*given.shape, module.out_channels, module.kernel_size[0], module.stride[0], last == "conv3")] += 1

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.Conv2d):
            module.register_forward_pre_hook(lambda m, args, name=name: seen(name, m, args[0]))
    model(x)
    return sites, layers
