"""CIFAR residual networks: 6n + 2 layers of basic blocks, the plain nets beside them, and 9n + 2 pre-activation bottlenecks.

References: He et al., Deep Residual Learning, 2015, section 4.2; He et al., Identity Mappings, 2016.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import BasicBlock, FusedSequential, PreActBottleneck
from ..modules._linear import run_linear_act
from ..modules._pool import run_pool
from ..modules._replay import replayed
from ..modules._run import ActSpec, run_bn_act, run_conv_act, run_conv_bn_act
from ..modules.residual import ResidualStage, conv1x1, conv3x3
from ._init import he_fan_out
from ._registry import register
from .preact_resnet import preact_stage

_WIDTHS = (16, 32, 64)
_SIZE = (3, 32, 32)
_OPTION_A = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}
_PREACT = {164: 1_703_258, 1001: 10_327_706}


class PadShortcut(nn.Module):
    """Shortcut A: every second pixel, new channels filled with zeros; no parameters.

    Shape: x (N, channels, H, W) -> (N, out, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.channels, self.out, self.stride = channels, out, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.out - self.channels))

    def extra_repr(self) -> str:
        return f"{self.channels} -> {self.out}, stride={self.stride}"


class CifarResNet(nn.Module):
    """3x3 stem with 16 channels, three stages of (depth - 2) / 6 blocks with 16, 32, 64 channels, average, linear.

    Args:
        depth: 6n + 2. num_classes: logits.
        shortcut: "A" (zero padding, no parameters), "B" (1x1 convolution and BatchNorm where the shape changes), or "none":
            the plain net without residual connections.
        residual_scale: factor after each addition.

    Shape: x (N, 3, H, W), 32 x 32 in the paper -> logits (N, num_classes).
    """

    def __init__(self, depth: int, num_classes: int = 10, *, shortcut: str = "A", residual_scale: float = 1.0) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"CifarResNet: depth: expected 6n + 2 from 8 on, got {depth}")
        if shortcut not in ("A", "B", "none"):
            raise ValueError(f"CifarResNet: shortcut: expected 'A', 'B' or 'none', got {shortcut!r}")
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        channels, stages = 16, []
        for i, width in enumerate(_WIDTHS):
            blocks: list[nn.Module] = []
            for j in range((depth - 2) // 6):
                stride = 2 if i and not j else 1
                if shortcut == "none":
                    blocks.append(_plain_block(channels, width, stride))
                else:
                    down = _shortcut(shortcut, channels, width, stride)
                    blocks.append(BasicBlock(channels, width, stride, down, residual_scale=residual_scale))
                channels = width
            stages.append(ResidualStage(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        he_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        x = run_conv_bn_act(x, self.conv1, self.bn1, ActSpec("relu", 0.0, self.relu))
        x = self.layer3(self.layer2(self.layer1(x)))
        return run_linear_act(torch.flatten(run_pool(x, self.avgpool), 1), self.fc)


def _shortcut(kind: str, channels: int, out: int, stride: int) -> nn.Module | None:
    if stride == 1 and channels == out:
        return None
    if kind == "A":
        return PadShortcut(channels, out, stride)
    return FusedSequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))


def _plain_block(channels: int, width: int, stride: int) -> nn.Module:
    return FusedSequential(
        conv3x3(channels, width, stride), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        conv3x3(width, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
    )  # fmt: skip


class CifarPreActResNet(nn.Module):
    """3x3 stem with 16 channels, three stages of (depth - 2) / 9 pre-activation bottlenecks (64, 128, 256 channels out).

    Args:
        depth: 9n + 2. num_classes: logits. stride_in_1x1: stride on the 1x1 convolution (the paper's code) or the 3x3.
        residual_scale: factor after each addition.

    Shape: x (N, 3, H, W), 32 x 32 in the paper -> logits (N, num_classes).
    """

    def __init__(self, depth: int, num_classes: int = 10, *, stride_in_1x1: bool = True, residual_scale: float = 1.0) -> None:
        super().__init__()
        if depth < 11 or (depth - 2) % 9:
            raise ValueError(f"CifarPreActResNet: depth: expected 9n + 2 from 11 on, got {depth}")
        self.conv1 = conv3x3(3, 16)
        channels, stages = 16, []
        for i, planes in enumerate(_WIDTHS):
            stages.append(
                preact_stage(
                    PreActBottleneck, channels, planes, (depth - 2) // 9, 2 if i else 1, stride_in_1x1=stride_in_1x1,
                    residual_scale=residual_scale,
                )
            )  # fmt: skip
            channels = planes * PreActBottleneck.expansion
        self.layer1, self.layer2, self.layer3 = stages
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        he_fan_out(self)

    @replayed
    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(run_conv_act(x, self.conv1))))
        x = run_bn_act(x, self.norm, ActSpec("relu", 0.0, self.relu))
        return run_linear_act(torch.flatten(run_pool(x, self.avgpool), 1), self.fc)


def _builder(
    name: str, parameters: int, make: Callable[..., nn.Module], doc: str, source: str = "paper"
) -> Callable[..., nn.Module]:
    def build(num_classes: int = 10, **options: Any) -> nn.Module:
        return make(num_classes, **options)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = doc
    return register(name, "cifar_resnet", parameters, _SIZE, source)(build)


def _resnet(depth: int) -> Callable[..., nn.Module]:
    doc = f"CIFAR ResNet-{depth}; options as :class:`CifarResNet`."
    return _builder(f"cifar_resnet{depth}", _OPTION_A[depth], lambda n, **o: CifarResNet(depth, n, **o), doc)


def _plain(depth: int) -> Callable[..., nn.Module]:
    doc = f"The {depth}-layer net without residual connections."
    return _builder(f"cifar_plain{depth}", _OPTION_A[depth], lambda n: CifarResNet(depth, n, shortcut="none"), doc)


def _preact(depth: int) -> Callable[..., nn.Module]:
    doc = f"Pre-activation CIFAR ResNet-{depth}; options as :class:`CifarPreActResNet`."
    return _builder(f"cifar_preact{depth}", _PREACT[depth], lambda n, **o: CifarPreActResNet(depth, n, **o), doc, "pytorchcv")


cifar_resnet20, cifar_resnet32, cifar_resnet44, cifar_resnet56, cifar_resnet110, cifar_resnet1202 = map(_resnet, _OPTION_A)
cifar_plain20, cifar_plain32, cifar_plain44, cifar_plain56, cifar_plain110 = map(_plain, (20, 32, 44, 56, 110))
cifar_preact164, cifar_preact1001 = map(_preact, _PREACT)
