"""Residual networks with pre-activation blocks, in the three stems that implementations use.

Reference: He et al., Identity Mappings in Deep Residual Networks, 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import PreActBasicBlock, PreActBottleneck
from ..modules._linear import run_linear_act
from ..modules._pool import run_pool
from ..modules._replay import replayed
from ..modules._run import ActSpec, run_bn_act, run_conv_act, run_conv_bn_act
from ..modules.residual import conv1x1
from ._init import he_fan_out
from ._registry import register

Block = type[PreActBasicBlock] | type[PreActBottleneck]
# depth: (block, blocks in each stage, parameters)
_NETS: dict[int, tuple[Block, tuple[int, ...], int]] = {
    18: (PreActBasicBlock, (2, 2, 2, 2), 11_687_720),
    34: (PreActBasicBlock, (3, 4, 6, 3), 21_795_880),
    50: (PreActBottleneck, (3, 4, 6, 3), 25_549_352),
    101: (PreActBottleneck, (3, 4, 23, 3), 44_541_480),
    152: (PreActBottleneck, (3, 8, 36, 3), 60_185_128),
    200: (PreActBottleneck, (3, 24, 36, 3), 64_666_152),
}
STEMS = ("he", "timm", "ptcv")


class PreActResNet(nn.Module):
    """Stem, four stages of pre-activation blocks, BN + ReLU, global average, one linear layer.

    The first block of every stage shares its BN + ReLU between branch and projection; projections have no BatchNorm.

    Args:
        block: :class:`~dl4ds_kernels.modules.PreActBasicBlock` or :class:`~dl4ds_kernels.modules.PreActBottleneck`.
        layers: blocks in each of the four stages. num_classes: logits.
        stem: "he" (the paper's code): conv, BN, ReLU, pooling, and no BN + ReLU at the head of the first block. "timm": conv,
            pooling, and the first block has its own. "ptcv" (pytorchcv): both, 128 parameters more.
        stride_in_1x1: stride on the 1x1 convolution of a bottleneck instead of the 3x3.
        residual_scale: factor after each addition.

    Shape: x (N, 3, H, W), any size from 1 on, in the paper 224 or 320 -> logits (N, num_classes).
    """

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        stem: str = "he",
        stride_in_1x1: bool = False,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"PreActResNet: stem: expected 'he', 'timm' or 'ptcv', got {stem!r}")
        self.stem = stem
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = None if stem == "timm" else nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        options = {"stride_in_1x1": stride_in_1x1, "residual_scale": residual_scale}
        channels, stages = 64, []
        for i, (planes, count) in enumerate(zip((64, 128, 256, 512), layers, strict=True)):
            stages.append(
                preact_stage(block, channels, planes, count, 1 if i == 0 else 2, leading=i > 0 or stem != "he", **options)
            )
            channels = planes * block.expansion
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.norm = nn.BatchNorm2d(channels)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        he_fan_out(self)
        nn.init.zeros_(self.fc.bias)

    @replayed
    def forward(self, x: Tensor) -> Tensor:
        act = ActSpec("relu", 0.0, self.relu)
        x = run_conv_act(x, self.conv1) if self.bn1 is None else run_conv_bn_act(x, self.conv1, self.bn1, act)
        x = self.layer4(self.layer3(self.layer2(self.layer1(run_pool(x, self.maxpool)))))
        x = run_pool(run_bn_act(x, self.norm, act), self.avgpool)
        return run_linear_act(torch.flatten(x, 1), self.fc)


def preact_stage(
    block: Block, channels: int, planes: int, count: int, stride: int, *, leading: bool = True, **options: Any
) -> nn.Sequential:
    """``count`` blocks of one resolution; the first changes size and channels. ``leading``: of the first block."""
    out = planes * block.expansion
    shortcut = conv1x1(channels, out, stride) if stride != 1 or channels != out else None
    first = block(channels, planes, stride, shortcut, leading=leading, **options)
    return nn.Sequential(first, *(block(out, planes, **options) for _ in range(count - 1)))


def _builder(depth: int) -> Callable[..., PreActResNet]:
    block, layers, parameters = _NETS[depth]

    def build(num_classes: int = 1000, **options: Any) -> PreActResNet:
        return PreActResNet(block, layers, num_classes, **options)

    name = f"preact_resnet{depth}"
    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Pre-activation ResNet-{depth}; options as :class:`PreActResNet`."
    return register(name, "preact_resnet", parameters, (3, 224, 224), "fb.resnet.torch layout")(build)


preact_resnet18, preact_resnet34, preact_resnet50, preact_resnet101, preact_resnet152, preact_resnet200 = (
    _builder(depth) for depth in _NETS
)
