"""Stacked hourglass networks for human pose.

Reference: Newell, Yang and Deng, Stacked Hourglass Networks for Human Pose Estimation, 2016. Attribute names follow the PyTorch
ports, so that kornia's state_dicts load into ``wide_stem=True``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..functional import add_act, max_pool2d, upsample_add
from ..modules import FusedSequential
from ..modules._chain import Step, run_chain
from ..modules._pool import run_pool
from ..modules._replay import replayed
from ..modules._run import NO_ACT, ActSpec, run_conv_act, run_conv_bn_act
from ._init import he_fan_in
from ._registry import register

FEATURES = 256


class HourglassResidual(nn.Module):
    """Pre-activation bottleneck with biases: BN - ReLU - 1x1 (out / 2) - BN - ReLU - 3x3 - BN - ReLU - 1x1 (out) + shortcut.

    The shortcut is the raw input, through a 1x1 convolution where the number of channels changes.

    Shape: x (N, channels, H, W) -> (N, out, H, W).
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        half = out // 2
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, half, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(half), nn.Conv2d(half, half, 3, padding=1)
        self.bn3, self.conv3 = nn.BatchNorm2d(half), nn.Conv2d(half, out, 1)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if channels == out else FusedSequential(nn.Conv2d(channels, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        act = ActSpec("relu", 0.0, self.relu)
        shortcut = x if self.downsample is None else self.downsample(x)
        steps = (
            Step(self.conv1, self.bn2, act, (0,), before=(self.bn1, act)),
            Step(self.conv2, self.bn3, act, (1,)),
            Step(self.conv3, None, NO_ACT, (2,)),
        )
        return add_act(run_chain((x,), steps), shortcut, activation="none")


def _residual(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(HourglassResidual(channels, out))


class Hourglass(nn.Module):
    """``depth`` poolings down and as many upsamplings back, a residual on every way, skips added.

    Shape: x (N, channels, H, W), sides divisible by ``2 ** depth`` -> the same shape.
    """

    def __init__(self, depth: int = 4, channels: int = FEATURES) -> None:
        super().__init__()
        self.depth = depth
        # Of each level: skip, way down, way up; the lowest has one more in the middle.
        self.hg = nn.ModuleList(
            nn.ModuleList(_residual(channels, channels) for _ in range(4 if level == 0 else 3)) for level in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._level(self.depth - 1, x)

    def _level(self, level: int, x: Tensor) -> Tensor:
        skip, down, up, *middle = self.hg[level]
        low = down(max_pool2d(x, 2, 2))
        low = self._level(level - 1, low) if level else middle[0](low)
        return upsample_add(up(low), skip(x))


class StackedHourglass(nn.Module):
    """Stem to a quarter of the size, then ``stacks`` hourglasses, each with heatmaps that go back into the next.

    Args:
        stacks: hourglasses. joints: heatmaps.
        depth: poolings in an hourglass.
        wide_stem: the second residual of the stem already widens to 256 channels (pytorch-pose, kornia: 25,594,624 parameters
            with 8 stacks) instead of the third (the paper's code: 25,434,112).
        in_channels: of the image.
        features: channels of the hourglasses (the paper: 256); the stem has a quarter and half of them.

    Shape: x (N, in_channels, H, W), sides divisible by ``4 * 2 ** depth`` (the paper: 256) -> one (N, joints, H / 4, W / 4) for
    each stack, in order; all of them take part in the loss, the last is the answer. Raises: RuntimeError for other sizes.
    """

    def __init__(
        self,
        stacks: int = 8,
        joints: int = 16,
        *,
        depth: int = 4,
        wide_stem: bool = False,
        in_channels: int = 3,
        features: int = FEATURES,
    ) -> None:
        super().__init__()
        if stacks < 1 or joints < 1 or depth < 1:
            raise ValueError(f"StackedHourglass: stacks, joints, depth: expected 1 or more, got {stacks}, {joints}, {depth}")
        if features < 4 or features % 4:
            raise ValueError(f"StackedHourglass: features: expected a multiple of 4, got {features}")
        self.depth = depth
        quarter, half = features // 4, features // 2
        self.conv1 = nn.Conv2d(in_channels, quarter, 7, stride=2, padding=3)
        self.bn1 = nn.BatchNorm2d(quarter)
        self.relu = nn.ReLU(inplace=True)
        between = features if wide_stem else half
        self.layer1 = _residual(quarter, half)
        self.layer2 = _residual(half, between)
        self.layer3 = _residual(between, features)
        self.maxpool = nn.MaxPool2d(2, 2)
        self.hg = nn.ModuleList(Hourglass(depth, features) for _ in range(stacks))
        self.res = nn.ModuleList(_residual(features, features) for _ in range(stacks))
        self.fc = nn.ModuleList(
            FusedSequential(nn.Conv2d(features, features, 1), nn.BatchNorm2d(features), nn.ReLU(inplace=True))
            for _ in range(stacks)
        )
        self.score = nn.ModuleList(nn.Conv2d(features, joints, 1) for _ in range(stacks))
        self.fc_ = nn.ModuleList(nn.Conv2d(features, features, 1) for _ in range(stacks - 1))
        self.score_ = nn.ModuleList(nn.Conv2d(joints, features, 1) for _ in range(stacks - 1))
        he_fan_in(self)

    @replayed
    def forward(self, x: Tensor) -> list[Tensor]:
        step = 4 << self.depth
        if any(s % step or s == 0 for s in x.shape[2:]):
            raise RuntimeError(f"StackedHourglass: x: expected sides that are multiples of {step}, got {tuple(x.shape[2:])}")
        x = run_conv_bn_act(x, self.conv1, self.bn1, ActSpec("relu", 0.0, self.relu))
        x = self.layer3(self.layer2(run_pool(self.layer1(x), self.maxpool)))
        heatmaps = []
        for i, hourglass in enumerate(self.hg):
            y = self.fc[i](self.res[i](hourglass(x)))
            heatmaps.append(run_conv_act(y, self.score[i]))
            if i < len(self.fc_):
                back = run_conv_act(y, self.fc_[i]), run_conv_act(heatmaps[-1], self.score_[i])
                x = add_act(x, *back, activation="none")
        return heatmaps


_COUNTS = {1: 3_426_448, 2: 6_570_400, 4: 12_858_304, 8: 25_434_112}


def _builder(stacks: int) -> Callable[..., StackedHourglass]:
    name = f"hourglass{stacks}"

    def build(joints: int = 16, **options: Any) -> StackedHourglass:
        return StackedHourglass(stacks, joints, **options)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Stacked hourglass, {stacks} stacks, the paper's layout; options as :class:`StackedHourglass`."
    return register(name, "hourglass", _COUNTS[stacks], (3, 256, 256), "pose-hg-train")(build)


hourglass1, hourglass2, hourglass4, hourglass8 = (_builder(stacks) for stacks in _COUNTS)


@register("hourglass8_wide", "hourglass", 25_594_624, (3, 256, 256), "pytorch-pose, kornia")
def hourglass8_wide(joints: int = 16, **options: Any) -> StackedHourglass:
    """Eight stacks with the wide stem of the PyTorch ports."""
    return StackedHourglass(8, joints, **{"wide_stem": True, **options})


def hourglass(stacks: int = 8, joints: int = 16, **options: Any) -> StackedHourglass:
    """Stacked hourglass with any number of stacks; options as :class:`StackedHourglass`."""
    return StackedHourglass(stacks, joints, **options)
