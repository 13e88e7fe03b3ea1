"""Residual networks with post-activation blocks; attribute names and state_dict keys of ``torchvision.models.resnet``.

Reference: He et al., Deep Residual Learning for Image Recognition, 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import BasicBlock, Bottleneck, FusedSequential
from ..modules._block import run_conv_bn_act_pool
from ..modules._linear import run_linear_act
from ..modules._pool import run_pool
from ..modules._replay import replayed
from ..modules._run import ActSpec
from ..modules.residual import ResidualStage, conv1x1
from ._init import he_fan_out
from ._registry import register

# depth: (block, blocks in each stage, parameters)
_NETS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...], int]] = {
    18: (BasicBlock, (2, 2, 2, 2), 11_689_512),
    34: (BasicBlock, (3, 4, 6, 3), 21_797_672),
    50: (Bottleneck, (3, 4, 6, 3), 25_557_032),
    101: (Bottleneck, (3, 4, 23, 3), 44_549_160),
    152: (Bottleneck, (3, 8, 36, 3), 60_192_808),
    200: (Bottleneck, (3, 24, 36, 3), 64_673_832),
}


class ResNet(nn.Module):
    """Stem (7x7/2, 3x3/2 pooling), four stages of residual blocks, global average, one linear layer.

    Args:
        block: :class:`~dl4ds_kernels.modules.BasicBlock` or :class:`~dl4ds_kernels.modules.Bottleneck`.
        layers: blocks in each of the four stages.
        num_classes: logits.
        groups, width_per_group, replace_stride_with_dilation, norm_layer: as torchvision's.
        zero_init_residual: the last BatchNorm of each branch starts at 0, every block as the identity.
        stride_in_1x1: stride on the 1x1 convolution of a bottleneck (the paper) instead of the 3x3 (torchvision, default).
        memory_efficient: in training, compute each block's last convolution again in backward instead of keeping its output.
        residual_scale: factor after each addition; ``1 / sqrt(2)`` keeps the variance of the activations constant.

    Shape: x (N, 3, H, W), any size from 1 on, in the paper 224 -> logits (N, num_classes).
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
        stride_in_1x1: bool = False,
        residual_scale: float = 1.0,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        dilate = tuple(replace_stride_with_dilation or (False, False, False))
        if len(layers) != 4 or len(dilate) != 3:
            raise ValueError(
                f"ResNet: layers, replace_stride_with_dilation: expected 4 and 3 entries, got {len(layers)} and {len(dilate)}"
            )
        self._norm, self._groups, self._base_width = norm_layer or nn.BatchNorm2d, groups, width_per_group
        self._options: dict[str, Any] = {"residual_scale": residual_scale, "memory_efficient": memory_efficient}
        if stride_in_1x1:
            if block is BasicBlock:
                raise ValueError("ResNet: stride_in_1x1: expected False for BasicBlock, which has no 1x1 convolution, got True")
            self._options["stride_in_1x1"] = True
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self._channels, self._dilation = 64, 1
        self.layer1 = self._stage(block, 64, layers[0], 1, False)
        self.layer2 = self._stage(block, 128, layers[1], 2, dilate[0])
        self.layer3 = self._stage(block, 256, layers[2], 2, dilate[1])
        self.layer4 = self._stage(block, 512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        he_fan_out(self)
        if zero_init_residual:
            for m in self.modules():
                if isinstance(m, (BasicBlock, Bottleneck)):
                    nn.init.zeros_((m.bn3 if isinstance(m, Bottleneck) else m.bn2).weight)

    def _stage(self, block: Any, planes: int, count: int, stride: int, dilate: bool) -> nn.Sequential:
        dilation = self._dilation
        if dilate:
            self._dilation, stride = self._dilation * stride, 1
        out, shortcut = planes * block.expansion, None
        if stride != 1 or self._channels != out:
            shortcut = FusedSequential(conv1x1(self._channels, out, stride), self._norm(out))
        blocks = []
        for i in range(count):
            blocks.append(
                block(
                    self._channels, planes, stride if i == 0 else 1, shortcut if i == 0 else None, self._groups,
                    self._base_width, dilation if i == 0 else self._dilation, self._norm, **self._options,
                )
            )  # fmt: skip
            self._channels = out
        return ResidualStage(*blocks)

    @replayed
    def forward(self, x: Tensor) -> Tensor:
        x = run_conv_bn_act_pool(x, self.conv1, self.bn1, ActSpec("relu", 0.0, self.relu), self.maxpool)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return run_linear_act(torch.flatten(run_pool(x, self.avgpool), 1), self.fc)


def _builder(depth: int) -> Callable[..., ResNet]:
    block, layers, parameters = _NETS[depth]

    def build(num_classes: int = 1000, **options: Any) -> ResNet:
        return ResNet(block, layers, num_classes, **options)

    build.__name__ = build.__qualname__ = f"resnet{depth}"
    build.__doc__ = f"ResNet-{depth}; options as :class:`ResNet`."
    source = f"timm resnet{depth}" if depth == 200 else f"torchvision resnet{depth}"
    return register(f"resnet{depth}", "resnet", parameters, (3, 224, 224), source)(build)


resnet18, resnet34, resnet50, resnet101, resnet152, resnet200 = (_builder(depth) for depth in _NETS)
